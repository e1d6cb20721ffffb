# SPDX-License-Identifier: Apache-2.0
"""The command group. A command's module, and with it the rooms it needs, loads only when it is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

import click

from internimage_deploy._version import __version__
from internimage_deploy.errors import UserError
from internimage_deploy.log import log_to_stderr

# name -> one line of help. It stands here so that listing the commands imports none of them.
COMMANDS = {
    "export-onnx": "Export a PyTorch checkpoint to a portable ONNX file.",
    "build-engine": "Compile an ONNX file into a TensorRT or TensorRT-RTX engine.",
    "build-plugin": "Compile the TensorRT plugins of DCNv3 and MSDeformAttn.",
    "segment": "Segment images, folders and videos.",
    "evaluate": "Score a model against label maps: mIoU, accuracy, IoU by class.",
    "verify": "Check a model file, and compare backends or models.",
    "info": "Show a model's card, operators, parameters and multiply-adds.",
    "serve": "Serve a model over HTTP, on this machine or a Ray cluster.",
    "export-triton": "Write a model repository for Triton Inference Server.",
    "benchmark": "Time a model on this machine.",
    "doctor": "Show what is installed, what is missing and how to install it.",
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")  # of the module, and of the command in it
        command = getattr(importlib.import_module(f"internimage_deploy.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            begun = [known for known in COMMANDS if known.startswith(name)]
            near = begun or difflib.get_close_matches(name, COMMANDS)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(COMMANDS)}"
            ctx.fail(f"No such command '{name}'; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="internimage-deploy")
def group() -> None:
    """InternImage (DCNv3) segmentation: checkpoint to ONNX, to an engine, to label maps."""


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
        if isinstance(error, click.NoSuchOption):
            _suggest_current_names(error)
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


def _suggest_current_names(error: click.NoSuchOption) -> None:
    """Name options by what --help calls them, where click suggests their hidden aliases."""
    params = error.ctx.command.params if error.ctx else []
    current = {alias: param.opts[0] for param in params for alias in getattr(param, "aliases", ())}
    if error.possibilities:
        error.possibilities[:] = dict.fromkeys(current.get(name, name) for name in error.possibilities)


def main() -> None:
    """Entry point of `internimage-deploy`."""
    run(group)


def _alone(name: str) -> None:
    def load() -> click.Command:
        command = LazyGroup().get_command(click.Context(group), name)
        assert command is not None
        return click.version_option(__version__, prog_name=name)(command)

    run(load)


def export_onnx() -> None:
    """Entry point of `export-onnx`."""
    _alone("export-onnx")


def build_engine() -> None:
    """Entry point of `build-engine`."""
    _alone("build-engine")
