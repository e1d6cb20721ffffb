# SPDX-License-Identifier: Apache-2.0
"""The pool of decoding processes: hands them images, ends those that exceed their time, replaces the dead.

Clients take turns. Large images share all processes but one, so that small ones never wait for them; an image that
looks small and takes long becomes a large one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from internimage_deploy.runtime.serving.execution import decode_process as process
from internimage_deploy.runtime.serving.execution.turns import Turns
from internimage_deploy.runtime.serving.http import inference_protocol
from internimage_deploy.runtime.serving.http_error import HttpError, overloaded

log = logging.getLogger("internimage_deploy.serving")

_ABANDONED_S = 1.0  # how long an image may still be decoded after its client has gone
_SMALL_CPU_S = 0.5  # what an image may take that is not large; usual ones take a tenth of it
_END_S = 5.0  # until a process that closed its pipe has ended
_PIPE_BYTES = 1 << 20
_MAIN = """
import sys
sys.path[:] = {path!r}
from internimage_deploy.runtime.serving.execution.decode_process import main
main()
"""


class DecoderLost(Exception):
    """The process ended before it returned an image."""


@dataclass(frozen=True)
class Job:
    """An image file to decode, or the body of a request to read.

    Attributes:
        data: the file's content, or the body.
        pixels: maximum number of pixels; the file's header has been checked against the service's limit.
        memory: bytes that decoding may take.
        large: whether it may only run where it does not keep small images waiting.
        deadline: on `time.monotonic`'s clock.
        arguments: of `inference_protocol.read_request` for the body of a request; None for an image file.
        client: whose it is.
        cost: what reading it takes, roughly, in any unit.
    """

    data: bytes | bytearray
    pixels: int
    memory: int
    large: bool
    deadline: float
    arguments: dict[str, object] | None = None
    client: str = ""
    cost: float = 1.0


@dataclass(eq=False)
class _Waiting:
    """A job that waits for a process."""

    job: Job
    due: float  # see `Turns`
    turn: asyncio.Future[Decoder] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Reply(NamedTuple):
    """What a process replies; see `decode_process.REPLY`."""

    first: int
    second: int
    content: bytearray


class Decoder:
    """One process, and the thread that talks to it."""

    def __init__(self) -> None:
        # Not multiprocessing, which would import the parent's main module there: this starts in a fraction of the time.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            _widen(pipe)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._lost = False  # its end may not show yet in `poll`

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return not self._lost and self._process.poll() is None

    @property
    def was_slow(self) -> bool:
        """True when the process has ended because a job took more CPU time than it may."""
        return process.CPU_SIGNAL is not None and self._process.poll() == -process.CPU_SIGNAL

    async def run(self, job: Job) -> Reply:
        """What the process replies. Raises `HttpError`, or `DecoderLost` when the process ends, as after `kill`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, job)

    def kill(self) -> None:
        """End the process at once; a call of `run` returns then."""
        self._lost = True
        with contextlib.suppress(OSError):
            self._process.kill()

    def discard(self) -> None:
        """End the process and free what belonged to it."""
        self.kill()
        self._process.wait()
        self._thread.shutdown(wait=False)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _exchange(self, job: Job) -> Reply:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        kind, prefix = process.IMAGE, b""
        if job.arguments is not None:
            kind, prefix = process.TENSOR, json.dumps(job.arguments).encode() + b"\n"
        try:
            left = max(job.deadline - time.monotonic(), 0.001)
            cpu_s = 0.0 if job.large else _SMALL_CPU_S
            size = len(prefix) + len(job.data)
            process.write_all(stdin, process.REQUEST.pack(kind, size, job.pixels, job.memory, left, cpu_s) + prefix)
            process.write_all(stdin, job.data)
            header = process.read_exactly(stdout, process.REPLY.size)
            if header is not None:
                kind, first, second = process.REPLY.unpack(header)
                size = first * second * 3 if kind == process.IMAGE else first + second
                content = process.read_exactly(stdout, size)
                if content is not None and kind == process.ERROR:
                    error = json.loads(content)
                    raise HttpError(error["status"], error["reason"], kind=error["kind"])
                if content is not None:
                    return Reply(first, second, content)
        except OSError as error:
            log.debug("a decoder ended: %s", error)
        self._lost = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        raise DecoderLost


class DecoderPool:
    """Decodes images, each in one of `count` processes.

    Args:
        count: number of processes, 2 or more.
    """

    def __init__(self, count: int) -> None:
        self._count = max(count, 2)
        self._idle: list[Decoder] = []
        self._all: set[Decoder] = set()
        self._waiting: list[_Waiting] = []  # by arrival
        self._turns = Turns()
        self._large_running = 0
        self._closed = False

    def start(self) -> None:
        """Start the processes; they become usable by themselves."""
        for _ in range(self._count):
            self._add()

    async def decode(self, job: Job) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB.

        Raises:
            HttpError: 400, the image cannot be read; 503, it was not decoded before its deadline.
        """
        height, width, content = await self._reply(job)
        return np.frombuffer(content, np.uint8).reshape(height, width, 3)

    async def read_request(self, job: Job) -> inference_protocol.InferRequest:
        """As `inference_protocol.read_request`. Raises `HttpError` as it does, and 503 after the deadline."""
        size, _, content = await self._reply(job)
        fields = json.loads(content[:size])
        image = np.frombuffer(content, np.uint8, offset=size).reshape(fields["shape"])
        return inference_protocol.InferRequest(fields["id"], image, fields["binary"])

    async def _reply(self, job: Job) -> Reply:
        losses = 0
        while True:
            decoder = await self._acquire(job)
            abandoned = asyncio.Event()
            running = asyncio.create_task(self._run(decoder, job, abandoned))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:  # the client has gone; the process need not start anew for that
                abandoned.set()
                raise
            except DecoderLost as error:
                if self._closed or time.monotonic() >= job.deadline:
                    late = "not decoded in time; try again"
                    raise overloaded(late, kind="deadline", retry_after_s=2) from error
                if decoder.was_slow and not job.large:
                    job = replace(job, large=True)
                    continue
                losses += 1
                if losses == 2:
                    ended = "the image or request cannot be read (its decoder ended)"
                    raise HttpError(400, ended, kind="picture") from error

    def close(self) -> None:
        """End all processes at once."""
        self._closed = True
        for decoder in self._all:
            decoder.discard()
        self._all.clear()
        self._idle.clear()

    def _add(self) -> None:
        decoder = Decoder()
        self._all.add(decoder)
        self._idle.insert(0, decoder)  # the last to get work, as it has to start first

    async def _acquire(self, job: Job) -> Decoder:
        started = time.monotonic()
        entry = _Waiting(job, self._turns.due(job.client, job.cost))
        self._waiting.append(entry)
        self._dispatch()
        try:
            # Not `wait_for`: before Python 3.12 it loses a cancellation in the moment in which the turn comes.
            await asyncio.wait({entry.turn}, timeout=max(job.deadline - started, 0.001))
        except asyncio.CancelledError:
            self._leave(entry)
            raise
        if entry.turn.done():
            return entry.turn.result()
        self._leave(entry)
        waited = f"waited {time.monotonic() - started:.1f} s to be decoded; try again"
        raise overloaded(waited, kind="deadline", retry_after_s=2)

    def _leave(self, entry: _Waiting) -> None:
        """Give back what a job has that will not be run: its place in the line, or its turn."""
        if entry.turn.done():
            self._release(entry.turn.result(), entry.job.large)
        else:
            self._waiting.remove(entry)
            self._turns.cancel(entry.job.client, entry.job.cost)

    def _dispatch(self) -> None:
        """Replace dead processes, and give idle ones to those whose turn it is."""
        for dead in [decoder for decoder in self._idle if not decoder.alive]:
            self._idle.remove(dead)
            self._all.discard(dead)
            dead.discard()
            self._add()
        while self._idle:
            room = self._large_running < self._count - 1
            may_run = [entry for entry in self._waiting if room or not entry.job.large]
            if not may_run:
                return
            entry = min(may_run, key=lambda entry: entry.due)
            self._waiting.remove(entry)
            self._turns.serve(entry.due)
            self._large_running += entry.job.large
            entry.turn.set_result(self._idle.pop())

    def _release(self, decoder: Decoder, large: bool) -> None:
        self._large_running -= large
        if not self._closed:
            self._idle.append(decoder)
            self._dispatch()

    async def _run(self, decoder: Decoder, job: Job, abandoned: asyncio.Event) -> Reply:
        work = asyncio.ensure_future(decoder.run(job))
        gone = asyncio.ensure_future(abandoned.wait())
        try:
            left = job.deadline - time.monotonic()
            await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and gone.done():
                await asyncio.wait({work}, timeout=min(_ABANDONED_S, max(job.deadline - time.monotonic(), 0)))
            if not work.done():
                log.info("a decoder took too long with an image and was replaced")
                decoder.kill()
            return await work
        except (HttpError, DecoderLost):
            if abandoned.is_set():  # nobody asks for the reason
                return Reply(0, 0, bytearray())
            raise
        finally:
            gone.cancel()
            self._release(decoder, job.large)


def _widen(pipe: IO[bytes] | None) -> None:
    """Let a pipe hold more, on Linux: each time it is full or empty costs a switch between two processes."""
    if sys.platform == "linux" and pipe is not None:
        import fcntl

        with contextlib.suppress(OSError):  # above what the system allows to one user
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
