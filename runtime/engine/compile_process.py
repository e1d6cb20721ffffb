# SPDX-License-Identifier: Apache-2.0
"""The build process: reads a job from stdin, compiles it, and writes events to stdout (see `protocol`).

It is a process of its own because a compiler may end the process it runs in, and because a process can always be
stopped. It stops by itself when stdin closes, which also happens when the process that started it is gone.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.compile import Cancelled, compile_engine
from internimage_deploy.runtime.engine.compilers import load_module
from internimage_deploy.runtime.engine.protocol import BuildEvent, Failed, decode_job, encode_event


def main() -> None:
    """Compile the job on stdin."""
    # Libraries print to stdout; their text goes to stderr, and events keep a channel of their own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()
    cancelled = threading.Event()

    def send(event: BuildEvent) -> None:
        with lock:
            try:
                channel.write(encode_event(event) + "\n")
                channel.flush()
            except BrokenPipeError:
                cancelled.set()

    job = decode_job(sys.stdin.readline())

    def cancel_when_stdin_closes() -> None:
        sys.stdin.read()
        cancelled.set()

    threading.Thread(target=cancel_when_stdin_closes, daemon=True).start()
    try:
        send(compile_engine(load_module(job.backend), job, send, cancelled))
    except Cancelled:
        send(Failed("cancelled", "stopped"))
    except (UserError, ImportError, OSError) as error:
        send(Failed("user", str(error)))
    except Exception:
        send(Failed("bug", traceback.format_exc()))
    # Compilers have been seen to crash while unloading; the last event is written, so leave at once.
    os._exit(0)


if __name__ == "__main__":
    main()
