# SPDX-License-Identifier: Apache-2.0
"""What the two processes of a build exchange: a job one way, events the other, as one JSON object a line.

Both processes import this module, so it needs no package.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from internimage_deploy.runtime.engine.engine_backend import EngineBackend


@dataclass(frozen=True)
class ExpectedTensor:
    """What the model card says about the network's input or output, to be checked after parsing."""

    name: str
    dtype: str  # NumPy's name
    shape: tuple[int, ...]  # free sizes are -1


@dataclass(frozen=True)
class Job:
    """One compilation, as plain data."""

    backend: EngineBackend
    model: str  # path of the ONNX file to parse
    weights_beside: str  # path whose folder holds the model's external data
    output: str  # path of the engine file to write
    input: ExpectedTensor
    outputs: tuple[ExpectedTensor, ...] = ()  # empty for no check
    profiles: tuple[dict[str, tuple[int, ...]], ...] = ()  # full input shapes under "min", "opt", "max"
    flags: tuple[str, ...] = ()  # names of BuilderFlag members to set
    strongly_typed: bool = True
    workspace_mib: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: str = ""  # path, or empty for none
    plugin: str = ""  # path of the library to load before parsing, or empty for none
    embed_plugin: bool = False
    lean_options: tuple[str, ...] = ()  # the user's options that need the lean runtime, for messages
    tf32: bool = False  # let what runs in float32 multiply with TF32's 10 bits of mantissa
    share_profiles: bool = False  # set the preview feature by which execution contexts share a profile
    float32_nodes: tuple[str, ...] = ()  # nodes that a weakly typed compiler must be told to keep in float32
    tensorrt_plugins: bool = False  # register the plugins that TensorRT itself brings


@dataclass(frozen=True)
class CompilerChosen:
    """The build begins; sent by the calling process itself."""

    name: str  # such as "TensorRT 10.13.0"


@dataclass(frozen=True)
class PhaseStarted:
    """The compiler entered a phase of `steps` steps, within the phase `parent` where it is not None."""

    name: str
    parent: str | None
    steps: int


@dataclass(frozen=True)
class StepCompleted:
    """The compiler completed step number `step`, counted from 0, of a phase."""

    name: str
    step: int


@dataclass(frozen=True)
class PhaseFinished:
    """The compiler left a phase."""

    name: str


@dataclass(frozen=True)
class CompilerWarning:
    """A warning for the user."""

    text: str


@dataclass(frozen=True)
class Compiled:
    """The engine file is written. Always the last event."""

    version: str  # of the compiler
    device: str  # name of the GPU that the engine was built on, empty if none was needed
    size_bytes: int


@dataclass(frozen=True)
class Failed:
    """There is no engine: the build was cancelled, the user can change something, or there is a bug. The last event."""

    kind: Literal["cancelled", "user", "bug"]
    text: str  # the message, with a traceback for a bug


BuildEvent = CompilerChosen | PhaseStarted | StepCompleted | PhaseFinished | CompilerWarning | Compiled | Failed
_EVENTS: dict[str, type[BuildEvent]] = {
    event.__name__: event for event in (PhaseStarted, StepCompleted, PhaseFinished, CompilerWarning, Compiled, Failed)
}


def encode_event(event: BuildEvent) -> str:
    """One line of JSON, without the line break."""
    return json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})


def decode_event(line: str) -> BuildEvent:
    """The inverse of `encode_event`."""
    data = json.loads(line)
    return _EVENTS[data.pop("event")](**data)


def encode_job(job: Job) -> str:
    """One line of JSON, without the line break."""
    return json.dumps(dataclasses.asdict(job))


def decode_job(line: str) -> Job:
    """The inverse of `encode_job`."""
    data = json.loads(line)
    data["input"] = _tensor(data["input"])
    data["outputs"] = tuple(_tensor(tensor) for tensor in data["outputs"])
    data["profiles"] = tuple({bound: tuple(shape) for bound, shape in p.items()} for p in data["profiles"])
    for name in ("flags", "compute_capabilities", "lean_options", "float32_nodes"):
        data[name] = tuple(data[name])
    return Job(**data)


def _tensor(data: dict[str, object]) -> ExpectedTensor:
    shape = data["shape"]
    assert isinstance(shape, list)
    return ExpectedTensor(str(data["name"]), str(data["dtype"]), tuple(shape))
