# SPDX-License-Identifier: Apache-2.0
"""What each backend can do on this machine: run networks, build engines, or why not."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from internimage_deploy.errors import one_line
from internimage_deploy.runtime.backends.registry import REGISTRY, Entry, installed
from internimage_deploy.runtime.engine import compilers, targets
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.engine_backend import ENGINE_BACKENDS, EngineBackend


@dataclass(frozen=True)
class Availability:
    """What a backend can do here.

    Attributes:
        backend: a name of `REGISTRY`.
        run_problem: why it cannot run a network, and what would help; empty where it can.
        build_problem: why it cannot build an engine, and what would help; empty where it can, None for a backend that
            builds none.
    """

    backend: str
    run_problem: str
    build_problem: str | None = None

    @property
    def runs(self) -> bool:
        """True when the backend can run a network."""
        return not self.run_problem

    @property
    def builds(self) -> bool | None:
        """True when the backend can build an engine; None for a backend that builds none."""
        return None if self.build_problem is None else not self.build_problem


def availabilities(gpu_problem: str, compute_capabilities: Sequence[str] = ()) -> list[Availability]:
    """What every backend can do here. Nothing is loaded on a GPU, so its memory and drivers' versions are not tried.

    Args:
        gpu_problem: what `gpu_problem` of `runtime.gpu.driver` returned; empty where there is a GPU.
        compute_capabilities: of the GPUs here, such as "8.6"; empty where they are not known.
    """
    builders: dict[str, str] = {name: _build_problem(name, gpu_problem) for name in ENGINE_BACKENDS}
    return [
        Availability(name, _run_problem(name, gpu_problem, compute_capabilities), builders.get(name))
        for name in REGISTRY
    ]


def _run_problem(name: str, gpu_problem: str, compute_capabilities: Sequence[str]) -> str:
    """The GPU comes first: without one, no package would help."""
    entry = REGISTRY[name]
    is_engine = name in ENGINE_BACKENDS
    if (is_engine or entry.provider) and gpu_problem:
        return gpu_problem
    if name == "tensorrt-rtx" and compute_capabilities:
        families = [targets.unsupported_family(capability) for capability in compute_capabilities]
        if all(families):
            return f"TensorRT-RTX does not run on {families[0]} (compute capability {compute_capabilities[0]})"
    return _package_problem(entry)


def _package_problem(entry: Entry) -> str:
    install = f"run  pip install 'internimage-deploy[{entry.extra}]'"
    try:
        if not installed(entry):
            if entry.provider:
                return f"there is no onnxruntime with the {entry.provider}; {install}"
            return f"not installed; {install}"
        importlib.import_module(entry.package)
    except Exception as error:  # a damaged package can raise anything
        return f"the package '{entry.package}' does not load ({one_line(error)}); install it again"
    return ""


def _build_problem(name: EngineBackend, gpu_problem: str) -> str:
    if name == "tensorrt" and gpu_problem:
        return f"{gpu_problem}, and TensorRT compiles on the GPU that runs the engine"
    found = compilers.find(name)
    return "" if isinstance(found, Compiler) else f"{found.reason}; {found.remedy}"
