# SPDX-License-Identifier: Apache-2.0
"""Starts the build process for a job, follows its events, and stops it without leaving anything behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.protocol import BuildEvent, Compiled, Failed, Job, decode_event, encode_job

_STOP_TIMEOUT_S = 10.0  # a compiler notices a request to stop only after its current step


class BuildFailure(RuntimeError):
    """The build process failed because of a bug; the message is its traceback."""


def compile_in_process(job: Job, on_event: Callable[[BuildEvent], None]) -> Compiled:
    """Compile `job` in a process of its own.

    Args:
        job: what to compile.
        on_event: called with every event of the build process.

    Raises:
        UserError: the model or the options are at fault, or the compiler ended its process.
        BuildFailure: the build process failed because of a bug.
        KeyboardInterrupt: Ctrl-C, or `on_event` raised it; the build has been stopped.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "internimage_deploy.runtime.engine.compile_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches this process only, which then stops the other one
        )
        last: BuildEvent | None = None
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(encode_job(job) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                last = decode_event(line)
                on_event(last)
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
        finally:
            _close(process)
        errors.seek(0)
        stderr = errors.read().decode(errors="replace")
    if isinstance(last, Compiled):
        return last
    if not isinstance(last, Failed):
        raise UserError(_crash_message(code, stderr))
    if last.kind == "cancelled":
        raise KeyboardInterrupt
    if last.kind == "bug":
        raise BuildFailure(last.text)
    raise UserError(last.text)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask the build to stop by closing its stdin; kill it if it does not."""
    _close(process, stdin_only=True)
    try:
        process.wait(_STOP_TIMEOUT_S)
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


def _crash_message(code: int, stderr: str) -> str:
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        cause += ", as when memory runs out"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    output = f"; its last output: {lines[-1]}" if lines else ""
    return f"the compiler ended its process ({cause}){output}"
