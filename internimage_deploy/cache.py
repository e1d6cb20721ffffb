# SPDX-License-Identifier: Apache-2.0
"""The user's cache of compiled libraries: one file per fingerprint, built once, however many processes need it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_path, atomic_write, write_error

CACHE_VARIABLE = "INTERNIMAGE_DEPLOY_CACHE"


def cache_folder() -> Path:
    """Where compiled libraries and the like are kept: $INTERNIMAGE_DEPLOY_CACHE, else the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).absolute()
    import platformdirs  # not needed, and perhaps not there, where a folder was chosen

    return platformdirs.user_cache_path("internimage-deploy", appauthor=False)


def fingerprint(files: Iterable[Path], settings: Iterable[str]) -> str:
    """A short digest of the files' names and contents and of settings such as flags and compiler versions."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    for setting in settings:
        digest.update(setting.encode() + b"\0")
    return digest.hexdigest()[:20]


def build_once(target: Path, build: Callable[[Path], None]) -> bool:
    """Make `target` with `build(path)` unless it is there; returns whether it had to be built.

    `build` writes to the path it is given, which becomes `target` in one step. Of several processes one builds and
    the others wait for it.

    Raises:
        UserError: the folder cannot be written to, or `build` raised it.
    """
    from filelock import FileLock

    if target.is_file():
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    except OSError as error:
        raise write_error(target, error) from error
    try:
        if target.is_file():
            return False
        with atomic_path(target) as path:
            build(path)
        return True
    finally:
        lock.release()


def run_compiler(command: Sequence[str], log: Path) -> None:
    """Run one compiler command.

    Raises:
        UserError: it cannot be started, or it failed; the whole output is then in `log` and its end in the message.
    """
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror or error}") from error
    if done.returncode:
        atomic_write(log, f"{' '.join(command)}\n\n{done.stdout}")
        raise UserError(
            f"the compiler failed with exit code {done.returncode}; its complete output is in {log} and below\n"
            f"{done.stdout.strip()}"
        )


def host_compiler() -> str:
    """The C++ compiler: $CXX, else g++, clang++ or c++. Raises `UserError` if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in candidates:
        path = shutil.which(name)
        if path:
            return path
    raise UserError(
        f"no C++ compiler found (looked for {', '.join(candidates)}): install one, for example "
        "'apt install g++', or set CXX to its path"
    )
