# SPDX-License-Identifier: Apache-2.0
"""The file in which TensorRT keeps measured kernels, so that later builds are quicker.

The cache only saves time: whatever is wrong with the file, the build goes on with an empty cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_write
from internimage_deploy.runtime.engine.protocol import CompilerWarning

if TYPE_CHECKING:
    import tensorrt as trt


def load(config: trt.IBuilderConfig, path: Path) -> bool:
    """Give `config` the cache in `path`, or an empty one; returns whether it took either."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    # A cache of another version or GPU is rejected; of damaged data none can be made at all.
    return _attach(config, data) or (data != b"" and _attach(config, b""))


def save(config: trt.IBuilderConfig, path: Path, on_warning: Callable[[CompilerWarning], None]) -> None:
    """Write `config`'s cache to `path`, together with what other builds have put there in the meantime."""
    cache: trt.ITimingCache | None = config.get_timing_cache()
    if cache is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            found = path.read_bytes() if path.is_file() else b""
            other: trt.ITimingCache | None = config.create_timing_cache(found) if found else None
            if other is not None:
                cache.combine(other, False)  # leaves out what is of another version or GPU
            atomic_write(path, bytes(cache.serialize()))
    except (OSError, UserError) as error:  # the engine is done
        on_warning(CompilerWarning(f"the timing cache is not kept ({error})"))


def _attach(config: trt.IBuilderConfig, data: bytes) -> bool:
    cache: trt.ITimingCache | None = config.create_timing_cache(data)
    return cache is not None and bool(config.set_timing_cache(cache, False))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other builds from writing `path`; without file locks a build goes on, as the file is written in one step."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.with_name(path.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
