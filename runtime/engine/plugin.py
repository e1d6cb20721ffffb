# SPDX-License-Identifier: Apache-2.0
"""The DCNv3 plugin library for a build: found, or built if it is not there yet."""

from __future__ import annotations

from pathlib import Path

from internimage_deploy.operators import contract
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.trt_plugins import library


def ensure(compiler: Compiler, path: Path | None = None) -> tuple[Path, str]:
    """Path and version of the plugin library for `compiler`, built first where it is absent.

    Raises:
        UserError: it is absent and cannot be built here.
    """
    return library.find_library(path, tensorrt=compiler.version, build=True), contract.PLUGIN_VERSION
