# SPDX-License-Identifier: Apache-2.0
"""Finding the compiled plugin library and loading it into a TensorRT registry."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from internimage_deploy.errors import UserError
from internimage_deploy.operators import ms_deform_attn, upsample_argmax
from internimage_deploy.operators.contract import (
    OFFICIAL_OP_TYPE,
    OP_TYPE,
    PACKED_OP_TYPE,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
)
from internimage_deploy.trt_plugins import driver
from internimage_deploy.trt_plugins.toolchain import HEADERS_SOURCE, major, serves

LIBRARY_VARIABLE = "INTERNIMAGE_DEPLOY_PLUGIN"
_WITH_OWN_HEADERS = (
    f"  internimage-deploy build-plugin --tensorrt-include DIR  with that version's headers: {HEADERS_SOURCE}"
)
CREATORS = (OP_TYPE, PACKED_OP_TYPE, OFFICIAL_OP_TYPE, ms_deform_attn.OP_TYPE, upsample_argmax.OP_TYPE)


def find_library(path: Path | None = None, *, tensorrt: str | None = None, build: bool = False) -> Path:
    """The plugin library.

    Looked for in this order: `path`, $INTERNIMAGE_DEPLOY_PLUGIN, the user's cache (of what `build-plugin` made of
    these sources the one for most GPUs, of those that run on the GPUs here; no compiler is needed for that).

    Args:
        path: The library's path, if it is known.
        tensorrt: The TensorRT version that is to load it. A library built with headers of its major version is
            preferred; without `build`, one that it can take will do.
        build: Compile the library for the GPUs of this machine if the cache has none.

    Raises:
        UserError: there is none, or it cannot be compiled; the message names the command that does.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    for candidate, source in ((path, "--plugin"), (Path(named) if named else None, LIBRARY_VARIABLE)):
        if candidate is not None:
            if not candidate.is_file():
                raise UserError(
                    f"{source}: no plugin library at {candidate}; make one with  internimage-deploy build-plugin"
                )
            return candidate.absolute()

    from internimage_deploy.trt_plugins import build as builder

    cached = builder.cached_libraries(tensorrt, gpus=driver.architectures())
    if cached:
        return cached[0]
    if build:
        return builder.build(builder.plan_for_this_machine(tensorrt))[0]
    # TensorRT from PyPI has no headers, so build-plugin takes those of another version: from 10 on they serve all.
    cached = builder.cached_libraries(tensorrt, any_headers=True)
    if cached:
        return cached[0]
    version = f" for TensorRT {tensorrt}" if tensorrt else ""
    old = tensorrt is not None and major(tensorrt) < 10
    command = _WITH_OWN_HEADERS if old else "  internimage-deploy build-plugin"
    raise UserError(f"the plugin library has not been compiled{version}: run{command}")


def built_for(library: Path) -> tuple[str, str] | None:
    """The version of the TensorRT headers that `library` was compiled with and its interface, such as ("8.6.1", "v2").

    None for a library that does not tell. The library is opened.

    Raises:
        UserError: it cannot be opened; the message is the loader's.
    """
    try:
        function = ctypes.CDLL(str(library)).internimage_plugin_built_for
    except OSError as error:
        raise UserError(f"cannot load the plugin library: {error}") from error
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    version, interface = function().decode().split()
    return version, interface


def check(library: Path, tensorrt: str) -> None:
    """Check before TensorRT does, for it would crash, that TensorRT `tensorrt` can take `library`.

    Raises:
        UserError: it cannot, or the library cannot be opened.
    """
    built = built_for(library)
    if built is None:
        raise UserError(
            f"{library} is no plugin library of this version of internimage-deploy: run  "
            "internimage-deploy build-plugin  again"
        )
    if not serves(*built, tensorrt):
        raise UserError(
            f"{library} was built with the headers of TensorRT {built[0]}, and TensorRT {tensorrt} cannot take it; run"
            + _WITH_OWN_HEADERS
        )


def find_creator(trt: ModuleType, name: str = OP_TYPE) -> Any | None:
    """The registered creator called `name`, or None. `trt`: the module tensorrt or tensorrt_rtx."""
    registry = trt.get_plugin_registry()
    # Looking in the list: asking for a creator that is not there puts an error into the user's log.
    creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
    for creator in creators:
        key = (creator.name, creator.plugin_version, creator.plugin_namespace)
        if key == (name, PLUGIN_VERSION, PLUGIN_NAMESPACE):
            return creator
    return None


def load_library(
    trt: ModuleType, path: Path | None = None, *, build: bool = False, names: Sequence[str] = CREATORS
) -> Path | None:
    """Register the plugins with TensorRT, unless they are: before parsing or deserialising anything.

    Args:
        trt: The module `tensorrt` (or `tensorrt_rtx`, whose registry takes the library though its builder does not).
        path: The library; default: see `find_library`.
        build: Compile the library if the cache has none.
        names: The plugins that are needed; a library of another version of this project may lack others.

    Returns:
        The library's path, or None if the creators had been registered before.

    Raises:
        UserError: there is no library, or it cannot be loaded; the message says why.
    """
    if all(find_creator(trt, name) is not None for name in names):
        return None
    version = classes_of(trt)
    library = find_library(path, tensorrt=version, build=build)
    registry = trt.get_plugin_registry()
    if hasattr(registry, "load_library"):
        # Opening it first gives the loader's own message (a missing library, another machine's file) if that fails.
        check(library, version)
        registry.load_library(str(library))
    else:
        _open_globally(library)
        check(library, version)
    missing = [name for name in names if find_creator(trt, name) is None]
    if missing:
        raise UserError(
            f"TensorRT {trt.__version__} did not take {', '.join(missing)} from {library}: it may have been built for "
            "another TensorRT version; run  internimage-deploy build-plugin  with this version's headers"
        )
    return library


def classes_of(trt: ModuleType) -> str:
    """The TensorRT version whose C++ classes the module `trt` has: TensorRT-RTX 1 has those of 10."""
    version: str = trt.__version__
    return "10.0" if major(version) == 1 else version


def _open_globally(library: Path) -> None:
    """TensorRT 8.5: the library registers itself when it is opened and libnvinfer's symbols are visible."""
    try:
        for name in ("libnvinfer.so.8", str(library)):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"cannot load the plugin library: {error}") from error
