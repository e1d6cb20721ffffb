# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause. Anything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations


class UserError(Exception):
    """The work cannot be done as asked; the message says what, got, expected and the next step.

    The command line prints it as one line and exits with 1.
    """


class MissingDependency(UserError):
    """A package that this task needs is not installed; the message names the command that installs it.

    With `extra` that is the extra, with None the package alone, where the extras hold more than the task needs.
    """

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        wanted = package if extra is None else f"'internimage-deploy[{extra}]'"
        super().__init__(f"{purpose} needs the package '{package}', which is not installed: run  pip install {wanted}")


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, or the name of its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
