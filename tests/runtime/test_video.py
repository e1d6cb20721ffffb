# SPDX-License-Identifier: Apache-2.0
import json
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from internimage_deploy import Segmenter
from internimage_deploy.cli import main as cli
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.results import ResultOptions
from internimage_deploy.runtime.pipelines.video import is_video, segment_video, video_stem
from internimage_deploy.runtime.pipelines.video_results import VideoResults
from support.tiny_models import PALETTE, Overlapping, color_model, picture

HEIGHT, WIDTH, FRAMES, FPS = 64, 96, 12, 10


@pytest.fixture
def clip(tmp_path):
    """A video whose three stripes move by a third of the width with each frame."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (WIDTH, HEIGHT))
    for image in frames():
        writer.write(np.ascontiguousarray(image[:, :, ::-1]))
    writer.release()
    return path


def frames():
    image, _ = picture(HEIGHT, WIDTH)
    return [np.roll(image, WIDTH // 3 * step, axis=1) for step in range(FRAMES)]


@pytest.fixture
def segmenter(tmp_path):
    return Segmenter.load(color_model(tmp_path / "m.onnx"))


def overlay_in(folder):
    return VideoResults(folder / "out.avi", options=ResultOptions(alpha=1.0))


def read(path):
    capture = cv2.VideoCapture(str(path))
    found = []
    while (frame := capture.read())[0]:
        found.append(frame[1][:, :, ::-1])
    return found, capture.get(cv2.CAP_PROP_FPS)


def stripes(image):
    """The palette colour nearest to the middle of each third of a picture."""
    columns = [int((third + 0.5) * WIDTH / 3) for third in range(3)]
    pixels = image[HEIGHT // 2, columns].astype(int)
    return [int(np.abs(np.array(PALETTE) - pixel).sum(1).argmin()) for pixel in pixels]


def test_each_frame_is_written_in_order(clip, segmenter, tmp_path):
    done = segment_video(segmenter, str(clip), overlay_in(tmp_path))
    assert (done.frames, done.dropped) == (FRAMES, 0)
    found, fps = read(tmp_path / "out.avi")
    assert (len(found), fps) == (FRAMES, FPS)
    assert [stripes(image) for image in found] == [[(t - step) % 3 for t in range(3)] for step in range(FRAMES)]


def test_live_drops_frames_and_keeps_the_time(clip, segmenter, tmp_path, monkeypatch):
    run = segmenter.backend.run

    def slow(batch):
        time.sleep(2.5 / FPS)
        return run(batch)

    monkeypatch.setattr(segmenter.backend, "run", slow)
    done = segment_video(segmenter, str(clip), overlay_in(tmp_path), live=True)
    assert done.dropped > 0
    assert done.frames + done.dropped <= FRAMES
    found, _ = read(tmp_path / "out.avi")
    assert len(found) == done.frames + done.dropped  # a dropped frame shows the one before it


def test_stopping_early_leaves_no_thread(clip, segmenter):
    import threading

    before = threading.active_count()
    done = segment_video(segmenter, str(clip), max_frames=3)
    assert done.frames == 3
    assert threading.active_count() == before


def test_a_failure_leaves_no_file(clip, segmenter, tmp_path, monkeypatch):
    def fail(batch):
        raise UserError("no more")

    monkeypatch.setattr(segmenter.backend, "run", fail)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match="no more"):
        segment_video(segmenter, str(clip), VideoResults(folder / "out.avi"))
    assert list(folder.iterdir()) == []


def test_frames_overlap_where_the_backend_can(clip, segmenter, tmp_path):
    backend = Overlapping(segmenter.backend)
    done = segment_video(
        Segmenter(backend),
        str(clip),
        overlay_in(tmp_path),
        max_frames=4,
    )
    assert done.frames == 4
    assert backend.events == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "start 3", "wait 2", "wait 3"]
    found, _ = read(tmp_path / "out.avi")
    assert len(found) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [("none.mp4", "none.mp4: no such file"), ("rtsp://127.0.0.1:1/x", "OpenCV cannot open it"), ("7", "camera 7: ")],
)
@pytest.mark.filterwarnings("ignore")
def test_sources_that_cannot_be_opened(source, message, segmenter):
    with pytest.raises(UserError, match=message):
        segment_video(segmenter, source)


def test_a_file_that_is_no_video(segmenter, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="OpenCV cannot open it"):
        segment_video(segmenter, str(tmp_path / "text.mp4"))


@pytest.mark.parametrize(
    ("source", "expected", "name"),
    [
        ("a/clip.MP4", True, "clip"),
        ("0", True, "camera0"),
        ("rtsp://host/path", True, "stream"),
        ("videotestsrc ! appsink", True, "stream"),
        ("picture.png", False, "picture"),
        ("folder", False, "folder"),
        ("https://host/a.jpg", False, None),
        ("https://host/live.m3u8?token=1", True, "live"),
        ("https://host/a/clip.mp4", True, "clip"),
        ("s3://bucket/pictures", False, None),
    ],
)
def test_what_is_a_video(source, expected, name):
    assert is_video(source) == expected
    if name is not None:
        assert video_stem(source) == name


def command(*arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.run(cli.group, [str(argument) for argument in arguments])
    return exit_.value.code or 0


def test_the_command(clip, tmp_path, capsys):
    model = color_model(tmp_path / "m.onnx")
    assert command("segment", model, clip, "-o", tmp_path / "out", "--overlay", "--frames", 5) == 0
    assert "5 frames, " in capsys.readouterr().out
    found, _ = read(tmp_path / "out" / "clip.overlay.mp4")
    assert len(found) == 5
    image = tmp_path / "a.png"
    cv2.imwrite(str(image), picture(HEIGHT, WIDTH)[0])
    assert command("segment", model, image, "-o", tmp_path / "out", "--live") == 2
    assert "--live, --frames and --frame-masks are for videos" in capsys.readouterr().err


def test_frames_as_json_and_masks(clip, tmp_path, capsys):
    model = color_model(tmp_path / "m.onnx")
    out = tmp_path / "out"
    assert command("segment", model, clip, "-o", out, "--json", "--frame-masks", "--frames", 3, "--classes", "red") == 0
    assert f"wrote {out / 'clip.frames.jsonl'}, {out / 'clip.frames'}" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "clip.frames.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 2]
    assert all([entry["class"] for entry in line["classes"]] == ["red"] for line in lines)
    assert lines[2]["seconds"] == pytest.approx(2 / FPS)
    masks = sorted((out / "clip.frames").iterdir())
    assert [path.name for path in masks] == [f"{index:06d}.labels.png" for index in range(3)]
    red = (np.asarray(Image.open(masks[0])) == 0).sum()
    assert red == lines[0]["classes"][0]["pixels"]


def test_a_video_without_anything_to_write_is_refused(clip, tmp_path, capsys):
    assert command("segment", color_model(tmp_path / "m.onnx"), clip, "-o", tmp_path / "out") == 2
    assert "add --overlay, --json or --frame-masks" in " ".join(capsys.readouterr().err.split())


def test_videos_of_a_folder_do_not_keep_its_images_from_being_done(clip, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "clip.avi").write_bytes(clip.read_bytes())
    cv2.imwrite(str(folder / "a.png"), picture(HEIGHT, WIDTH)[0])
    assert command("segment", color_model(tmp_path / "m.onnx"), folder, "-o", tmp_path / "out") == 0
    assert "1 videos in folders are left out: nothing would be written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.labels.png"]


def test_videos_in_a_folder_are_segmented_with_its_images(clip, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "clip.avi").write_bytes(clip.read_bytes())
    cv2.imwrite(str(folder / "a.png"), picture(HEIGHT, WIDTH)[0])
    model = color_model(tmp_path / "m.onnx")
    assert command("segment", model, folder, "-o", tmp_path / "out", "--overlay", "--frames", 2) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.labels.png",
        "a.overlay.png",
        "clip.overlay.mp4",
    ]


def test_a_bad_video_does_not_keep_the_rest_from_being_done(clip, tmp_path, capsys, monkeypatch):
    model = color_model(tmp_path / "m.onnx")
    (tmp_path / "bad.mp4").write_text("no video")
    cv2.imwrite(str(tmp_path / "a.png"), picture(HEIGHT, WIDTH)[0])
    closed = []
    monkeypatch.setattr(Segmenter, "close", lambda self: closed.append(self))
    given = (tmp_path / "bad.mp4", clip, tmp_path / "a.png")
    assert command("segment", model, *given, "-o", tmp_path / "out", "--overlay", "--frames", 3) == 1
    said, err = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.labels.png",
        "a.overlay.png",
        "clip.overlay.mp4",
        "failures.jsonl",
    ]
    assert "segmented 1 of 1 image into" in said
    assert "failed: " in err
    assert "bad.mp4: OpenCV cannot open it" in err
    assert "1 of 3 images and videos could not be segmented" in err
    assert command("segment", model, tmp_path / "bad.mp4", "-o", tmp_path / "out", "--overlay") == 1
    assert capsys.readouterr().err.count("bad.mp4") == 1
    assert len(closed) == 2
