# SPDX-License-Identifier: Apache-2.0
"""Compiling an ONNX file to an engine, through the API that TensorRT 8.5 to 11 and TensorRT-RTX share.

Flags and enum members are looked up by name: TensorRT 11 renumbered them, and each version lacks some.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine import timing_cache
from internimage_deploy.runtime.engine.layer_precision import keep_float32
from internimage_deploy.runtime.engine.protocol import (
    BuildEvent,
    Compiled,
    CompilerWarning,
    ExpectedTensor,
    Job,
    PhaseFinished,
    PhaseStarted,
    StepCompleted,
)
from internimage_deploy.runtime.engine.remedies import remedy
from internimage_deploy.trt_plugins import library

if TYPE_CHECKING:
    import tensorrt as trt

OnEvent = Callable[[BuildEvent], None]


class Cancelled(Exception):
    """The user stopped the build."""


def compile_engine(api: ModuleType, job: Job, on_event: OnEvent, cancelled: threading.Event) -> Compiled:
    """Compile `job` and write the engine file.

    Args:
        api: the module `tensorrt`, or TensorRT-RTX's.
        job: what to compile.
        on_event: called with progress and warnings, from any thread.
        cancelled: stops the build soon after it is set.

    Raises:
        UserError: the model does not parse, an option is unknown to this version, or the compiler gave up.
        Cancelled: `cancelled` was set.
    """
    logger = make_logger(api, on_event)
    builder = api.Builder(logger)
    if builder is None:  # the bindings return None where the constructor failed
        raise UserError(f"the compiler does not start{_because(logger.errors, job)}")
    if job.plugin:
        library.load_library(api, Path(job.plugin))
    if job.tensorrt_plugins and not api.init_libnvinfer_plugins(logger, ""):
        raise UserError(f"TensorRT's own plugins do not load{_because(logger.errors, job)}; leave --ms-deform-attn out")
    network = builder.create_network(network_flags(api, job.strongly_typed))
    parser = api.OnnxParser(network, logger)
    on_event(PhaseStarted("Parsing", None, 1))
    parse(parser, job, logger.errors)
    on_event(PhaseFinished("Parsing"))
    _check_tensors(network, job)
    config = builder.create_builder_config()
    configure(api, builder, config, job)
    if job.float32_nodes:
        keep_float32(api, network, job.float32_nodes, node_names(job.model))
    if hasattr(api, "IProgressMonitor"):
        config.progress_monitor = make_monitor(api, on_event, cancelled)
    cache = bool(job.timing_cache) and timing_cache.load(config, Path(job.timing_cache))
    plan = builder.build_serialized_network(network, config)
    if cancelled.is_set():
        raise Cancelled
    if plan is None:
        raise UserError(failure(logger.errors, job))
    size = _write(Path(job.output), plan)
    if cache:
        timing_cache.save(config, Path(job.timing_cache), on_event)
    return Compiled(api.__version__, _device_name(job), size)


def network_flags(api: ModuleType, strongly_typed: bool) -> int:
    """The network creation flags of this version: explicit batch until 10, strong typing from 9.1 to 10 and in RTX."""
    flags = api.NetworkDefinitionCreationFlag
    value = 0
    # From 10 on explicit batch is the only kind; the flag is gone in 11.
    if hasattr(flags, "EXPLICIT_BATCH") and int(api.__version__.split(".")[0]) < 10:
        value |= 1 << int(flags.EXPLICIT_BATCH)
    if strongly_typed and hasattr(flags, "STRONGLY_TYPED"):
        value |= 1 << int(flags.STRONGLY_TYPED)
    return value


def parse(parser: trt.OnnxParser, job: Job, messages: list[str]) -> None:
    """Parse the job's model; raise `UserError` naming the node at fault."""
    if parser.parse(Path(job.model).read_bytes(), job.weights_beside):
        return
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = _error_node(error)
        text = _clean(error.desc())
        raise UserError(f"{where}{text}{remedy(text, job)}")
    raise UserError(f"the parser refused the model{_because(messages, job)}")


def configure(api: ModuleType, builder: trt.Builder, config: trt.IBuilderConfig, job: Job) -> None:
    """Set memory, effort, targets, flags and profiles. Raises `UserError` for what this version lacks."""
    if job.workspace_mib is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, job.workspace_mib << 20)
    if job.optimization_level is not None:
        _require(hasattr(config, "builder_optimization_level"), api, "--optimization-level", "8.6")
        config.builder_optimization_level = job.optimization_level
    for name in job.flags:
        _require(hasattr(api.BuilderFlag, name), api, f"the builder flag {name}", "10.0")
        config.set_flag(getattr(api.BuilderFlag, name))
    if not job.tf32:
        config.clear_flag(api.BuilderFlag.TF32)  # set by default
    if job.share_profiles:
        config.set_preview_feature(api.PreviewFeature.PROFILE_SHARING_0806, True)
    if job.compute_capabilities:
        rtx: Any = config  # TensorRT itself compiles for the GPU at hand only
        rtx.num_compute_capabilities = len(job.compute_capabilities)
        for index, target in enumerate(job.compute_capabilities):
            member = f"SM{target.replace('.', '')}"
            _require(hasattr(api.ComputeCapability, member), api, f"compute capability {target}", "1.5")
            if not rtx.set_compute_capability(getattr(api.ComputeCapability, member), index):
                raise UserError(f"the compiler refused compute capability {target}")
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        bounds: list[Any] = [shapes[bound] for bound in ("min", "opt", "max")]  # the stubs miss that tuples become Dims
        profile.set_shape(job.input.name, *bounds)
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"the compiler refused the profile {shapes}")
    if job.embed_plugin:
        _require(hasattr(config, "plugins_to_serialize"), api, "embedding the plugin", "8.6")
        config.plugins_to_serialize = [job.plugin]


def make_logger(api: Any, on_event: OnEvent) -> Any:
    """A logger that collects errors in `errors` and passes on the warnings that mean something to a user."""
    severity = api.ILogger.Severity

    class Logger(api.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, level: Any, text: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(_clean(text))
            elif level == severity.WARNING and not re.search(r"already exists, the output tensors|INT64 weights", text):
                on_event(CompilerWarning(_clean(text)))

    return Logger()


def make_monitor(api: Any, on_event: OnEvent, cancelled: threading.Event) -> Any:
    """A progress monitor that sends events, and stops the compiler once `cancelled` is set."""

    class Monitor(api.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            on_event(PhaseStarted(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            on_event(StepCompleted(phase_name, step))
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            on_event(PhaseFinished(phase_name))

    return Monitor()


def failure(messages: Iterable[str], job: Job) -> str:
    """One line about a build that failed: the node that caused it, the message, and the remedy if one is known."""
    texts = list(messages)
    nodes = node_names(job.model)
    text = texts[-1] if texts else "the compiler produced no engine and gave no reason"
    named = [name for name in nodes if name and any(name in message for message in texts)]
    where = ""
    if named:
        name = max(named, key=len)  # the longest match: names are prefixes of one another
        where = f"node {name} ({nodes[name]}): "
    return f"{where}{text}{remedy(' '.join(texts), job)}"


def node_names(model: str) -> dict[str, str]:
    """{node name: operator} of the model, to find them in messages."""
    import onnx

    return {node.name: node.op_type for node in onnx.load(model, load_external_data=False).graph.node}


def _require(available: bool, api: ModuleType, what: str, since: str) -> None:
    if not available:
        raise UserError(
            f"{what} needs version {since} or later of the compiler, this is {api.__version__}; leave it out"
        )


def _error_node(error: trt.ParserError) -> str:
    name = error.node_name() if hasattr(error, "node_name") else ""
    kind = error.node_operator() if hasattr(error, "node_operator") else ""
    if name:
        return f"node {name} ({kind}): " if kind else f"node {name}: "
    return f"node {error.node()}: " if error.node() >= 0 else ""


def _because(messages: list[str], job: Job) -> str:
    return f": {messages[-1]}{remedy(messages[-1], job)}" if messages else ""


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _tensors(network: trt.INetworkDefinition, kind: Literal["input", "output"]) -> list[ExpectedTensor]:
    count = getattr(network, f"num_{kind}s")
    tensors = [getattr(network, f"get_{kind}")(index) for index in range(count)]
    return [ExpectedTensor(tensor.name, numpy_name(tensor.dtype), tuple(tensor.shape)) for tensor in tensors]


def numpy_name(dtype: object) -> str:
    """NumPy's name for a TensorRT data type."""
    name = str(getattr(dtype, "name", dtype))
    known = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "BOOL": "bool"}
    return known.get(name, name.lower())


def _check_tensors(network: trt.INetworkDefinition, job: Job) -> None:
    """Compare the parsed network's input and output with the model card. Raises `UserError` where they differ."""
    for kind, expected in (("input", (job.input,)), ("output", job.outputs)):
        found = _tensors(network, "input" if kind == "input" else "output")
        if expected and (len(found) != len(expected) or not all(map(_agree, found, expected))):
            raise UserError(
                f"the model's {kind} is {_described(found)}, its card says {_described(expected)}; "
                "export the model again"
            )


def _agree(found: ExpectedTensor, expected: ExpectedTensor) -> bool:
    sides_agree = len(found.shape) == len(expected.shape) and all(
        -1 in pair or len(set(pair)) == 1 for pair in zip(found.shape, expected.shape, strict=True)
    )
    return (found.name, found.dtype) == (expected.name, expected.dtype) and sides_agree


def _described(tensors: Iterable[ExpectedTensor]) -> str:
    shapes = ((tensor, "x".join("free" if side < 0 else str(side) for side in tensor.shape)) for tensor in tensors)
    return ", ".join(f"{tensor.name} of {tensor.dtype} {shape}" for tensor, shape in shapes)


def _write(path: Path, plan: trt.IHostMemory) -> int:
    with path.open("wb") as file:
        file.write(plan)
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def _device_name(job: Job) -> str:
    if job.backend != "tensorrt":
        return ""
    try:
        from internimage_deploy.runtime.gpu.device import device_name

        return device_name()
    except Exception:  # only a name for people; the build must not fail for it
        return ""
