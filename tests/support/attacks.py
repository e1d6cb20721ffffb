# SPDX-License-Identifier: Apache-2.0
"""Image files that are small to send and costly to read, as an attacker would make them."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image


def segment(marker, data):
    """A JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def chunk(kind, data):
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def progressive_jpeg(side, scans):
    """A grey progressive JPEG of `side` x `side`, of scans that hold no coefficients: 42 bytes each."""
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    table = segment(0xDB, b"\0" + bytes([1] * 64))
    # one code of one bit: "end of band, for 2**14 blocks and more"
    codes = segment(0xC4, b"\x10" + bytes([1]) + bytes(15) + b"\xe0")
    direct = segment(0xC4, b"\x00" + bytes([1]) + bytes(15) + b"\x00")
    first = segment(0xDA, b"\1\1\0" + b"\0\0\0") + bytes(4)
    blocks = (side // 8) ** 2
    runs = -(-blocks // (1 << 14))
    bits = "".join("0" + "0" * 14 for _ in range(runs))  # each a run of 2**14
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = segment(0xDA, b"\1\1\0" + b"\1\x3f\0") + data
    return b"\xff\xd8" + table + frame + direct + codes + first + scan * (scans - 1) + b"\xff\xd9"


def jpeg_with(segments, side=16):
    """A small JPEG with `segments` after its start."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()[:2] + segments + file.getvalue()[2:]


def png_with(chunks, side=16):
    """A small PNG with `chunks` before its pixels."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(file, "PNG")
    data = file.getvalue()
    return data[:33] + chunks + data[33:]


def png_of_tiny_data_chunks(side=1000):
    """A PNG whose pixels come in a data chunk for each byte."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = b"".join(chunk(b"IDAT", packed[at : at + 1]) for at in range(len(packed)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def gif_with(blocks, side=16):
    """A small GIF with `blocks` before its image."""
    file = io.BytesIO()
    Image.new("L", (side, side), 90).save(file, "GIF")
    data = file.getvalue()
    start = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:start] + blocks + data[start:]


def run_length_bmp(side):
    """A BMP of runs of one pixel, which Pillow decodes in Python."""
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 2 * side * side, 0, 0, 256, 0)
    palette = b"".join(bytes([value, value, value, 0]) for value in range(256))
    pixels = (b"\1\7" * side + b"\0\0") * side + b"\0\1"
    start = 14 + len(header) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start) + header + palette + pixels


EXIF = segment(0xE1, b"Exif\0\0a")
FLOODS = {
    "scans": lambda number: progressive_jpeg(512, number),
    "Exif segments": lambda number: jpeg_with(EXIF * number),
    "APP9 segments": lambda number: jpeg_with(segment(0xE9, b"") * number),
    "JPEG comments": lambda number: jpeg_with(segment(0xFE, b"") * number),
    "JPEG fill bytes": lambda number: jpeg_with(b"\xff" * 100 * number),
    "JPEG fill bytes in the data": lambda number: jpeg_with(b"")[:-2] + b"\xff" * 100 * number + b"\xff\xd9",
    "JPEG restart markers": lambda number: jpeg_with(b"\xff\xd0" * 50 * number),
    "private PNG chunks": lambda number: png_with(chunk(b"prVt", b"") * number),
    "text PNG chunks": lambda number: png_with(chunk(b"tEXt", b"a\0b") * number),
    "GIF comments": lambda number: gif_with(b"!\xfe\1a\0" * number),
    "GIF comment blocks": lambda number: gif_with(b"!\xfe" + b"\1a" * 4 * number + b"\0"),
    "GIF junk": lambda number: gif_with(b"x" * 100 * number),
}
"""Files with `number` pieces of one kind, each of which is harmless alone."""


def grey16_png(height, width):
    """A black PNG of 16 bits."""
    return _black_png(height, width, depth=16, color=0)


def rgba_png(height, width):
    """A black, transparent PNG."""
    return _black_png(height, width, depth=8, color=6)


def bilevel_png(height, width):
    """A black PNG of one bit a pixel."""
    return _black_png(height, width, depth=1, color=0)


def _black_png(height, width, depth, color):
    channels = {0: 1, 6: 4}[color]
    pack = zlib.compressobj(9)
    row = bytes(1 + (width * depth * channels + 7) // 8)
    packed = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def post(path, body, *headers):
    """A request, compressed."""
    packed = zlib.compressobj(9, wbits=31)
    content = packed.compress(body) + packed.flush()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Encoding: gzip", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def tensor(height, width, *headers):
    """A request for the labels of a black image, as JSON."""
    size = 3 * height * width
    image = {"name": "image", "datatype": "UINT8", "shape": [1, height, width, 3]}
    outputs = [{"name": "labels", "parameters": {"binary_data": False}}]
    head = json.dumps({"inputs": [{**image, "parameters": {"binary_data_size": size}}], "outputs": outputs}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    return post("/v2/models/color/infer", head + bytes(size), length, *headers)
