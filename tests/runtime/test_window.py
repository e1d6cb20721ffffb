# SPDX-License-Identifier: Apache-2.0
"""Models that were evaluated with a sliding window: their card decides, and files that return labels slide as well."""

import dataclasses
import tempfile

import numpy as np
import onnx
import pytest
from PIL import Image

from internimage_deploy import Segmenter, UserError
from internimage_deploy.card import EngineInfo
from internimage_deploy.onnx_tools.graph import Graph
from internimage_deploy.onnx_tools.logits import return_logits
from internimage_deploy.onnx_tools.model_file import read_card, read_model
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.backends.ort_gpu import OnnxRuntimeGpuBackend
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline, images_per_run
from internimage_deploy.runtime.imaging.preprocess import fixed_geometry, resize_image
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.serving.execution import model_runner
from internimage_deploy.runtime.serving.settings import ModelSettings
from internimage_deploy.window import Window
from support.exports import DYNAMIC_LABELS, STATIC
from support.tiny_models import Overlapping, color_model, picture
from support.windows import logits_session, slide, with_window

WINDOW = Window((64, 96), (40, 52))
# Larger than the crop on both sides, with uneven overlaps, on one side and on none; two of one network size.
SIZES = ((150, 233), (160, 240), (50, 200), (130, 90), (40, 50))


def noise(size, seed=0):
    """An image of coarse and fine noise, to which the random networks below react."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(size[::-1])
    return np.clip(np.asarray(coarse) + rng.normal(0, 25, (*size, 3)), 0, 255).astype(np.uint8)


def expect_same(labels, scores, least=0.9):
    """Equal where the best class is clear, which it is for most pixels."""
    second, best = np.sort(scores, axis=0)[-2:]
    clear = best - second > 1e-4 * np.abs(scores).max()
    assert clear.mean() > least
    np.testing.assert_array_equal(labels[clear], scores.argmax(0)[clear])


@pytest.fixture(scope="module")
def free(exports, tmp_path_factory):
    """A real network of free size that returns labels; its card has a window, and the images' own size for it."""
    path = exports(*DYNAMIC_LABELS).path
    return with_window(path, tmp_path_factory.mktemp("free") / "free.onnx", WINDOW, resize=None)


@pytest.mark.parametrize(("backend", "batch"), [("onnxruntime", 1), ("onnxruntime", 4), ("openvino", 3)])
def test_a_model_slides_as_its_card_says(free, backend, batch):
    images = [noise(size, seed) for seed, size in enumerate(SIZES)]
    logits_of = logits_session(free)
    with Segmenter.load(free, backend, batch=batch) as segmenter:
        assert segmenter.pipeline.window == WINDOW
        assert (segmenter.card.output.name, segmenter.card.output.dtype) == ("logits", "float32")
        results = segmenter(images)
    for image, result in zip(images, results, strict=True):
        network = tuple(-(-side // 32) * 32 for side in image.shape[:2])
        at_network = np.asarray(Image.fromarray(image)) if network == image.shape[:2] else resized(image, network)
        expect_same(result.labels, slide(at_network, WINDOW.crop, WINDOW.stride, logits_of, image.shape[:2]))


def resized(image, network):
    geometry = dataclasses.replace(fixed_geometry(image.shape[:2], network), keep_ratio=network, content=network)
    return resize_image(image, geometry, (0, 0, 0))


def test_a_network_of_fixed_size_and_batch_slides_in_crops_of_its_own(exports, tmp_path):
    """At 64x96, with the stride of 128x128 crops in proportion; an image smaller than it is padded."""
    path = with_window(exports(*STATIC).path, tmp_path / "m.onnx", Window((128, 128), (85, 64)), resize=None)
    logits_of = logits_session(path)
    segmenter = Segmenter.load(path, "onnxruntime")
    assert segmenter.pipeline.window == Window((64, 96), (42, 48))
    image = noise((160, 224))
    scores = slide(image, (64, 96), (42, 48), lambda crop: logits_of(np.repeat(crop, 2, 0)), image.shape[:2])
    expect_same(segmenter(image).labels, scores)
    small = segmenter.prepare(noise((40, 50)))
    assert (small.size, small.crop_count) == ((64, 96), 1)
    assert Window((96, 96), (7, 32)).scaled_to((96, 96)) == Window((96, 96), (7, 32))
    assert Window((1024, 1024), (512, 1)).scaled_to((96, 64)) == Window((96, 64), (48, 1))


def test_whole_images_and_other_windows_on_demand(free, exports):
    image = noise((150, 233))
    plain = Segmenter.load(exports(*DYNAMIC_LABELS).path, "onnxruntime", resize="own")(image).labels
    whole = Segmenter.load(free, "onnxruntime", window="whole")
    assert whole.card.emits_labels
    np.testing.assert_array_equal(whole(image).labels, plain)
    slid = Segmenter.load(free, "onnxruntime")(image).labels
    assert (slid != plain).mean() > 0.01
    np.testing.assert_array_equal(Segmenter.load(free, "onnxruntime", window="slide")(image).labels, slid)
    other = Segmenter.load(free, "onnxruntime", window=Window((96, 96), (64, 64)))
    expect_same(
        other(image).labels, slide(resized(image, (160, 256)), (96, 96), (64, 64), logits_session(free), (150, 233))
    )


def test_probabilities_of_a_file_that_returns_labels(free):
    image = noise((100, 233))
    segmenter = Segmenter.load(free, "onnxruntime")
    scores = slide(resized(image, (128, 256)), WINDOW.crop, WINDOW.stride, logits_session(free), (100, 233))
    powers = np.exp(scores - scores.max(0))
    np.testing.assert_allclose(segmenter.probabilities(image), powers / powers.sum(0), atol=1e-4)


def test_the_model_in_memory_is_sound_and_has_no_more_than_the_logits_need(exports):
    path = exports(*DYNAMIC_LABELS).path
    model, card = read_model(path), read_card(path)
    assert {"ArgMax", "Cast"} <= {node.op_type for node in list(model.graph.node)[-2:]}
    changed = return_logits(Graph(model, path.parent), card)
    onnx.checker.check_model(model, full_check=True)
    assert changed == dataclasses.replace(card, output=changed.output)
    assert changed.output.shape == ("batch", len(card.classes), "height/4", "width/4")
    assert [value.name for value in model.graph.output] == ["logits"]
    assert "ArgMax" not in {node.op_type for node in model.graph.node}
    assert model.graph.node[-1].output[0] == "logits"


def test_a_file_without_logits_is_refused_and_runs_on_whole_images(tmp_path):
    path = color_model(tmp_path / "m.onnx", labels=True, inner="x", window=Window((64, 64), (32, 32)))
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(UserError, match=r"this model returns labels; export it with --emit logits, .*: --whole"):
            Segmenter.load(path, backend)
        image, labels = picture(40, 70)
        assert (Segmenter.load(path, backend, window="whole")(image).labels == labels).mean() > 0.9


def test_an_engine_of_labels_is_refused(tmp_path):
    card = read_card(color_model(tmp_path / "m.onnx", labels=True, window=Window((64, 64), (32, 32))))
    card = dataclasses.replace(card, engine=EngineInfo("tensorrt", "10.14", "", ()))
    with pytest.raises(
        UserError, match=r"returns labels; build the engine from an export with --emit logits, .*--whole"
    ):
        ImagePipeline(card)
    assert ImagePipeline(card, window="whole").window is None


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("external", [False, True], ids=["inside", "beside"])
def test_wherever_the_weights_are(tmp_path, external, monkeypatch, caplog):
    """Beside the file, in it, and in it where there is no room to put them elsewhere."""
    image, labels = picture(128, 160)
    path = color_model(tmp_path / "m.onnx", labels=True, external=external, window=Window((64, 96), (40, 40)))
    expected = Segmenter.load(path, "onnxruntime")(image).labels
    assert (expected == labels).mean() > 0.95
    for load in (lambda: Segmenter.load(path, "openvino"), lambda: Segmenter(gpu_backend(path))):
        np.testing.assert_array_equal(load()(image).labels, expected)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    segmenter = Segmenter.load(path, "onnxruntime")
    assert ("no room" in caplog.text) != external
    np.testing.assert_array_equal(segmenter(image).labels, expected)


def gpu_backend(path):
    """ONNX Runtime's GPU backend, which falls back to the CPU where it is told to expect that."""
    return OnnxRuntimeGpuBackend(path, "CPUExecutionProvider")


def test_crops_of_several_images_share_runs_as_long_as_they_fill_them(tmp_path):
    path = color_model(tmp_path / "m.onnx", window=Window((64, 64), (32, 32)))
    images = [picture(64, 96)[0], picture(64, 90)[0], picture(50, 96)[0], picture(128, 128)[0], picture(128, 128)[0]]
    whole = [result.labels for result in Segmenter.load(path, "onnxruntime", window="whole")(images)]
    segmenter = Segmenter(Recorder(load_backend(path, "onnxruntime")), batch=4)
    prepared = [segmenter.prepare(image) for image in images]
    assert [image.crop_count for image in prepared] == [2, 2, 2, 9, 9]
    assert [images_per_run(image, 4) for image in prepared] == [2, 2, 2, 1, 1]
    for result, expected in zip(segmenter(images), whole, strict=True):
        assert (result.labels == expected).mean() > 0.97
    assert segmenter.backend.sizes == [4, 2, 4, 4, 1, 4, 4, 1]
    segmenter.backend.sizes.clear()
    labels = model_runner.run(segmenter, [image.for_network() for image in prepared[:3]])
    assert segmenter.backend.sizes == [4, 2]
    for found, expected in zip(labels, whole, strict=False):
        assert (found == expected).mean() > 0.97


def test_an_engine_gets_no_more_crops_at_once_than_it_takes(tmp_path):
    """`serve` asks for batches of eight, engines are built for one unless --max says more."""
    path = color_model(tmp_path / "m.onnx", window=Window((64, 64), (32, 32)))
    for most, sizes in ((1, [1] * 9), (4, [4, 4, 1])):
        backend = Recorder(load_backend(path, "onnxruntime"))
        profile = {"min": (1, 64, 64), "opt": (1, 64, 64), "max": (most, 64, 64)}
        backend.card = dataclasses.replace(backend.card, engine=EngineInfo("tensorrt", "10.14", "", (), (profile,)))
        assert (Segmenter(backend, batch=8)(picture(128, 128)[0]).labels == picture(128, 128)[1]).mean() > 0.97
        assert backend.sizes == sizes


class Recorder(Overlapping):
    """Notes the size of every batch."""

    def __init__(self, backend):
        super().__init__(backend)
        self.sizes = []

    def submit(self, batch):
        self.sizes.append(len(batch))
        return super().submit(batch)


def test_a_crop_that_fails_fails_its_image_and_no_other(tmp_path):
    path = color_model(tmp_path / "m.onnx", window=Window((64, 64), (32, 32)))
    # Runs 0 to 2 are the first image's; run 1 fails beside others, and once more alone.
    backend = Overlapping(load_backend(path, "onnxruntime"), fail_to_answer={1, 3})
    segmenter = Segmenter(backend, batch=4)
    images = [segmenter.prepare(picture(128, 128)[0]) for _ in range(2)]
    failed = []
    done = list(segmenter.forward_each([[(0, images[0])], [(1, images[1])]], lambda group, error: failed.append(group)))
    assert [[key for key, _ in group] for group in failed] == [[0]]
    ((((key, image),), (output,)),) = done
    assert (key, output.shape) == (1, (9, 3, 16, 16))
    assert (segmenter.finish(image, output).labels == picture(128, 128)[1]).mean() > 0.97


@pytest.mark.parametrize("size", [(150, 233), (40, 200), (30, 30)])
def test_the_memory_of_crops_is_known_before_the_network_runs(free, size):
    segmenter = Segmenter.load(free, "onnxruntime", batch=2)
    prepared = segmenter.prepare(noise(size))
    (output,) = segmenter.forward([prepared])
    assert len(output) == prepared.crop_count == len(segmenter.pipeline.crops(prepared))
    assert segmenter.pipeline.crop_bytes(size) == output.nbytes
    assert Segmenter.load(free, "onnxruntime", window="whole").pipeline.crop_bytes(size) == 0


def test_a_worker_tells_what_it_loaded(tmp_path):
    """The service prepares images from the card that the worker sends; the file's own would say labels."""
    path = color_model(tmp_path / "m.onnx", labels=True, window=Window((64, 64), (32, 32)))
    assert not model_runner.load(ModelSettings(path, LoadOptions("onnxruntime"))).card.emits_labels
    assert model_runner.load(ModelSettings(path, LoadOptions("onnxruntime", window="whole"))).card.emits_labels


def test_the_commands(run, free, tmp_path):
    image = noise((150, 233))
    Image.fromarray(image).save(tmp_path / "i.png")

    def labels(*options):
        code, out, err = run(
            "segment", free, tmp_path / "i.png", "-o", tmp_path / "out", "--backend", "onnxruntime", *options
        )
        assert (code, err) == (0, ""), err
        assert "window" not in out
        return np.asarray(Image.open(tmp_path / "out" / "i.labels.png"))

    for options, window in (
        ((), None),
        (("--slide",), None),
        (("--whole",), "whole"),
        (("--slide", "--crop", "96x96", "--stride", "64x32"), Window((96, 96), (64, 32))),
    ):
        expected = Segmenter.load(free, "onnxruntime", window=window)(image).labels
        np.testing.assert_array_equal(labels(*options), expected, err_msg=str(options))
    code, _, err = run("segment", free, tmp_path / "i.png", "-o", tmp_path / "out", "--slide", "--whole")
    assert (code, "--slide and --whole exclude each other" in err) == (2, True)
    code, out, _ = run("info", free)
    assert "crops of 64x96, every 40x52 pixels" in out
    code, out, _ = run("verify", free, "--against", free, "--images", tmp_path / "i.png", "--size", "64x96")
    assert (code, "100.0000%" in out) == (0, True)


def test_info_of_a_model_for_whole_images(run, tmp_path):
    code, out, _ = run("info", color_model(tmp_path / "m.onnx"))
    assert (code, "none, the network sees whole images" in out) == (0, True)
