# SPDX-License-Identifier: Apache-2.0
"""The DCNv3 plugin library for a build: found, or built if it is not there yet."""

from __future__ import annotations

from pathlib import Path

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.compilers import Compiler


def ensure(compiler: Compiler) -> tuple[Path, str]:
    """Path and version of the plugin library for `compiler`, built first where it is absent.

    Raises:
        UserError: it is absent and cannot be built here.
    """
    try:
        from internimage_deploy.trt_plugins import library
    except ImportError as error:
        raise UserError("this installation has no DCNv3 plugin; install internimage-deploy again") from error
    return library.ensure(compiler.version)
