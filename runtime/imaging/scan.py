# SPDX-License-Identifier: Apache-2.0
"""The structure of an image file, found in one pass without decoding: what would make a decoder work without end.

A decoder's time should follow from the size of the image. It does not for files of thousands of scans, or of millions
of tiny metadata segments, some of which Pillow joins in quadratic time; a few kilobytes, compressed, can hold them.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass

from internimage_deploy.errors import UserError

Buffer = bytes | bytearray | mmap.mmap

MAX_SCANS = 100
"""Scans of a JPEG file. Encoders write 1, or about 10 for a progressive one; scripts that use every bit stay below."""
MAX_SEGMENTS = 1000
"""Segments, chunks or blocks of metadata. A panorama with an embedded depth map has some 300."""
MAX_METADATA = 16 << 20
"""Bytes of metadata."""
MAX_SUBBLOCKS = 4096
"""Sub-blocks of a GIF file's extensions, of 255 bytes at most: a colour profile of a megabyte."""
MIN_DATA_CHUNK = 512
"""Mean bytes of a PNG file's data chunks, once there are more than `MAX_SEGMENTS`. Encoders write 8 KiB and more."""
_MAX_FILL = 64 << 10  # bytes of a JPEG file that mean nothing: between segments, or 0xFF again and again in the data

_STEP = 64 << 10  # searched at once, so that other threads get their turn; 3 ms where every byte may start a marker
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_IN_DATA = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # restart markers belong to the data
_SCAN, _END = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WORK_PER_RUN_BYTE = 8
_RLE_PASSES = 100  # Pillow decodes run lengths of BMP files in Python
_SCANS_PER_PASS = 20


@dataclass(frozen=True)
class Structure:
    """What a file says about itself; `width` and `height` are 0 where that could not be found.

    Attributes:
        width: in pixels.
        height: in pixels.
        passes: how often a decoder goes over the pixels, roughly, compared with a plain file.
        bytes_per_pixel: the most that decoding holds; measured with Pillow 13, which keeps colours in 4 bytes, and
            twice that while it turns an image upright.
    """

    width: int = 0
    height: int = 0
    passes: float = 1.0
    bytes_per_pixel: int = 8

    @property
    def work(self) -> float:
        """Roughly what decoding costs, in pixels of a plain file; infinite for a file of unknown size."""
        return self.width * self.height * self.passes if self.width and self.height else float("inf")


def check_structure(data: Buffer, what: str) -> Structure:
    """The structure of an image file; a file of another format, or a damaged one, is left to its decoder.

    Args:
        data: the file's content.
        what: names it in errors.

    Raises:
        UserError: more scans or metadata than `MAX_SCANS`, `MAX_SEGMENTS`, `MAX_METADATA` allow.
    """
    if data[:2] == b"\xff\xd8":
        return _Jpeg(data, what).read()
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data, what)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(data, what)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:2] == b"BM":
        return _bmp(data)
    return Structure()


class _Count:
    """Counts segments of metadata and their bytes. Raises `UserError` above the limits."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._segments = 0
        self._bytes = 0

    def add(self, size: int) -> None:
        self._segments += 1
        self._bytes += size
        if self._segments > MAX_SEGMENTS:
            raise _excess(self._what, f"more than {MAX_SEGMENTS:,} segments of metadata")
        if self._bytes > MAX_METADATA:
            raise _excess(self._what, f"more than {MAX_METADATA >> 20} MiB of metadata")


class _Jpeg:
    def __init__(self, data: Buffer, what: str) -> None:
        self._data = data
        self._what = what
        self._metadata = _Count(what)
        self._size = (0, 0)
        self._scans = 0
        self._fill = 0

    def read(self) -> Structure:
        data, position, in_data = self._data, 2, False
        while (found := self._next_marker(position, in_data)) is not None:
            marker, position = data[found + 1], found + 2
            if marker == _END and self._scans:  # before any scan, decoders read on behind it
                break
            if marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # without a length
                self._add_fill(2)
                continue
            size = int.from_bytes(data[position : position + 2], "big")
            if marker in _FRAMES:
                height, width = struct.unpack(">HH", data[position + 3 : position + 7].ljust(4, b"\0"))
                self._size = max(self._size, (width, height), key=lambda size: size[0] * size[1])
            position += max(size, 2)
            in_data = marker == _SCAN
            if in_data:
                self._scans += 1
                if self._scans > MAX_SCANS:
                    raise _excess(self._what, f"more than {MAX_SCANS} scans")
            else:
                self._metadata.add(size)
        # With several scans the coefficients of the whole image are kept, 2 bytes for each of up to 4 components.
        return Structure(*self._size, 1 + self._scans / _SCANS_PER_PASS, 16 if self._scans > 1 else 8)

    def _next_marker(self, position: int, in_data: bool) -> int | None:
        pattern = _MARKER_IN_DATA if in_data else _MARKER
        while position < len(self._data) - 1:
            found = pattern.search(self._data, position, position + _STEP + 1)
            end = found.start() if found else position + _STEP
            # Pillow hands the data to its decoder in pieces, which starts again with each at the first of such bytes.
            self._add_fill(2 * self._data[position:end].count(b"\xff\xff") if in_data else end - position)
            if found:
                return end
            position = end
        return None

    def _add_fill(self, size: int) -> None:
        self._fill += size
        if self._fill > _MAX_FILL:
            raise _excess(self._what, f"more than {_MAX_FILL >> 10} KiB that mean nothing")


def _png(data: Buffer, what: str) -> Structure:
    metadata, position, chunks, profiles = _Count(what), 8, 0, 0
    width, height = struct.unpack(">II", data[16:24].ljust(8, b"\0"))
    while len(header := data[position : position + 8]) == 8:
        size, kind = struct.unpack(">I4s", header)
        if kind == b"IEND":
            break
        if kind in (b"IDAT", b"fdAT"):
            chunks += 1
            if chunks > MAX_SEGMENTS + position // MIN_DATA_CHUNK:
                raise _excess(what, f"data chunks of less than {MIN_DATA_CHUNK} bytes")
        else:
            metadata.add(size)
            profiles += kind == b"iCCP"
            if profiles > 1:  # the format allows one; each is decompressed
                raise _excess(what, "more than one colour profile")
        position += 12 + size
    return Structure(width, height)


def _gif(data: Buffer, what: str) -> Structure:
    metadata, subblocks, fill = _Count(what), 0, 0
    width, height, flags = struct.unpack("<HHB", data[6:11].ljust(5, b"\0"))
    position = 13 + _color_table(flags)
    while (kind := data[position : position + 1]) not in (b"", b";"):
        position += 1
        if kind == b",":
            left, top, right, bottom = struct.unpack("<HHHH", data[position : position + 8].ljust(8, b"\0"))
            return Structure(max(width, left + right), max(height, top + bottom))
        if kind != b"!":  # Pillow skips it
            fill += 1
            if fill > _MAX_FILL:
                raise _excess(what, f"more than {_MAX_FILL >> 10} KiB between its blocks")
            continue
        metadata.add(0)
        position += 1
        while size := int.from_bytes(data[position : position + 1], "big"):
            subblocks += 1
            if subblocks > MAX_SUBBLOCKS:
                raise _excess(what, f"more than {MAX_SUBBLOCKS:,} blocks of metadata")
            position += 1 + size
        position += 1
    return Structure(width, height)


def _color_table(flags: int) -> int:
    """Bytes of a GIF file's colour table."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _webp(data: Buffer) -> Structure:
    kind, header = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        width, height = 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(header[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", header[6:10]))
    return Structure(width, height, 2.0, 24)


def _bmp(data: Buffer) -> Structure:
    header = data[14:34].ljust(20, b"\0")
    if int.from_bytes(header[:4], "little") == 12:
        width, height = struct.unpack("<HH", header[4:8])
        return Structure(width, height)
    width, height, _, compression = struct.unpack("<iiII", header[4:20])
    runs = compression in (1, 2)
    if not runs:
        return Structure(abs(width), abs(height))
    # Runs may hold no pixel at all, so their bytes count beside the pixels.
    passes = _RLE_PASSES + _WORK_PER_RUN_BYTE * len(data) / max(abs(width * height), 1)
    return Structure(abs(width), abs(height), passes, 12)


def _excess(what: str, content: str) -> UserError:
    return UserError(f"{what}: cannot be read as an image ({content}); save it again with a common program")
