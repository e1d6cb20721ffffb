# SPDX-License-Identifier: Apache-2.0
"""Loading a model file into a backend, chosen by name or automatically."""

from __future__ import annotations

import logging
from pathlib import Path

from internimage_deploy.card import ModelCard
from internimage_deploy.files import require_file
from internimage_deploy.onnx_tools.model_file import read_card
from internimage_deploy.runtime.backends.base import Backend
from internimage_deploy.runtime.backends.fastest import load_fastest
from internimage_deploy.runtime.backends.registry import (
    CPU_CANDIDATES,
    REGISTRY,
    choose,
    installed,
    open_backend,
)
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.engine_backend import ENGINE_SUFFIXES
from internimage_deploy.runtime.gpu.driver import gpu_problem
from internimage_deploy.runtime.imaging.pipeline import WindowChoice

log = logging.getLogger(__name__)


def load_backend(
    path: Path,
    backend: str = "auto",
    *,
    threads: int | None = None,
    window: WindowChoice = None,
    logits: bool = False,
    trust_engine: bool = False,
    cuda_graphs: bool = True,
    device: int = 0,
) -> Backend:
    """Load `path` into `backend`. Raises `UserError` if that cannot be done.

    Args:
        path: the model file.
        backend: a name of `REGISTRY`, or "auto": the fastest here where several CPU backends are installed.
        threads: CPU threads of the network; None for all.
        window: see `LoadOptions`. Where images are cut into crops, an ONNX file that returns labels returns logits; the
            backend's card says so.
        logits: whole images are to give logits too, for test-time augmentation.
        trust_engine: allow an engine to run the code it carries (version-compatible engines, embedded plugins).
        cuda_graphs: capture an engine's launches in CUDA graphs and replay them.
        device: number of the GPU, as CUDA counts.
    """
    require_file(path, "a model file")
    if logits:  # all that a backend takes from the window is whether labels or logits are returned
        window = "slide"
    name = choose(path, backend)
    if backend == "auto" and name in CPU_CANDIDATES:
        _log_idle_gpu()
        candidates = [candidate for candidate in CPU_CANDIDATES if installed(REGISTRY[candidate])]
        if len(candidates) > 1:
            return load_fastest(path, candidates, threads=threads, window=window)
    return open_backend(
        path,
        name,
        threads=threads,
        window=window,
        trust_engine=trust_engine,
        cuda_graphs=cuda_graphs,
        device=device,
    )


def model_card(path: Path) -> ModelCard:
    """The card of a model file, ONNX or engine, without loading the model. Raises `UserError`."""
    require_file(path, "a model file")
    return sidecar.read(path) if path.suffix.lower() in ENGINE_SUFFIXES else read_card(path)


def _log_idle_gpu() -> None:
    # onnxruntime-gpu has onnxruntime's import name, so nothing else shows that the GPU is not used.
    if installed(REGISTRY["onnxruntime-cuda"]) and not gpu_problem():
        log.info("running on the CPU; --backend onnxruntime-cuda uses the GPU")
