# SPDX-License-Identifier: Apache-2.0
"""The counts of each image in a file, a JSON line for each, so that an evaluation that ended early can go on.

The first line says what is evaluated; counts of another model, of other options or of other label maps are not taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from internimage_deploy.errors import UserError, one_line
from internimage_deploy.files import atomic_write, write_error

Json = Any  # what json.loads returns


class CountsFile:
    """A file of counts, open for further ones; to be used in `with`.

    Args:
        path: the file.
        subject: what is evaluated, as plain data.
        resume: take what the file holds, if there is one; without it, an older file is replaced.

    Attributes:
        records: what the file held, by the stem of the image.

    Raises:
        UserError: the file cannot be read or written, or holds counts of something else.
    """

    def __init__(self, path: Path, subject: Mapping[str, Json], *, resume: bool) -> None:
        self._path = path
        self.records: dict[str, Json] = {}
        first = json.dumps(subject)
        if resume and path.exists():
            lines = self._lines()
            if not lines or lines[0] != json.loads(first):
                differs = [name for name in subject if not lines or lines[0].get(name) != json.loads(first)[name]]
                raise UserError(
                    f"{path}: counts of another evaluation ({', '.join(differs) or 'its first line'} differs); leave "
                    "--resume out to start over"
                )
            self.records = {record["image"]: record for record in lines[1:]}
        # Written anew, for the last line of a run that was cut off may be cut off too.
        text = [first, *map(json.dumps, self.records.values())]
        atomic_write(path, "".join(line + "\n" for line in text))

    def __enter__(self) -> CountsFile:
        try:
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise write_error(self._path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, record: Json) -> None:
        """Write a record at once. Raises `UserError` if that cannot be done."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self._path, error) from error

    def _lines(self) -> list[dict[str, Json]]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._path}: cannot be read ({one_line(error)})") from error
        lines: list[dict[str, Json]] = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if not text.endswith("\n") and number == len(text.splitlines()):
                    break
                raise UserError(
                    f"{self._path}: line {number} is damaged ({one_line(error)}); leave --resume out to start over"
                ) from error
            if not isinstance(record, dict) or (lines and not isinstance(record.get("image"), str)):
                raise UserError(f"{self._path}: line {number} holds no counts; leave --resume out to start over")
            lines.append(record)
        return lines
