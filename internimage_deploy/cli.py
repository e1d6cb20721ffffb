# SPDX-License-Identifier: Apache-2.0
"""The command group. Subcommands live in the rooms they belong to and load only when they are called."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

import click

from internimage_deploy._version import __version__
from internimage_deploy.errors import UserError

_RUNTIME = "internimage_deploy.runtime.commands"

# name -> (module:attribute, one line of help). The help stands here so that listing commands imports nothing.
COMMANDS = {
    "export-onnx": ("internimage_deploy.exporter.command:export_onnx", "Checkpoint to portable ONNX."),
    "build-engine": (f"{_RUNTIME}.build_engine:build_engine", "ONNX to a TensorRT or TensorRT-RTX engine."),
    "build-plugin": (
        "internimage_deploy.trt_plugins.command:build_plugin",
        "Compile the DCNv3 TensorRT plugin.",
    ),
    "segment": (f"{_RUNTIME}.segment:segment", "Segment pictures, folders, videos."),
    "verify": (f"{_RUNTIME}.verify:verify", "Check a model file and compare backends."),
    "info": (f"{_RUNTIME}.info:info", "Model card, graph size, operators, multiply-adds."),
    "serve": (f"{_RUNTIME}.serve:serve", "Pictures over HTTP, here or on a Ray cluster."),
    "export-triton": (f"{_RUNTIME}.export_triton:export_triton", "A model repository for Triton Inference Server."),
    "benchmark": (f"{_RUNTIME}.benchmark:benchmark", "How long a model takes on this machine."),
    "doctor": (f"{_RUNTIME}.doctor:doctor", "What is installed, what is missing, how to install it."),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="internimage-deploy")
def group() -> None:
    """InternImage (DCNv3) segmentation: checkpoint to ONNX, to an engine, to pictures."""


def run(command: Callable[[], click.Command] | click.Command, args: Sequence[str] | None = None) -> None:
    """Run `command` and leave the process with 0 (fine), 1 (the work failed) or 2 (wrong usage); Ctrl-C gives 130."""
    log_to_stderr()
    try:
        if not isinstance(command, click.Command):
            command = command()
        code = command.main(args=None if args is None else list(args), standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away (`| head`): not a failure. Point stdout elsewhere so that exit does not fail again.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it lives until the process ends
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


def log_to_stderr() -> None:
    """Show what this package logs, from INFO on, and the warnings of others."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("internimage_deploy").setLevel(logging.INFO)


def main() -> None:
    """Entry point of `internimage-deploy`."""
    run(group)


def _alone(name: str) -> None:
    def load() -> click.Command:
        command = LazyGroup().get_command(click.Context(group), name)
        assert command is not None
        return command

    run(load)


def export_onnx() -> None:
    """Entry point of `export-onnx`."""
    _alone("export-onnx")


def build_engine() -> None:
    """Entry point of `build-engine`."""
    _alone("build-engine")
