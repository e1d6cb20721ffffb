# SPDX-License-Identifier: Apache-2.0
"""The worker process that runs the network, so that a crash in it leaves the service standing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.log import log_to_stderr
from internimage_deploy.runtime.serving.execution import model_runner
from internimage_deploy.runtime.serving.execution.memory import return_freed_memory
from internimage_deploy.runtime.serving.settings import ModelSettings

# HTTP responses cost little CPU time and must be quick, also while the network uses every core.
_NICENESS = 2


@dataclass(frozen=True)
class Loaded:
    """A worker's first message: the model is loaded."""

    card: ModelCard


@dataclass(frozen=True)
class LoadFailed:
    """A worker's only message: the model cannot be loaded, for a reason that is fit for people."""

    reason: str


def main(connection: Connection, model: ModelSettings) -> None:
    """Load the model, then run batches until the other side closes the connection.

    Sends `Loaded` or `LoadFailed` once; then for each list of `NetworkImage` it receives, a list with `Labels` or an
    exception for each image.
    """
    # A signal to the whole process group is for the parent: it finishes the work and closes the connection.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    log_to_stderr()
    return_freed_memory()
    try:
        segmenter = model_runner.load(model)
    except UserError as error:
        connection.send(LoadFailed(str(error)))
        return
    except Exception:
        traceback.print_exc(file=sys.stderr)
        connection.send(LoadFailed("the model could not be loaded; the traceback is above"))
        return
    connection.send(Loaded(segmenter.card))
    while True:
        try:
            images = connection.recv()
        except (EOFError, OSError):
            return
        results = model_runner.run_each(segmenter, images)
        try:
            connection.send(results)
        except OSError:
            return
