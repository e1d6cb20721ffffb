# SPDX-License-Identifier: Apache-2.0
"""Valid requests with random damage, sent as they are, and the status of each response."""

import asyncio
import json
import random
import re
import subprocess
import sys
from collections import Counter

from support.served import WAIT_S, encoded, stripes
from support.tiny_models import picture

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
)  # fmt: skip
CLIENTS = 24
WORDS = (
    b"\r\n", b"\r\n\r\n", b"\0", b"\xff", b": ", b"--x", b"--x--", b"..", b"/../", b"%00", b"%2e%2e%2f", b"\x89PNG",
    b"IHDR",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Content-Encoding: gzip\r\n", b"Accept: a/b;q=x\r\n",
    b"Content-Type: multipart/form-data; boundary=\r\n", b"Inference-Header-Content-Length: 7\r\n", b"HTTP/1.0",
    b"HTTP/9.9",
    b'{"a":', b"[[[[", b"1e999", b"-1", b"99999999999999999999", b"NaN", b"null", b'"',
    b"\xf0\x9f\x92\xa9", b"\xed\xa0\x80",
)  # fmt: skip


def seeds():
    """Valid requests as (head lines, body)."""
    image, _ = picture(24, 36)
    png, jpeg = stripes(24, 36)[0], encoded(image, "JPEG")
    form = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    one, two = form + png + b"\r\n--x--\r\n", form + png + b"\r\n" + form + jpeg + b"\r\n--x--\r\n"
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 24, 36, 3]}
    plain = json.dumps({"id": "1", "inputs": [{**tensor, "shape": [1, 2, 2, 3], "data": list(range(12))}]}).encode()
    binary = {**tensor, "parameters": {"binary_data_size": image.nbytes}}
    outputs = [{"name": "labels", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": [binary], "outputs": outputs}).encode()
    multipart = b"Content-Type: multipart/form-data; boundary=x"
    length = b"Inference-Header-Content-Length: %d" % len(header)
    chunked = b"Transfer-Encoding: chunked"
    pieces = b"".join(b"%x\r\n" % len(part) + part + b"\r\n" for part in (png[:100], png[100:])) + b"0\r\n\r\n"
    return [
        ([b"POST /v1/segment HTTP/1.1", b"Content-Type: image/png", b"Accept: image/png"], png),
        ([b"POST /v1/segment?view=overlay&alpha=0.5 HTTP/1.1", b"Content-Type: image/jpeg"], jpeg),
        ([b"POST /v1/segment HTTP/1.1", b"Accept: application/json;q=0.9, */*;q=0.1", multipart], one),
        ([b"POST /v1/segment HTTP/1.1", chunked], pieces),
        ([b"POST /v1/segment/batch HTTP/1.1", b"Accept: */*", multipart], two),
        ([b"POST /v2/models/color/infer HTTP/1.1", b"Content-Type: application/json"], plain),
        ([b"POST /v2/models/color/versions/1/infer HTTP/1.1", length], header + image.tobytes()),
        ([b"POST /v1/segment HTTP/1.1"], encoded(image, "GIF")),
        ([b"POST /v1/segment HTTP/1.1"], encoded(image, "WEBP")),
        ([b"POST /v1/segment HTTP/1.1"], encoded(image, "BMP")),
        ([b"GET / HTTP/1.1", b"Accept: text/html"], b""),
        ([b"GET /v2/models/color/versions/1/config HTTP/1.1", b"Authorization: Bearer x"], b""),
    ]


def mutations(count, seed):
    """`count` damaged requests, always the same for one `seed`."""
    chance = random.Random(seed)
    valid = seeds()
    for _ in range(count):
        head, body = chance.choice(valid)
        if body and chance.random() < 0.6:  # damage inside the body, in an intact envelope
            yield assemble(head, damage(body, chance))
        else:
            yield damage(assemble(head, body), chance)


def assemble(head, body):
    lines = [*head, b"Host: fuzz", b"Connection: close"]
    if body and not any(line.startswith(b"Transfer-Encoding") for line in head):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def damage(data, chance):
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = chance.randrange(256)
        elif kind == 2:
            del data[at : at + chance.choice((1, 2, 8, 64))]
        elif kind == 3:
            data[at:at] = chance.choice(WORDS)
        elif kind == 4:
            data[at:at] = data[at : at + chance.choice((4, 32, 256))]
        elif kind == 5:
            data[at:at] = chance.randbytes(chance.choice((1, 4, 64)))
        elif chance.random() < 0.3:
            del data[at:]
        if not data:
            data = bytearray(b"\n")
    return bytes(data)


async def _send(port, request):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        received = b""
        while not re.search(rb"^HTTP/1\.1 (?!1\d\d)\d\d\d [\s\S]*?\r\n\r\n", received, re.MULTILINE):
            piece = await asyncio.wait_for(reader.read(65536), WAIT_S)
            if not piece:
                break
            received += piece
        return received
    except ConnectionError:
        return b""
    finally:
        writer.close()


def verdict(response):
    """The status, or a word for what should never happen."""
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d\d\d)", response, re.MULTILINE)]
    final = [status for status in statuses if status >= 200]
    return final[0] if final else "no response"


async def run(port, count, seed, problems):
    """Send `count` mutations and count the verdicts. Every one that is not 2xx to 4xx is appended to `problems`."""
    verdicts = Counter()
    todo = iter(mutations(count, seed))

    async def client():
        for request in todo:
            try:
                outcome = verdict(await _send(port, request))
            except asyncio.TimeoutError:
                outcome = "silence"
            verdicts[outcome] += 1
            if not (isinstance(outcome, int) and outcome < 500):
                problems.append((outcome, request))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return verdicts


def schemathesis(url, settings, examples):
    """Run Schemathesis on the service's OpenAPI page, deterministically; returns the finished process."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", settings, "run", f"{url}/openapi.json",
               "--checks", ",".join(CHECKS),
               "--phases", "examples,coverage,fuzzing", "--max-examples", examples,
               "--generation-deterministic", "--workers", 1, "--no-color"]  # fmt: skip
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)
