# SPDX-License-Identifier: Apache-2.0
"""The build process: reads a job from stdin, compiles, and writes events to stdout, one JSON object a line.

A process of its own because a compiler may end the process it runs in, and so that stopping it is always possible. It
stops by itself when stdin closes, which also happens when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from typing import Any

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.compile import Cancelled, compile_engine
from internimage_deploy.runtime.engine.compilers import load_module
from internimage_deploy.runtime.engine.job import DONE, FAILED, Job


def main() -> None:
    """Run the job on stdin."""
    # Libraries print to stdout; their text goes to stderr, and events keep a channel of their own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()
    cancelled = threading.Event()

    def tell(event: dict[str, Any]) -> None:
        with lock:
            try:
                channel.write(json.dumps(event) + "\n")
                channel.flush()
            except BrokenPipeError:
                cancelled.set()

    job = Job.from_json(sys.stdin.readline())

    def watch() -> None:
        sys.stdin.read()
        cancelled.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        trt = load_module("tensorrt-rtx" if job.flavour == "tensorrt-rtx" else "tensorrt")
        tell({"event": DONE, **compile_engine(trt, job, tell, cancelled)})
    except Cancelled:
        tell({"event": FAILED, "kind": "cancelled", "text": "stopped"})
    except (UserError, ImportError, OSError) as error:
        tell({"event": FAILED, "kind": "user", "text": str(error)})
    except Exception:
        tell({"event": FAILED, "kind": "bug", "text": traceback.format_exc()})
    channel.flush()
    # Compilers have been seen to crash while unloading; the result is written, so leave at once.
    os._exit(0)


if __name__ == "__main__":
    main()
