# SPDX-License-Identifier: Apache-2.0
"""Entry points of the installed commands: Ctrl-C ends them without a traceback while they are being imported, too."""

from __future__ import annotations

import importlib
import signal


def main() -> None:
    """Entry point of `internimage-deploy`."""
    _run("main")


def export_onnx() -> None:
    """Entry point of `export-onnx`."""
    _run("export_onnx")


def build_engine() -> None:
    """Entry point of `build-engine`."""
    _run("build_engine")


def _run(name: str) -> None:
    """Call the function `name` of the command group's module.

    Python turns Ctrl-C into an exception, which nobody catches before that module is there. Until then there is nothing
    to tidy up either: the signal ends the process as it ends any other. Where the caller ignores the signal, as a shell
    does for a background job, it stays ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    interrupts = handler is signal.default_int_handler
    if interrupts:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    module = importlib.import_module("internimage_deploy.cli.main")
    if interrupts:
        signal.signal(signal.SIGINT, handler)
    getattr(module, name)()
