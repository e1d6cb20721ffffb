# SPDX-License-Identifier: Apache-2.0
"""The process that runs the network, so that whatever happens to it leaves the service standing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from internimage_deploy.errors import UserError
from internimage_deploy.log import log_to_stderr
from internimage_deploy.runtime.serving.execution import work
from internimage_deploy.runtime.serving.settings import ModelSettings

# Answering and refusing costs little and must be quick, also while the network uses every core.
_NICENESS = 2


def main(connection: Connection, model: ModelSettings, batch: int) -> None:
    """Load the model, say so, then answer batches until the other side closes the connection.

    Says ("ready", card) or ("refused", reason) once; then to each list of `NetworkImage` a list with `Labels` or an
    exception for each.
    """
    # A signal to the whole process group is for the parent: it finishes the work and closes the connection.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    log_to_stderr()
    try:
        segmenter = work.load(model, batch)
    except UserError as error:
        connection.send(("refused", str(error)))
        return
    except Exception:
        traceback.print_exc(file=sys.stderr)
        connection.send(("refused", "the model could not be loaded; the traceback is above"))
        return
    connection.send(("ready", segmenter.card))
    while True:
        try:
            items = connection.recv()
        except (EOFError, OSError):
            return
        answers = work.run_each(segmenter, items)
        try:
            connection.send(answers)
        except OSError:
            return
