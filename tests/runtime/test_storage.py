# SPDX-License-Identifier: Apache-2.0
"""Finding images and reading and writing where they lie: a folder, and the same folder as an object store's prefix."""

import sys

import numpy as np
import pytest
from PIL import Image

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime.pipelines.find import find_inputs
from internimage_deploy.runtime.pipelines.storage import Location


@pytest.fixture(params=["folder", "object store"])
def location(request):
    """A function from a folder to its location, as a path or as an address."""
    if request.param == "folder":
        return lambda folder: Location(str(folder))
    pytest.importorskip("pyarrow", reason="pip install 'internimage-deploy[ray]'")
    return lambda folder: Location(folder.as_uri())


def test_files_are_listed_written_read_and_deleted(location, tmp_path):
    storage = location(tmp_path / "new").open()
    assert storage.list(recursive=True) == []
    storage.write("b", b"1")
    storage.write("deep/a", b"2")
    assert storage.list(recursive=False) == ["b"]
    assert storage.list(recursive=True) == ["b", "deep/a"]
    assert storage.read("deep/a") == b"2"
    assert (tmp_path / "new" / "deep" / "a").read_bytes() == b"2"
    storage.delete("b")
    assert storage.list(recursive=True) == ["deep/a"]


def test_what_is_not_there_is_named(location, tmp_path):
    storage = location(tmp_path).open()
    with pytest.raises(UserError, match="none"):
        storage.read("none")
    with pytest.raises(UserError, match="none"):
        storage.delete("none")


def test_a_place_that_cannot_be_written_to(location, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        location(tmp_path / "file").open().write("a", b"")


def images_of(*places, **options):
    return find_inputs([place.uri for place in places], **options).images


def test_images_are_found_and_results_are_left_out(location, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt", "a.labels.png", "a.overlay.png", "sub/c.tiff"):
        (tmp_path / name).touch()
    images = images_of(location(tmp_path))
    assert [(image.name, image.stem) for image in images] == [("a.png", "a"), ("b.JPG", "b")]
    assert [image.stem for image in images_of(location(tmp_path), recursive=True)] == ["a", "b", "sub/c"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image here"):
        images_of(location(tmp_path / "empty"))


def test_two_images_with_one_stem_keep_their_endings(location, tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        (tmp_path / name).touch()
    found = find_inputs([location(tmp_path).uri])
    assert [image.stem for image in found.images] == ["a.jpg", "a.png", "b"]
    assert [image.stem for image in found.renamed] == ["a.jpg", "a.png"]


def test_two_images_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("x", "y", "deep/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").touch()
    found = find_inputs([str(tmp_path / "x"), str(tmp_path / "y")])
    assert [image.stem for image in found.images] == ["x/a", "y/a"]
    with pytest.raises(UserError, match=r"x/a\.png and .*deep/x/a\.png would both write x/a\.png\.\*"):
        find_inputs([str(tmp_path / "x"), str(tmp_path / "deep" / "x")])


def test_folders_that_tell_results_apart_lie_in_the_output(tmp_path, monkeypatch):
    """However the files are named: a result called "/a" or "../a" would be written elsewhere."""
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    for folder in (tmp_path, here, here / "sub"):
        (folder / "a.png").touch()
    monkeypatch.chdir(here)
    found = find_inputs(["a.png", "../a.png", "sub/a.png"])
    assert [image.stem for image in found.images] == ["here/a", f"{tmp_path.name}/a", "sub/a"]
    found = find_inputs(["http://host/../a.png", "http://other/x/../a.png", "sub/../sub/a.png"])
    assert [image.stem for image in found.images] == ["host/a", "other/a", "sub/a"]
    videos = find_inputs(["https://host/day1/v.mp4", "https://host/day2/v.mp4"]).videos
    assert [video.stem for video in videos] == ["day1/v", "day2/v"]


def test_a_file_that_is_named_twice_is_found_once(tmp_path):
    (tmp_path / "a.png").touch()
    assert len(find_inputs([str(tmp_path), str(tmp_path / "a.png"), f"{tmp_path}/./a.png"]).images) == 1


def test_patterns_lists_and_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("day1/a.png", "day2/b.png", "day2/b.labels.png", "c[1].png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [str(image) for image in find_inputs(["day*/*.png"]).images] == ["day1/a.png", "day2/b.png"]
    assert [str(image) for image in find_inputs(["c[1].png"]).images] == ["c[1].png"]  # a file, not a pattern
    (tmp_path / "day1" / "list.txt").write_text("# mine\na.png\n\n../day2/b.png\nhttps://host/x.jpg\n")
    listed = find_inputs(["day1/list.txt"]).images
    assert [image.stem for image in listed] == ["a", "b", "x"]
    assert str(listed[2]) == "https://host/x.jpg"
    with pytest.raises(UserError, match="no file matches this pattern"):
        find_inputs(["none*.png"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="an empty list"):
        find_inputs(["empty.txt"])


def test_missing_files_and_unread_formats_are_named(tmp_path):
    for name in ("a.png", "b.heic", "c.jp2"):
        (tmp_path / name).touch()
    found = find_inputs([str(tmp_path), str(tmp_path / "gone.png")])
    assert found.missing == [(str(tmp_path / "gone.png"), "no such file")]
    assert found.unread == [f"{tmp_path / 'b.heic'} (HEIC)", f"{tmp_path / 'c.jp2'} (JPEG 2000)"]
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        find_inputs([str(tmp_path / "gone.png")])


def test_credentials_are_in_no_message():
    assert str(Location("s3://KEY:SECRET@bucket/images")) == "s3://bucket/images"
    with pytest.raises(UserError, match="nowhere://x/y: not a location that can be opened"):
        Location("nowhere://KEY:SECRET@x/y").open()


def test_without_arrow_an_address_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"opening s3://bucket needs the package 'pyarrow'"):
        Location("s3://bucket").open()


def test_results_are_the_same_from_and_to_either(location, tmp_path, model, run):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "in" / "a.png")
    assert run("segment", model, tmp_path / "in", "-o", tmp_path / "plain")[0] == 0
    code, text, _ = run("segment", model, location(tmp_path / "in").uri, "-o", location(tmp_path / "out").uri)
    assert (code, text.startswith("segmented 1 of 1 image into")) == (0, True)
    names = [tmp_path / folder / "a.labels.png" for folder in ("plain", "out")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_two_videos_with_one_stem_keep_their_endings(tmp_path):
    for name in ("v.avi", "v.mp4", "w.mp4"):
        (tmp_path / name).touch()
    assert [video.stem for video in find_inputs([str(tmp_path)]).videos] == ["v.avi", "v.mp4", "w"]
    with pytest.raises(UserError, match=r"would both write host/stream\.\*"):
        find_inputs(["rtsp://host/1", "rtsp://host/2"])


def test_a_pattern_that_matches_results_only_and_a_name_too_long(tmp_path):
    (tmp_path / "a.labels.png").touch()
    with pytest.raises(UserError, match="only results of this program match this pattern"):
        find_inputs([f"{tmp_path}/*.png"])
    with pytest.raises(UserError, match="no image here beside results of this program"):
        find_inputs([str(tmp_path)])
    with pytest.raises(UserError, match=r"File name too long|no such file"):
        find_inputs(["x" * 300 + ".png"])


def test_a_list_with_a_byte_order_mark_and_a_folder_named_like_a_video(tmp_path):
    (tmp_path / "clips.mp4").mkdir()
    (tmp_path / "clips.mp4" / "a.png").touch()
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfclips.mp4/a.png\n")
    assert [image.stem for image in find_inputs([str(tmp_path / "list.txt")]).images] == ["a"]
    assert [image.stem for image in find_inputs([str(tmp_path / "clips.mp4")]).images] == ["a"]


def test_passwords_are_in_no_message_and_no_report(run, model, tmp_path):
    sources = ("rtsp://user:secret@127.0.0.1:1/cam", "http://user:secret@127.0.0.1:1/a.png")
    code, text, err = run("segment", model, *sources, "-o", tmp_path / "out", "--overlay")
    assert code == 1
    assert "secret" not in text + err + (tmp_path / "out" / "failures.jsonl").read_text()
    assert "rtsp://127.0.0.1:1/cam" in err
