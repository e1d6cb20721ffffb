# SPDX-License-Identifier: Apache-2.0
"""The opcodes of a pickle that hold a value themselves: numbers, texts, constants and empty containers."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable

_MAX_LONG = 1024  # bytes of an integer


class Damaged(Exception):
    """The file cannot be read; the message is the reason, for the user."""


def _integer(data: bytes) -> int:
    if len(data) > _MAX_LONG:
        raise Damaged("it holds a number of more than 1,024 bytes")
    return int.from_bytes(data, "little", signed=True)


def _integer_in_text(data: bytes) -> int | bool:
    if data in (b"00", b"01"):
        return data == b"01"
    if len(data) > _MAX_LONG:
        raise Damaged("it holds a number of more than 1,024 digits")
    return int(data.rstrip(b"L"))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _text_of_python_2(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _quoted_text(data: bytes) -> str | bytes:
    if len(data) < 2 or data[:1] != data[-1:] or data[:1] not in (b"'", b'"'):
        raise Damaged("its pickle is damaged")
    return _text_of_python_2(codecs.escape_decode(data[1:-1])[0])


# Opcodes of text: the form of the length before it, and what the bytes become.
SIZED: dict[bytes, tuple[str, Callable[[bytes], object]]] = {
    pickle.BINUNICODE: ("<I", _text),
    pickle.SHORT_BINUNICODE: ("<B", _text),
    pickle.BINUNICODE8: ("<Q", _text),
    pickle.BINSTRING: ("<i", _text_of_python_2),
    pickle.SHORT_BINSTRING: ("<B", _text_of_python_2),
    pickle.BINBYTES: ("<I", bytes),
    pickle.SHORT_BINBYTES: ("<B", bytes),
    pickle.BINBYTES8: ("<Q", bytes),
    pickle.BYTEARRAY8: ("<Q", bytearray),
    pickle.LONG1: ("<B", _integer),
    pickle.LONG4: ("<i", _integer),
}
# Opcodes whose text ends with the line.
LINES: dict[bytes, Callable[[bytes], object]] = {
    pickle.INT: _integer_in_text,
    pickle.LONG: _integer_in_text,
    pickle.FLOAT: float,
    pickle.STRING: _quoted_text,
    pickle.UNICODE: lambda line: line.decode("raw-unicode-escape"),
}
NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
EMPTY: dict[bytes, Callable[[], object]] = {
    pickle.EMPTY_DICT: dict,
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_SET: set,
    pickle.EMPTY_TUPLE: tuple,
    pickle.NONE: lambda: None,
    pickle.NEWTRUE: lambda: True,
    pickle.NEWFALSE: lambda: False,
}
