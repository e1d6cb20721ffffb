# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause. Anything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations

import reprlib

_MAX_QUOTED = 80  # characters of a value that a message echoes
_MAX_REASON = 400  # characters of another program's message


class UserError(Exception):
    """The work cannot be done as asked; the message says what, got, expected and the next step.

    The command line prints it as one line and exits with 1. Control characters are shown as escapes: names of files
    and what stands in them may hold any, and a terminal would obey them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message, keep="\n\t"))

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        # Subclasses take other arguments; what crosses to another process is the message.
        return UserError, (str(self),)


class MissingDependency(UserError):
    """A package that this task needs is not installed; the message names the command that installs it.

    With `extra` that is the extra, with None the package alone, where the extras hold more than the task needs.
    """

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        wanted = package if extra is None else f"'internimage-deploy[{extra}]'"
        super().__init__(f"{purpose} needs the package '{package}', which is not installed: run  pip install {wanted}")


def one_line(error: BaseException) -> str:
    """The message of `error` on one line of bounded length, or the name of its type where it has no message."""
    return _shortened(escaped(" ".join(str(error).split())), _MAX_REASON) or type(error).__name__


def escaped(text: str, keep: str = "") -> str:
    """`text` with control characters and lone surrogates as escapes, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(char if char in keep or not _is_control(char) else ascii(char)[1:-1] for char in text)


def is_plain_text(text: str) -> bool:
    """True where `text` can be printed anywhere: it holds no control characters and no lone surrogates."""
    return text.isprintable() or not any(map(_is_control, text))


def quoted(value: object) -> str:
    """A value from a file as a message shows it: one line, bounded length, no control characters."""
    if isinstance(value, str):
        return escaped(_shortened(value, _MAX_QUOTED))
    return escaped(_shortened(_REPR.repr(value), _MAX_QUOTED))


class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print an integer of thousands of digits.
        return str(x) if x.bit_length() <= 256 else f"a number of {x.bit_length():,} bits"


_REPR = _Repr()
_REPR.maxlevel = 3


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text):,} characters)"


def _is_control(char: str) -> bool:
    code = ord(char)
    # C0, DEL and C1; line and paragraph separators and signs that turn the direction of text; surrogates
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0x2028 <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or (0xD800 <= code <= 0xDFFF)
    )
