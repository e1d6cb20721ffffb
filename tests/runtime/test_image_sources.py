# SPDX-License-Identifier: Apache-2.0
"""What a program may hand to a Segmenter, and what it is told when it hands over something else."""

import contextlib
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from internimage_deploy import Segmenter, UserError, Window, build_engine
from internimage_deploy.runtime.imaging import fetch as fetch_module
from internimage_deploy.runtime.imaging.fetch import address_stem, fetch
from support.tiny_models import picture

HEIGHT, WIDTH = 40, 60


@pytest.fixture(scope="module")
def image():
    return picture(HEIGHT, WIDTH)[0]


@pytest.fixture(scope="module")
def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def segmenter(model):
    return Segmenter.load(model, "onnxruntime", threads=1)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/slow"):
            self.server.released.wait(60)
        content = self.server.content
        code = 404 if self.path.startswith("/none") else 200
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:  # the client did not want all of it
            return

    def log_message(self, *about):
        """Say nothing."""


@pytest.fixture
def web(encoded):
    """A web server's address; `content` is what it sends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.released = encoded, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def address(server, path):
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def test_every_kind_of_image_gives_the_same_labels(segmenter, image, encoded, tmp_path, web):
    path = tmp_path / "a.png"
    path.write_bytes(encoded)
    expected = segmenter(image).labels
    for source in (path, str(path), encoded, bytearray(encoded), Image.open(path), address(web, "/a.png")):
        np.testing.assert_array_equal(segmenter(source).labels, expected)
    several = segmenter([path, encoded, Image.open(path)])
    assert len(several) == 3
    assert len(segmenter(source for source in (path, image))) == 2


def test_a_segmenter_says_what_it_is(segmenter):
    assert repr(segmenter) == f"<Segmenter {segmenter.backend.card.architecture} of 3 classes in onnxruntime>"


def test_an_open_file(segmenter, image, encoded):
    np.testing.assert_array_equal(segmenter(io.BytesIO(encoded)).labels, segmenter(image).labels)


def test_overlays_of_classes_by_name(segmenter, image):
    result = segmenter(image)
    np.testing.assert_array_equal(result.overlay(classes=["green"]), result.overlay(classes=[1]))
    np.testing.assert_array_equal(result.overlay(classes="green"), result.overlay(classes=[1]))
    for unknown in ("roof", 3, -1):
        with pytest.raises(UserError, match="is not among the 3 classes of this model"):
            result.overlay(classes=[unknown])


def test_tensors_of_pytorch(segmenter, image):
    torch = pytest.importorskip("torch")
    expected = segmenter(image).labels
    tensor = torch.from_numpy(image.copy())
    np.testing.assert_array_equal(segmenter(tensor).labels, expected)
    np.testing.assert_array_equal(segmenter(tensor.permute(2, 0, 1)).labels, expected)  # as torchvision reads
    with pytest.raises(UserError, match=r"float32 .*expected uint8 \(H, W, 3\)"):
        segmenter(tensor.float())
    with pytest.raises(UserError, match="Tensor does not become an array"):
        segmenter(tensor.float().requires_grad_())


def test_a_result_knows_its_source_and_saves_under_its_name(segmenter, encoded, tmp_path, web):
    (tmp_path / "street.png").write_bytes(encoded)
    for source, stem in ((tmp_path / "street.png", "street"), (address(web, "/b.png"), "b"), (encoded, "image")):
        assert segmenter(source).save(tmp_path / "out")[-1].name == f"{stem}.labels.png"


def test_a_palette_image_of_pillow_is_taken_as_shown(segmenter, image):
    quantized = Image.fromarray(image).quantize(8)
    np.testing.assert_array_equal(segmenter(quantized).labels, segmenter(image).labels)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "image: got NoneType, expected a path, an address, a PIL image"),
        (7, "image: got int, expected a path"),
        ({"a": 1}, "image: got dict, expected a path"),
        ([None], "image: got NoneType"),
        (b"text", "image: not an image in a known format"),
        ("none.png", "none.png: no such file"),
        (np.zeros((4, 4)), r"float64 \(4, 4\), expected uint8 \(H, W, 3\) in RGB order"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"uint8 \(2, 4, 4, 3\)"),
        (np.array("text"), "expected uint8"),
    ],
    ids=str,
)
def test_anything_else_is_one_line(segmenter, source, message):
    with pytest.raises(UserError, match=message) as error:
        segmenter(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 512}, r"resize is 512, expected \(long, short\)"),
        ({"resize": "512x512"}, "resize is '512x512'"),
        ({"resize": (0, 5)}, "resize is"),
        ({"threads": 0}, "threads is 0, expected a number of at least 1"),
        ({"threads": -3}, "threads is -3"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": "2"}, "batch is '2'"),
        ({"max_pixels": None}, "max_pixels is None"),
        ({"device": -1}, "device is -1, expected the number of a GPU, from 0 on"),
        ({"window": "half"}, 'window is \'half\', expected "slide", "whole" or a Window'),
        ({"backend": "abacus"}, "no backend 'abacus'"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line(model, options, message):
    with pytest.raises(UserError, match=message):
        Segmenter.load(model, **options)


def test_a_resize_beyond_all_memory_is_one_line(model):
    segmenter = Segmenter.load(model, "onnxruntime", resize=(1_000_000, 1_000_000))
    with pytest.raises(
        UserError, match=r"would be 500000x1000000, the limit is 100,000,000 pixels; use a smaller resize"
    ):
        segmenter(picture(8, 16)[0])


def test_rounding_up_does_not_multiply_the_pixels_of_a_long_image(model):
    segmenter = Segmenter.load(model, "onnxruntime", max_pixels=1_000_000)
    with pytest.raises(UserError, match=r"would be 32x1000000, the limit is 1,000,000 pixels"):
        segmenter.prepare(np.zeros((1, 1_000_000, 3), np.uint8))
    assert segmenter.prepare(np.zeros((1, 60_000, 3), np.uint8)).size == (32, 60_000)
    assert segmenter.prepare(np.zeros((1000, 1000, 3), np.uint8)).size == (1024, 1024)


def test_wrong_ways_in_are_one_line(model):
    with pytest.raises(UserError, match=r"takes a loaded backend, got str; use Segmenter\.load\(path\)"):
        Segmenter(str(model))
    with pytest.raises(UserError, match=r"crop is 96, expected \(height, width\)"):
        Window(96, 64)
    with pytest.raises(UserError, match="takes the path of a model file, got NoneType"):
        Segmenter.load(None)
    for options, message in (({"precision": "int8"}, "precision is 'int8'"), ({"backend": "x"}, "backend is 'x'")):
        with pytest.raises(UserError, match=message):
            build_engine(model, model.with_suffix(".engine"), **options)
    with pytest.raises(UserError, match="expected strides from 1 to the crop"):
        Window((64, 64), (65, 64))
    with pytest.raises(UserError, match="alpha is 5"):
        Segmenter.load(model, "onnxruntime")(picture(8, 8)[0]).overlay(5)
    checkpoint = model.with_suffix(".pth")
    checkpoint.touch()
    with pytest.raises(UserError, match=r"a checkpoint is not run directly.*export-onnx --ckpt"):
        Segmenter.load(checkpoint)


def test_addresses_that_fail_are_named(web, monkeypatch):
    with pytest.raises(UserError, match="the server answered 404"):
        fetch(address(web, "/none.png"))
    with pytest.raises(UserError, match="larger than 0 MiB"):
        fetch(address(web, "/a.png"), max_bytes=10)
    with pytest.raises(UserError, match=r"cannot be fetched|not complete"):
        fetch(address(web, "/slow.png"), timeout_s=0.2)
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("http://127.0.0.1:1/a.png", timeout_s=5)
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("http://")
    clock = iter([0.0, 100.0])
    # The module's own clock: other threads must not take its readings.
    monkeypatch.setattr(fetch_module, "time", SimpleNamespace(monotonic=lambda: next(clock, 100.0)))
    with pytest.raises(UserError, match="not complete after 30 s"):
        fetch(address(web, "/a.png"))


@contextlib.contextmanager
def raw_web(send):
    """The port of a server that answers each request with `send(connection)`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(65536)
                        send(connection)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (b"HTTP/1.1 200 OK", b"\r\nContent-Length: 1\r\n\r\na"),
        (b"HTTP/1.1 200 OK\r\nX:", b"\r\nContent-Length: 1\r\n\r\na"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1", b"\r\na\r\n0\r\n\r\n"),
    ],
    ids=["status", "headers", "chunk"],
)
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(start, end):
    sent = []

    def send(connection):
        connection.sendall(start)
        for _ in range(100):
            connection.sendall(b" ")
            sent.append(1)
            time.sleep(0.05)
        connection.sendall(end)

    with raw_web(send) as port, pytest.raises(UserError, match="not complete after"):
        fetch(f"http://127.0.0.1:{port}/a.png", timeout_s=0.5)
    assert len(sent) < 100


def test_the_body_of_a_redirection_is_not_read(web, encoded):
    sent = []

    def send(connection):
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {address(web, '/a.png')}\r\n\r\n".encode())
        for _ in range(100):
            connection.sendall(bytes(1 << 20))
            sent.append(1)

    with raw_web(send) as port:
        assert fetch(f"http://127.0.0.1:{port}/") == encoded
    assert len(sent) < 50


@pytest.mark.parametrize(
    ("text", "stem"),
    [("http://host/x/b%20c.jpg?size=2", "b_c"), ("https://host", "host"), ("https://host/a", "a")],
)
def test_what_an_address_is_named_after(text, stem):
    assert address_stem(text) == stem


def test_the_command_takes_addresses_and_the_standard_input(run, model, encoded, tmp_path, web, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(encoded)))
    code, text, _ = run("segment", model, "-", address(web, "/b.png"), "-o", tmp_path / "out")
    assert (code, text.splitlines()[0]) == (0, f"segmented 2 of 2 images into {tmp_path / 'out'}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.labels.png", "stdin.labels.png"]
