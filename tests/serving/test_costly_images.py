# SPDX-License-Identifier: Apache-2.0
"""Images that cost more than their size says, decoders that hang or die, and the memory that images take."""

import asyncio
import contextlib
import gzip
import io
import json
import os
import signal
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from test_hostile import check_alive, connect

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.image_io import decode_image
from internimage_deploy.runtime.imaging.scan import check_structure
from internimage_deploy.runtime.serving.execution import decoder as decoder_module
from internimage_deploy.runtime.serving.execution.decoder import DecoderPool, Job
from internimage_deploy.runtime.serving.execution.executor import LocalExecutor
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.service import Service
from internimage_deploy.runtime.serving.settings import ModelSettings, Settings
from support import attacks
from support.served import WAIT_S, Served, decoded, encoded, stripes, until
from support.tiny_models import color_model

MIB = 1 << 20
RGB = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


@pytest.mark.parametrize("kind", attacks.FLOODS)
def test_a_flood_of_pieces_is_refused_and_a_few_are_not(server, kind):
    flood, few = attacks.FLOODS[kind](2000), attacks.FLOODS[kind](10)
    response = server.post("/v1/segment", content=flood)
    assert response.status_code == 400
    assert "cannot be read as an image (" in response.json()["error"]
    assert server.post("/v1/segment", content=few).status_code == 200
    with pytest.raises(UserError, match="save it again with a common program"):
        decode_image(flood)


def test_an_image_whose_format_takes_too_long_for_its_size_is_refused(server):
    response = server.post("/v1/segment", content=attacks.run_length_bmp(1420))
    assert response.status_code == 413
    assert "takes too long to decode" in response.json()["error"]


def test_png_data_in_tiny_chunks_is_refused(server):
    assert server.post("/v1/segment", content=attacks.png_of_tiny_data_chunks(100)).status_code == 400


@pytest.mark.parametrize(
    ("make", "number"),
    [(lambda n: attacks.jpeg_with(attacks.EXIF * n), 2_900_000), (lambda n: attacks.progressive_jpeg(4992, n), 25_000)],
    ids=["Exif segments", "scans"],
)
def test_a_small_body_that_unpacks_to_a_flood_is_refused(color_path, tmp_path, make, number):
    packed = gzip.compress(make(number))
    assert len(packed) < 100_000
    with Served(color_path, tmp_path) as server:
        response = server.post("/v1/segment", content=packed, headers={"Content-Encoding": "gzip"})
        assert response.status_code == 400
        check_alive(server)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("PNG", {"bits": 4}), ("GIF", {}), ("BMP", {}),
     ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"exif": b"Exif\0\0MM\0*"})],
)  # fmt: skip
def test_the_structure_knows_the_size(kind, options):
    structure = check_structure(encoded(RGB, kind, **options), "image")
    assert (structure.width, structure.height) == (56, 40)


def test_a_gif_whose_frame_is_larger_than_its_screen_has_the_frames_size():
    data = bytearray(encoded(RGB, "GIF"))
    data[6:10] = bytes([8, 0, 8, 0])
    structure = check_structure(bytes(data), "image")
    assert (structure.width, structure.height) == (56, 40)
    assert decode_image(bytes(data)).shape == (40, 56, 3)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


ODD_FILES = {
    "CMYK JPEG": lambda: saved(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "JPEG with a broken colour profile": lambda: saved(Image.fromarray(RGB), "JPEG", icc_profile=b"\xff" * 200_000),
    "PNG with a broken colour profile": lambda: saved(Image.fromarray(RGB), "PNG", icc_profile=b"\0" * 5000),
    "animated PNG": lambda: saved(
        Image.fromarray(RGB), "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])] * 5
    ),
    "animated WebP": lambda: saved(
        Image.fromarray(RGB), "WEBP", save_all=True, append_images=[Image.fromarray(RGB[::-1])] * 5
    ),
    "interlaced GIF": lambda: saved(Image.fromarray(RGB), "GIF", interlace=True),
    "16-bit PNG": lambda: attacks.grey16_png(40, 56),
    "run-length BMP": lambda: attacks.run_length_bmp(40),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_unusual_files_are_segmented_like_others(server, kind):
    response = server.post("/v1/segment", content=ODD_FILES[kind]())
    assert response.status_code == 200
    assert decoded(response.content).shape in ((40, 56), (40, 40))


def wrong_bmp(**changes):
    data = bytearray(encoded(RGB, "BMP"))
    for position, value in changes.items():
        data[int(position[1:]) : int(position[1:]) + 4] = value.to_bytes(4, "little", signed=True)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (wrong_bmp(_18=16_000, _22=16_000), {413}),
        (wrong_bmp(_18=4000, _22=4000), {400}),
        (wrong_bmp(_18=-56), {400, 413}),
        (wrong_bmp(_22=-(2**31)), {400, 413}),
        (wrong_bmp(_10=2**31 - 1), {400}),
        (saved(Image.fromarray(RGB), "TIFF"), {400}),
        (b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + bytes(12), {413}),
        (encoded(RGB, "WEBP")[:30], {400}),
        (b"\xff\xd8\xff\xc0\0\x0b\x08\xff\xff\xff\xff\1\1\x11\0" + b"\xff\xda", {413}),
        (attacks.jpeg_with(b"")[:-2] + b"\xff\xc0", {200, 400}),
    ],
    ids=["BMP above the limit", "BMP too short", "BMP width", "BMP height", "BMP offset", "TIFF", "WebP 16383",
         "cut WebP", "JPEG 65535", "JPEG cut at a frame"],
)  # fmt: skip
def test_wrong_headers_get_an_error(server, data, statuses):
    response = server.post("/v1/segment", content=data)
    assert response.status_code in statuses, response.text
    check_alive(server)


def test_damaged_images_of_every_kind_get_an_error_or_labels(server):
    chance = np.random.default_rng(5)
    files = [encoded(RGB, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP")] + [
        make() for make in ODD_FILES.values()
    ]
    with ThreadPoolExecutor(4) as clients:
        sent = []
        for data in files:
            for _ in range(12):
                damaged = bytearray(data)
                for position in chance.integers(0, len(data), 4):
                    damaged[position] = chance.integers(256)
                sent.append(clients.submit(server.post, "/v1/segment", content=bytes(damaged)))
        statuses = {response.result().status_code for response in sent}
    assert statuses <= {200, 400, 413}, statuses
    check_alive(server)


def with_decoders(scenario, count=2):
    async def go():
        pool = DecoderPool(count)
        pool.start()
        try:
            await asyncio.gather(*(pool.decode(job()) for _ in range(count)))
            await scenario(pool)
        finally:
            pool.close()

    asyncio.run(go())


def job(large=False, seconds=WAIT_S, image=RGB, client=""):
    pixels = image.shape[0] * image.shape[1]
    return Job(encoded(image), pixels, 100 * MIB, large, time.monotonic() + seconds, client=client)


def signal_all(pool, number):
    for decoder in pool._all:
        os.kill(decoder._process.pid, number)


async def settled(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_large_images_leave_a_decoder_to_small_ones():
    async def scenario(pool):
        signal_all(pool, signal.SIGSTOP)
        large = [asyncio.ensure_future(pool.decode(job(large=True))) for _ in range(3)]
        await settled(lambda: pool._large_running == 1 and len(pool._waiting) == 2)
        small = asyncio.ensure_future(pool.decode(job(image=RGB[:8])))
        await settled(lambda: not pool._idle)
        assert len(pool._waiting) == 2  # the large ones
        signal_all(pool, signal.SIGCONT)
        assert (await small).shape == (8, 56, 3)
        for image in await asyncio.gather(*large):
            np.testing.assert_array_equal(image, RGB)

    with_decoders(scenario)


def test_a_decoder_that_hangs_is_replaced_at_the_deadline():
    async def scenario(pool):
        before = {decoder._process.pid for decoder in pool._all}
        signal_all(pool, signal.SIGSTOP)
        with pytest.raises(HttpError) as error:
            await pool.decode(job(seconds=0.2))
        assert error.value.status == 503
        signal_all(pool, signal.SIGCONT)
        np.testing.assert_array_equal(await pool.decode(job()), RGB)
        assert len(before & {decoder._process.pid for decoder in pool._all}) == 1

    with_decoders(scenario)


def test_an_image_of_a_dead_decoder_is_decoded_by_another():
    async def scenario(pool):
        signal_all(pool, signal.SIGSTOP)
        running = asyncio.ensure_future(pool.decode(job()))
        await settled(lambda: len(pool._idle) == 1)
        (busy,) = pool._all - set(pool._idle)
        busy.kill()
        signal_all(pool, signal.SIGCONT)
        np.testing.assert_array_equal(await running, RGB)
        for process in list(pool._all):  # also those that died while idle
            os.kill(process._process.pid, signal.SIGKILL)
            process._process.wait()
        np.testing.assert_array_equal(await pool.decode(job()), RGB)

    with_decoders(scenario)


def test_an_image_that_needs_more_memory_than_it_may_is_refused_and_the_decoder_stays():
    async def scenario(pool):
        before = set(pool._all)
        black = encoded(np.zeros((6000, 6000, 3), np.uint8))
        with pytest.raises(HttpError, match="not enough memory") as error:
            await pool.decode(Job(black, 36_000_000, 1, False, time.monotonic() + WAIT_S))
        assert error.value.status == 400
        np.testing.assert_array_equal(await pool.decode(job()), RGB)
        assert set(pool._all) == before

    with_decoders(scenario)


def test_more_pixels_than_the_header_announced_are_refused():
    async def scenario(pool):
        with pytest.raises(HttpError, match="larger than its header says"):
            await pool.decode(Job(encoded(RGB), 100, 100 * MIB, False, time.monotonic() + WAIT_S))

    with_decoders(scenario)


def test_a_stopped_worker_holds_requests_until_the_deadline_and_is_replaced(color_path, tmp_path):
    with Served(color_path, tmp_path, "--deadline", "2") as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        response = server.post("/v1/segment", content=stripes()[0])
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "try again" in response.json()["error"]
        until(lambda: server.metric("internimage_worker_restarts_total") == 1, "another worker")
        until(lambda: server.get("/readyz").status_code == 200, "readiness")
        check_alive(server)


def test_stopped_processes_do_not_outlast_the_drain(color_path, tmp_path):
    """Clients get JSON, the log has no traceback, and nothing waits for what does not move."""
    with Served(color_path, tmp_path, "--deadline", WAIT_S, "--drain", "1") as server:
        children = server.workers() + server.decoders()
        os.kill(server.workers()[0], signal.SIGSTOP)
        with ThreadPoolExecutor(3) as clients:
            requests = [clients.submit(server.post, "/v1/segment", content=stripes()[0])]
            until(lambda: server.metric("internimage_batch_size_sum") == 1, "an image that runs")
            for decoder in server.decoders():
                os.kill(decoder, signal.SIGSTOP)
            requests.append(clients.submit(server.post, "/v1/segment", content=stripes()[0]))
            until(lambda: server.metric("internimage_request_memory_bytes") > 1000, "an image in a decoder")
            started = time.monotonic()
            os.kill(server.pid, signal.SIGTERM)
            for request in requests:
                response = request.result()
                assert response.status_code == 503
                assert "shutting down" in response.json()["error"]
        server.process.wait(WAIT_S)
        assert time.monotonic() - started < 30  # it was the 60 s and more that a batch may take
        assert "Traceback" not in server.log
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), "the end of its processes")


@contextlib.contextmanager
def highest_memory(server):
    """Yields a function: the highest memory so far of the service and its decoders, in bytes."""
    seen, done = [server.resident_bytes(server.pid, *server.decoders())], threading.Event()

    def watch():
        while not done.wait(0.01):
            seen.append(server.resident_bytes(server.pid, *server.decoders()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(seen)
    finally:
        done.set()
        thread.join()


COSTLY = {
    "16 bits, overlay": lambda side: (attacks.grey16_png(side, side), "?view=overlay", {}),
    "RGBA, color": lambda side: (attacks.rgba_png(side, side), "?mask=color", {}),
    "one bit, JSON": lambda side: (attacks.bilevel_png(side // 10, side * 10), "", {"Accept": "application/json"}),
    "progressive JPEG": lambda side: (attacks.progressive_jpeg(side // 8 * 8, 90), "", {}),
    "WebP": lambda side: (encoded(np.zeros((side, side, 3), np.uint8), "WEBP", method=0), "", {}),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_memory_stays_within_a_quarter_more_than_the_limit(color_path, tmp_path, kind):
    limit = 256
    body, query, headers = COSTLY[kind](2400)
    with Served(color_path, tmp_path, "--max-memory", limit, "--resize", "64x64") as server:
        for _ in range(3):
            server.post(f"/v1/segment{query}", content=stripes()[0], headers=headers)
        before = server.resident_bytes(server.pid, *server.decoders())
        with highest_memory(server) as highest, ThreadPoolExecutor(6) as clients:
            send = [
                clients.submit(server.post, f"/v1/segment{query}", content=body, headers=headers) for _ in range(12)
            ]
            statuses = {request.result().status_code for request in send}
            assert 200 in statuses
            assert statuses <= {200, 503}
            assert highest() - before < 1.25 * limit * MIB
        until(
            lambda: server.resident_bytes(server.pid, *server.decoders()) - before < limit * MIB / 4,
            "the memory's return",
        )
        assert server.metric("internimage_request_memory_bytes") == 0


def test_a_response_that_is_not_read_keeps_its_memory_counted(color_path, tmp_path):
    noise = encoded(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8))
    with Served(color_path, tmp_path, "--body-timeout", "3") as server, connect(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"POST /v1/segment?mask=color HTTP/1.1\r\nHost: x\r\nContent-Length: {len(noise)}\r\n\r\n"
        client.sendall(head.encode() + noise)
        until(lambda: server.metric("internimage_pictures_total") == 1, "the image")
        assert server.metric("internimage_request_memory_bytes") > 1500 * 1500
        until(lambda: server.metric("internimage_request_memory_bytes") == 0, "the end of the connection")


def test_each_answer_belongs_to_its_request_also_when_others_hang_up(color_path, tmp_path):
    """Two workers, images of several sizes and kinds, every fourth client leaves at once."""
    with Served(color_path, tmp_path, "--workers", "2", "--batch", "4", "--delay-ms", "2") as server:
        inputs = [stripes(24 + 8 * (seed % 4), 32 + 4 * (seed % 3), seed=seed) for seed in range(24)]

        def segment(number):
            data, labels = inputs[number % len(inputs)]
            if number % 4 == 3:
                head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                with connect(server) as client:
                    client.sendall(head + data[: len(data) // (1 + number % 3)])
                return True
            response = server.post("/v1/segment", content=data)
            if response.status_code == 503:
                return True
            return bool((decoded(response.content) == labels).all())

        with ThreadPoolExecutor(12) as clients:
            assert all(clients.map(segment, range(360)))
        check_alive(server)
        until(lambda: server.metric("internimage_request_memory_bytes") == 0, "the memory's return")
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("size", "options"),
    [(None, ("--resize", "own")), (None, ("--resize", "64x64")), ((64, 96), ())],
    ids=["own", "resized", "fixed"],
)
def test_large_images_do_no_harm_to_any_kind_of_model(tmp_path, size, options):
    model = color_model(tmp_path / "model.onnx", size=size)
    with Served(model, tmp_path, *options) as server:
        response = server.post("/v1/segment", content=attacks.rgba_png(1500, 2000))
        assert decoded(response.content).shape == (1500, 2000)
        assert server.post("/v1/segment", content=attacks.rgba_png(6000, 6000)).status_code == 413
        check_alive(server)


def test_much_json_is_read_beside_the_service(color_path, tmp_path):
    """Lists without end hold a decoder, and no longer than the deadline; everybody else is answered meanwhile."""
    flood = b"[" + b"[]," * 100_000 + b"[]]"
    image = np.repeat(RGB, 4, axis=0)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, *image.shape], "data": image.tolist()}
    plain = json.dumps({"id": "a", "inputs": [tensor]}).encode()
    assert len(plain) > 64 << 10
    with Served(color_path, tmp_path, "--name", "color", "--deadline", "2") as server:
        address = "/v2/models/color/infer"
        assert server.post(address, content=flood).status_code == 400
        response = server.post(address, content=plain).json()
        binary = {"name": "labels", "parameters": {"binary_data": True}}
        again = server.post(address, content=json.dumps({"inputs": [tensor], "outputs": [binary]}).encode())
        assert response["id"] == "a"
        assert response["outputs"][0]["shape"] == [1, 160, 56]
        assert again.content.endswith(np.array(response["outputs"][0]["data"], np.uint8).tobytes())
        for decoder in server.decoders():
            os.kill(decoder, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as client:
            stuck = client.submit(server.post, address, content=flood)
            assert server.get("/healthz").status_code == 200
            assert stuck.result().status_code == 503


def test_decoders_that_do_not_start_are_reported(color_path, monkeypatch):
    monkeypatch.setattr(decoder_module, "_MAIN", "raise SystemExit(3)  # {path!r}")
    settings = Settings(ModelSettings(color_path))
    metrics = Metrics()

    async def go():
        service = Service(settings, LocalExecutor(settings, metrics), metrics)
        try:
            with pytest.raises(UserError, match="the processes that decode images do not work"):
                await service.start()
            assert not service.ready
        finally:
            await service.close()

    asyncio.run(go())


def test_an_end_before_any_scan_hides_nothing():
    """Decoders read on behind it, into as many segments as there are."""
    start = b"\xff\xd8\xff\xc0\x00\x0b\x08\x00\x10\x00\x10\x01\x01\x11\x00\xff\xd9"
    with pytest.raises(UserError, match="segments of metadata"):
        check_structure(start + b"\xff\xe1\x00\x09Exif\0\0a" * 3000, "the image")


def test_two_colour_profiles_are_refused():
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 10)))
    check_structure(b"\x89PNG\r\n\x1a\n" + header + profile, "the image")
    with pytest.raises(UserError, match="more than one colour profile"):
        check_structure(b"\x89PNG\r\n\x1a\n" + header + 2 * profile, "the image")


def test_the_bytes_of_runs_count_as_work():
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 54, 40, 16, 16, 1, 8, 1, 0, 0, 0, 0, 0)
    small = check_structure(header + bytes(100), "the image").work
    assert check_structure(header + b"\0\2\0\0" * 975_000, "the image").work > small + 10_000_000
