# SPDX-License-Identifier: Apache-2.0
"""The fastest of several backends for a model on this machine, measured once and then remembered.

They differ by a factor of two either way, depending on processor and network, so no order of preference would be right
everywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from internimage_deploy.cache import cache_folder
from internimage_deploy.card import Array, ModelCard
from internimage_deploy.environment import available_cpus
from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_write
from internimage_deploy.runtime.backends.base import Backend
from internimage_deploy.runtime.backends.registry import REGISTRY, open_backend
from internimage_deploy.runtime.engine.profiles import batch_range
from internimage_deploy.runtime.imaging.pipeline import WindowChoice
from internimage_deploy.runtime.imaging.preprocess import network_input
from internimage_deploy.timing import measure

log = logging.getLogger(__name__)

_FREE_SIZE = (512, 512)  # at which models of free size are timed
_QUICK_MS = 20.0  # a network that runs within this time is not worth loading another backend for
_TIE = 0.1  # of the default's time: a backend that gains less than this does not replace it
_RUNS = 3
_SAMPLED_BYTES = 1 << 20  # of either end of the model file, see `_file_digest`


def load_fastest(
    path: Path, names: Sequence[str], *, threads: int | None = None, window: WindowChoice = None
) -> Backend:
    """Load `path` into the fastest of the backends `names`; the first one where none is faster by a tenth.

    Timings are kept in the user's cache for this model, machine, number of threads and versions of the backends; while
    they are taken, the log says so. One network is in memory at a time. The first backend must be able to load the
    file; others that cannot are left out.

    Raises:
        UserError: the first backend cannot load the file.
    """
    from filelock import FileLock

    cache = _cache_file()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.lock"):  # processes that start together, as workers do, must not time each other
            key = _key(path, names, threads)
            times = _cached_times(cache).get(key)
            if times is None or names[0] not in times:
                start = time.perf_counter()
                first = open_backend(path, names[0], threads=threads, window=window)
                times = {names[0]: _milliseconds(first)}
                if times[names[0]] <= _QUICK_MS:
                    return first
                seconds = (time.perf_counter() - start) * (len(names) - 1)
                size = "x".join(map(str, _sample_size(first.card)))
                first.close()
                log.info(
                    "timing %s for this model at %s, once; this takes about %.0f s more",
                    " and ".join(names),
                    size,
                    max(seconds, 1),
                )
                times |= _time_candidates(path, names[1:], threads, window)
                _store_times(cache, key, times)
                shown = ", ".join(f"{name} {ms:.0f} ms" for name, ms in times.items())
                log.info("%s a run at %s; from now on 'auto' takes %s", shown, size, _best(times, names[0]))
    except OSError as error:  # a home that cannot be written to
        log.debug("the backends were not timed: %s", error)
        return open_backend(path, names[0], threads=threads, window=window)
    return open_backend(path, _best(times, names[0]), threads=threads, window=window)


def forget_times() -> None:
    """Remove the cached timings of every model, so that `load_fastest` takes them again."""
    try:
        _cache_file().unlink(missing_ok=True)
    except OSError as error:
        log.warning("the cached timings stay in use: %s", error)


def sample(card: ModelCard, size: tuple[int, int] | None = None, batch: int | None = None) -> Array:
    """Network input of random noise.

    Args:
        card: of the model; its fixed sizes count.
        size: (height, width) in pixels where the model leaves it free; None for an engine's typical size, else 512x512.
        batch: number of images where the model leaves it free; None for the smallest that it takes.
    """
    height, width = _sample_size(card, size)
    rng = np.random.default_rng(0)
    count = card.batch or batch or batch_range(card, (height, width))[0]
    return network_input([rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)], card)


def _sample_size(card: ModelCard, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """The (height, width) of `sample`."""
    height, width = card.network_size
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    profiles = () if card.engine is None else card.engine.profiles
    return size or ((profiles[0]["opt"][1], profiles[0]["opt"][2]) if profiles else _FREE_SIZE)


def _time_candidates(path: Path, names: Sequence[str], threads: int | None, window: WindowChoice) -> dict[str, float]:
    """Milliseconds of a run in each backend that can load the file."""
    times = {}
    for name in names:
        try:
            backend = open_backend(path, name, threads=threads, window=window)
        except UserError as error:
            log.info("%s is left out: %s", name, error)
            continue
        times[name] = _milliseconds(backend)
        backend.close()
    return times


def _milliseconds(backend: Backend) -> float:
    batch = sample(backend.card)
    return measure({"run": lambda: backend.run(batch)}, runs=_RUNS, warmup=1)["run"].min_ms


def _best(times: Mapping[str, float], default: str) -> str:
    """The backend of the smallest time; `default` where that gains less than a tenth."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - _TIE) * times[default] else default


def _cache_file() -> Path:
    return cache_folder() / "fastest.json"


def _key(path: Path, names: Sequence[str], threads: int | None) -> str:
    parts = [_file_digest(path), platform.node(), threads or available_cpus()]
    parts += [(name, importlib.import_module(REGISTRY[name].package).__version__) for name in names]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def _file_digest(path: Path) -> str:
    """A digest of a model file's size and both ends, which is the same wherever the file lies.

    Reading all of it would take seconds for a large model. The ends tell models apart as far as their speed goes: an
    ONNX file begins with its nodes and ends with its metadata, where the card names the checkpoint and the rewrites.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLED_BYTES))
        file.seek(max(size - _SAMPLED_BYTES, 0))
        digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _cached_times(cache: Path) -> dict[str, dict[str, float]]:
    try:
        return dict(json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):  # not there yet, or damaged
        return {}


def _store_times(cache: Path, key: str, times: dict[str, float]) -> None:
    try:
        atomic_write(cache, json.dumps({**_cached_times(cache), key: times}, indent=1) + "\n")
    except UserError as error:
        log.debug("%s", error)
