# SPDX-License-Identifier: Apache-2.0
"""Requests meant to do harm, and what must not come of them."""

import gzip
import io
import json
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internimage_deploy.runtime.serving.admission import MemoryBudget
from internimage_deploy.runtime.serving.http.image_codec import checked_structure
from internimage_deploy.runtime.serving.http_error import HttpError
from support.served import WAIT_S, Served, decoded, encoded, stripes, until


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)


def exchange(server, *pieces):
    """Send pieces over one connection; returns the head of the response."""
    with connect(server) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break  # closed already: the response is still to be read
        return read_head(connection)


def read_head(connection):
    received = b""
    while b"\r\n\r\n" not in received:
        try:
            piece = connection.recv(65536)
        except ConnectionError:
            break
        if not piece:
            break
        received += piece
    return received


def status(head):
    return int(head.split(b" ", 2)[1])


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A small PNG that announces, and holds, a huge image."""
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + width // 8)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def check_alive(server):
    data, labels = stripes()
    np.testing.assert_array_equal(decoded(server.post("/v1/segment", content=data).content), labels)


@pytest.mark.parametrize("path", ["/v1/segment", "/v1/segment/batch", "/v2/models/color/infer"])
def test_an_oversized_body_is_rejected_before_it_is_read(server, path):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n".encode()
    assert status(exchange(server, head)) == 413
    check_alive(server)


def test_an_oversized_chunked_body_is_rejected_while_it_is_read(server):
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    assert status(exchange(server, head, *[piece] * 70)) == 413
    check_alive(server)


@pytest.mark.parametrize("size", [(30_000, 30_000), (6_000, 5_000)], ids=["900 MP", "30 MP"])
def test_an_image_bomb_is_rejected_without_decoding(server, size):
    before = server.resident_bytes()
    response = server.post("/v1/segment", content=bomb(*size) if size[0] < 10_000 else bomb(*size)[:2000])
    assert response.status_code == 413
    assert "pixels" in response.json()["error"]
    assert server.resident_bytes() - before < 64 << 20


def test_a_limit_above_pillows_own_is_the_one_that_counts():
    data = bomb(20_000, 10_000)
    structure = checked_structure(data, 200_000_000)
    assert (structure.width, structure.height) == (20_000, 10_000)
    with pytest.raises(HttpError, match="the image is 20000x10000, 200,000,000 pixels; at most 199,999,999"):
        checked_structure(data, 199_999_999)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_cut_exif_block_does_not_matter(server, kind):
    data, labels = stripes()
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, kind, exif=b"Exif\0\0MM\0*", lossless=True)
    response = server.post("/v1/segment", content=file.getvalue())
    np.testing.assert_array_equal(decoded(response.content), labels)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_bomb_is_rejected(server, coding):
    packed = (gzip.compress if coding == "gzip" else zlib.compress)(bytes(512 << 20), 1)
    before = server.resident_bytes()
    response = server.post("/v1/segment", content=packed, headers={"Content-Encoding": coding})
    assert response.status_code == 413
    assert server.resident_bytes() - before < 64 << 20


def test_text_chunks_that_unpack_to_much_do_no_harm(server):
    good = stripes()[0]
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(200 << 20), 9))
    response = server.post("/v1/segment", content=good[:33] + text + good[33:])
    assert response.status_code in (200, 400)
    check_alive(server)


def test_very_long_images_are_segmented_like_others(server):
    labels = np.repeat([0, 1, 2], [11, 12, 13]).astype(np.uint8)
    colors = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)[labels]
    before = server.resident_bytes()
    for image in (np.tile(colors, (40_000, 1, 1)), np.tile(colors[:, None], (1, 40_000, 1))):
        labels_found = decoded(server.post("/v1/segment", content=encoded(image)).content)
        assert labels_found.shape == image.shape[:2]
        assert (labels_found.reshape(-1)[::999] < 3).all()
    assert server.resident_bytes() - before < 700 << 20


def test_an_image_that_the_network_would_see_too_large_is_rejected(color_path, tmp_path):
    with Served(color_path, tmp_path, "--resize", "1024x512", "--max-pixels", "300000") as server:
        for height, width, status_code in ((80, 160, 422), (100, 100, 200)):  # 512x1024 and 512x512
            response = server.post("/v1/segment", content=encoded(np.zeros((height, width, 3), np.uint8)))
            assert response.status_code == status_code
        assert "512x1024" in server.post("/v1/segment", content=encoded(np.zeros((80, 160, 3), np.uint8))).text
        assert "Traceback" not in server.log


def test_truncated_images_are_rejected(server):
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = encoded(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8), kind)
        for cut in (0, 1, 10, 33, len(whole) // 2, len(whole) - len(whole) // 8):
            response = server.post("/v1/segment", content=whole[:cut])
            assert response.status_code == 400, (kind, cut)
            assert response.json()["error"]


@pytest.mark.parametrize(
    "content",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><image href='file:///etc/passwd'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        b"%PDF-1.4\n", b"PK\x03\x04" + bytes(40), b"MZ" + bytes(200), b"#!/bin/sh\nid\n", b"II*\0" + bytes(100),
        b"\x7fELF" + bytes(60), b"P6\n2 2\n255\n" + bytes(12), b"\x00" * 5000, b"\x00\x00\x00\x0cjP  \r\n\x87\n",
    ],
    ids=["svg", "eps", "pdf", "zip", "exe", "script", "tiff", "elf", "ppm", "zeros", "jp2"],
)  # fmt: skip
def test_other_files_are_not_images(server, content):
    response = server.post("/v1/segment", content=content, headers={"Content-Type": "image/png"})
    assert response.status_code == 400
    assert "in a known format (JPEG, PNG, WEBP, BMP, GIF)" in response.json()["error"]


def test_a_polyglot_is_an_image_and_nothing_else(server):
    data, labels = stripes()
    page = b"<html><script>alert(1)</script><?php system($_GET[0]); ?></html>"
    response = server.post("/v1/segment", content=data + b"PK\x03\x04" + page)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-content-type-options"] == "nosniff"
    np.testing.assert_array_equal(decoded(response.content), labels)
    assert b"script" not in response.content


@pytest.mark.parametrize("kind", ["text/html", "application/json", "application/x-www-form", "a" * 3000, "/"])
def test_wrong_content_types_are_rejected(server, kind):
    response = server.post("/v1/segment", content=stripes()[0], headers={"Content-Type": kind})
    assert response.status_code == 415


def test_an_unknown_content_coding_is_rejected(server):
    response = server.post("/v1/segment", content=stripes()[0], headers={"Content-Encoding": "br"})
    assert response.status_code == 415
    response = server.post("/v1/segment", content=stripes()[0], headers={"Content-Encoding": "gzip"})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--x\r\n"), ("multipart/form-data; boundary=", b"--\r\n"),
        ("multipart/form-data; boundary=x", b""), ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nheaderless\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: attachment\r\n\r\na\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'),
        ("multipart/form-data; boundary=" + "y" * 5000, b"--y\r\n\r\n"),
        ("multipart/form-data; boundary=x; charset=nonsense",
         b'--x\r\nContent-Disposition: form-data; name="\xff"; filename="\xfe"\r\n\r\na\r\n--x--\r\n'),
    ],
    ids=["no boundary", "empty boundary", "empty", "text", "no headers", "no name", "no file", "long one", "chars"],
)  # fmt: skip
def test_broken_forms_are_rejected(server, kind, body):
    for path in ("/v1/segment", "/v1/segment/batch"):
        response = server.post(path, content=body, headers={"Content-Type": kind})
        assert response.status_code == 400, response.text
        assert response.json()["error"]


@pytest.mark.parametrize("charset", ["punycode", "PUNYCODE", "idna", "unicode_escape", "utf-7", "\x9b31m", ""])
def test_forms_have_the_usual_charsets(server, charset):
    # The name is well-formed punycode: of a charset that is taken, the form would be read.
    form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f-"\r\n\r\n' + stripes()[0] + b"\r\n--x--\r\n"
    kind = f'multipart/form-data; boundary=x; charset="{charset}"'
    for path in ("/v1/segment", "/v1/segment/batch"):
        response = server.post(path, content=form, headers={"Content-Type": kind.encode("latin-1")})
        assert response.status_code == 400
        assert "charset" in response.json()["error"]
        assert response.json()["error"].isprintable()


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", "us-ascii", "iso-8859-1"])
def test_usual_charsets_of_forms_are_read(server, charset):
    form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f-"\r\n\r\n' + stripes()[0] + b"\r\n--x--\r\n"
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    assert server.post("/v1/segment", content=form, headers={"Content-Type": kind}).status_code == 200


def test_too_many_files_and_fields_are_rejected(server):
    data = stripes()[0]
    many = [("images", (f"{i}.png", data)) for i in range(17)]
    assert server.post("/v1/segment/batch", files=many).status_code == 413
    assert server.post("/v1/segment", files=many[:2]).status_code == 400
    fields = {f"f{i}": "x" for i in range(50)}
    assert server.post("/v1/segment", data=fields, files=many[:1]).status_code == 400


def test_slow_senders_are_cut_off_and_others_are_served(impatient_server):
    request = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    halves = [connect(impatient_server) for _ in range(40)]
    for number, connection in enumerate(halves):
        connection.sendall(request + b"x" if number % 2 else request[:30])
    check_alive(impatient_server)
    for connection in halves:
        assert status(read_head(connection)) == 408
        connection.close()


def test_a_silent_connection_is_closed(impatient_server):
    with connect(impatient_server) as connection:
        assert status(read_head(connection)) == 408
        assert connection.recv(1) == b""


def test_slow_headers_after_a_good_request_are_cut_off_too(impatient_server):
    with connect(impatient_server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(read_head(connection)) == 200
        connection.sendall(b"GET /healthz HT")
        assert status(read_head(connection)) == 408


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../../../etc/passwd", "/v2/models/..%2f..%2fetc",
             "/v2/models/%00", "/page.js/../app.py", "//etc/passwd", "/index.html/"]
)  # fmt: skip
def test_path_like_addresses_lead_nowhere(server, path):
    response = exchange(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert status(response) == 404


def test_nothing_is_opened_for_a_request(color_path, tmp_path):
    """Neither the names clients send nor large bodies make the service touch the file system."""
    big = stripes()[0] + bytes(2 << 20)  # more than form parsers keep in memory by themselves
    with Served(color_path, tmp_path, audited=True) as server:
        data, labels = stripes()
        server.get("/metrics")
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):  # Pillow loads its parts on first use
            server.post("/v1/segment", content=encoded(np.zeros((9, 9, 3), np.uint8), kind))
        server.post("/v1/segment?view=overlay", files={"a": ("a.png", data)})
        server.post("/v1/segment", content=data, headers={"Accept": "application/json"})
        started = len(server.opened_path.read_text().splitlines())
        for name in ("/etc/passwd", "../../../../tmp/owned.png", "C:\\x.png", "a\0b.png", "x" * 5000):
            response = server.post("/v1/segment", files={"image": (name, data, "image/png")})
            if len(name) < 1000:
                np.testing.assert_array_equal(decoded(response.content), labels)
            else:
                assert response.status_code == 400
            server.post("/v1/segment/batch", files=[("images", (name, big)), ("images", (name, data))])
        server.get("/etc/passwd")
        server.get("/v2/models/..%2f..%2fetc%2fpasswd")
        opened = server.opened_path.read_text().splitlines()[started:]
    assert [line for line in opened if not line.startswith("read /proc/")] == []


def test_the_service_listens_on_this_machine_only(server):
    tables = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    listening = [line.split()[1] for line in tables.splitlines() if line.split()[3] == "0A"]
    mine = [address for address in listening if address.endswith(f":{server.port:04X}")]
    assert mine == [f"0100007F:{server.port:04X}"]


def test_memory_for_requests_is_bounded(color_path, tmp_path):
    image = encoded(np.zeros((1000, 1000, 3), np.uint8))
    with Served(color_path, tmp_path, "--max-memory", "2") as server:
        response = server.post("/v1/segment", content=image)
        assert response.status_code == 413
        assert "memory" in response.json()["error"]
        assert server.metric("internimage_request_memory_bytes") == 0
        check_alive(server)


def test_memory_that_others_hold_is_worth_waiting_for():
    budget = MemoryBudget(100)
    with budget.share("a") as first, budget.share("b") as second:
        first.take(60)
        with pytest.raises(HttpError) as error:
            second.take(60)
        assert (error.value.status, error.value.headers["Retry-After"]) == (503, "1")
        second.take(40)
    assert budget.used == 0


def test_too_many_connections_get_a_time_to_come_back_and_health_still_works(color_path, tmp_path):
    with Served(color_path, tmp_path, open_files=256) as server:
        idle = [connect(server) for _ in range(1030)]
        refused = server.post("/v1/segment", content=stripes()[0])
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "connections" in refused.json()["error"]
        assert server.get("/healthz").status_code == 200
        for connection in idle:
            connection.close()
        until(lambda: server.get("/v2").status_code == 200, "the end of the idle connections")
        check_alive(server)


def test_errors_show_no_insides(server):
    response = server.post("/v1/segment", content=b"x")
    assert "Traceback" not in response.text
    assert "/" not in json.loads(response.content)["error"].replace("and/or", "")
    assert "server" not in {name.lower() for name in response.headers}
