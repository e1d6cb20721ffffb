# SPDX-License-Identifier: Apache-2.0
"""Runs a job in the build process, follows its events, and stops it without leaving anything behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.job import DONE, FAILED, Job

_PATIENCE_S = 10.0  # a compiler may be in the middle of a long step when it is asked to stop


class BuildFailure(RuntimeError):
    """The build process failed in a way that is a bug; carries its traceback."""


def run(job: Job, follow: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compile `job`; `follow` gets every progress and log event.

    Returns:
        The facts that `compile.compile_engine` returns.

    Raises:
        UserError: the model or the options are at fault, or the compiler ended its process.
        KeyboardInterrupt: Ctrl-C; the build has been stopped.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "internimage_deploy.runtime.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C must reach this process alone, which then stops the other in order
        )
        last: dict[str, Any] = {}
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(job.to_json() + "\n")
            process.stdin.flush()
            for line in process.stdout:
                last = json.loads(line)
                follow(last)
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
        finally:
            _close(process)
        errors.seek(0)
        noise = errors.read().decode(errors="replace")
    if last.get("event") == DONE:
        return last
    if last.get("event") != FAILED:
        raise UserError(_crash(code, noise))
    if last["kind"] == "cancelled":
        raise KeyboardInterrupt
    if last["kind"] == "bug":
        raise BuildFailure(last["text"])
    raise UserError(last["text"])


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask the build to stop by closing its stdin, then make it."""
    _close(process, stdin_only=True)
    try:
        process.wait(_PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _close(process: subprocess.Popen[str], stdin_only: bool = False) -> None:
    for stream in (process.stdin, None if stdin_only else process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue


def _crash(code: int, noise: str) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        how += ", as when memory runs out"
    lines = [line.strip() for line in noise.splitlines() if line.strip()]
    said = f"; it said: {lines[-1]}" if lines else ""
    return f"the compiler ended its process ({how}){said}"
