# SPDX-License-Identifier: Apache-2.0
"""TensorRT and TensorRT-RTX engines: one class, since the two modules share their API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, SupportsInt

import numpy as np

from internimage_deploy.cache import cache_folder
from internimage_deploy.card import Array, EngineInfo
from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime.backends.base import Backend, Handle, check_output
from internimage_deploy.runtime.backends.context_pool import ContextPool, PerThread
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.compilers import load_module
from internimage_deploy.runtime.engine.engine_backend import EXTRAS, EngineBackend
from internimage_deploy.runtime.engine.profiles import InputSize, Profile, best_profile, tensor_shape
from internimage_deploy.runtime.gpu.device import Device, DeviceBuffer
from internimage_deploy.runtime.gpu.device_array import DeviceArray
from internimage_deploy.runtime.gpu.execution_context import ExecutionContext

if TYPE_CHECKING:
    import tensorrt as trt

_MAX_CONTEXTS = 4  # of a thread: input shapes that keep their CUDA graphs side by side


class TensorRTBackend(Backend):
    """An engine on a GPU; see `Backend`.

    Each thread has execution contexts of its own. `submit` keeps two batches in flight in a thread, so that one is
    copied while the other runs; `run_on_device` takes and returns GPU arrays. An engine that allows one execution
    context only (see `sidecar.allows_several_contexts`) runs one batch at a time, and threads wait for each other.
    """

    def __init__(
        self,
        path: Path,
        backend: EngineBackend,
        *,
        trust_engine: bool = False,
        cuda_graphs: bool = True,
        device: int = 0,
    ) -> None:
        """Load `path`.

        Args:
            path: an engine, with its card beside it.
            backend: the library to load it with.
            trust_engine: allow the engine to run the code it carries (version-compatible engines, embedded plugins).
            cuda_graphs: capture launches in CUDA graphs and replay them, where the libraries allow it.
            device: number of the GPU.

        Raises:
            UserError: the engine, its card, the library, the GPU and the plugin do not fit together.
        """
        self.name = backend
        self.card = sidecar.read(path)
        assert self.card.engine is not None
        info = self.card.engine
        try:
            self._api = load_module(backend)
        except ImportError as error:
            raise MissingDependency(backend, EXTRAS[backend], f"running {path.name}") from error
        sidecar.check_runtime(path, info, backend, self._api.__version__)
        self.device = Device(device)
        sidecar.check_gpu(path, info, self.device.capability, self.device.name)
        self._errors: list[str] = []
        self._logger = _logger(self._api, self._errors)
        sidecar.check_plugin(path, info, available=self._plugin(path, info), trusted=trust_engine)
        self._profiles = tuple(
            Profile(*(_input_size(p[kind]) for kind in ("min", "opt", "max"))) for p in info.profiles
        )
        with self.device.current():
            self._runtime = self._api.Runtime(self._logger)
            if info.plugin_embedded or info.version_compatible:
                self._runtime.engine_host_code_allowed = True
            self._engine = self._load(path)
            self._config, self._cache = self._runtime_config(cuda_graphs)
        self._cuda_graphs = cuda_graphs
        self._shared = not sidecar.allows_several_contexts(info)
        self.in_flight = 1 if self._shared else 2
        self._pools = PerThread(self._make_pool)
        self._shared_pool = self._make_pool()
        self._outputs = PerThread(lambda: DeviceBuffer(self.device))  # of `run_on_device` with the shared pool

    def run(self, batch: Array) -> Array:
        return self.submit(batch)()

    def submit(self, batch: Array) -> Handle:
        """Start a batch and return the function that waits for its output.

        `in_flight` batches run at a time in a thread; starting one more waits for the first.

        Raises:
            UserError: the engine was not built for this size, or the GPU's memory does not hold it.
        """
        profile = self._profile_for(tuple(batch.shape))
        pool = self._pool()
        with self._guarded(pool):
            number = pool.start(np.ascontiguousarray(batch), profile)

        def wait() -> Array:
            with self._guarded(pool):
                return check_output(pool.finish(number), self.card, len(batch))

        return wait

    def run_on_device(self, batch: object, *, stream: int | None = None) -> DeviceArray:
        """Run a GPU array (PyTorch, CuPy, ...); the output stays on the GPU and is valid until this thread's next call.

        Args:
            batch: the array.
            stream: handle of the CUDA stream that the caller works on (PyTorch: `torch.cuda.current_stream()
                .cuda_stream`). The run is ordered there like any kernel, and the CPU does not wait. Without it the call
                returns when the output is ready.

        Raises:
            UserError: not a dense array of the card's type on this backend's GPU, or a size the engine was not built
                for.
        """
        array = DeviceArray.of(batch, self.device.index, stream)
        if array.dtype != np.dtype(self.card.input.dtype):
            raise UserError(f"the GPU array holds {array.dtype}, this model takes {self.card.input.dtype}")
        profile = self._profile_for(array.shape)
        pool = self._pool()
        output = self._outputs.get() if self._shared else None
        with self._guarded(pool), pool.idle(array.shape) as context:
            return context.run_on_device(array, profile, output=output, stream=stream)

    def measure(self, batch: Array) -> dict[str, float]:
        """Run a batch and time its parts; see `ExecutionContext.measure`. Raises like `submit`."""
        profile = self._profile_for(tuple(batch.shape))
        pool = self._pool()
        with self._guarded(pool), pool.idle(tuple(batch.shape)) as context:
            return context.measure(np.ascontiguousarray(batch), profile)

    def close(self) -> None:
        with self.device.current():
            for pool in (*self._pools.clear(), self._shared_pool):
                pool.close()
            for output in self._outputs.clear():
                output.free()
            self._save_cache()
            # The libraries require this order: contexts before the engine, the engine before the runtime.
            del self._engine, self._runtime

    def _pool(self) -> ContextPool:
        return self._shared_pool if self._shared else self._pools.get()

    def _make_pool(self) -> ContextPool:
        limit = _MAX_CONTEXTS if self._cuda_graphs and not self._shared else self.in_flight
        return ContextPool(self._create_context, in_flight=self.in_flight, limit=limit, has_room=self._has_room)

    def _has_room(self) -> bool:
        """True when one more execution context would leave half of the GPU's free memory."""
        engine: Any = self._engine
        size = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", None) or 0
        return 2 * int(size) <= self.device.memory()[0]

    @contextlib.contextmanager
    def _guarded(self, pool: ContextPool) -> Iterator[None]:
        """Make the device's context current; after a failure the pool begins anew, with new execution contexts."""
        with self.device.current():
            self._errors.clear()
            try:
                yield
            except Exception:
                pool.close()
                raise

    def _plugin(self, path: Path, info: EngineInfo) -> str:
        """Load the plugin library if the engine needs one; returns its version, empty where the engine needs none."""
        if not info.plugin_version or info.plugin_embedded:
            return ""
        from internimage_deploy.operators import contract
        from internimage_deploy.trt_plugins import library

        beside = sidecar.plugin_beside(path, info)
        try:
            # Cards of before `plugins` do not say which; then it is every one that this version knows.
            needed = [name for name in info.plugins if name in library.CREATORS] or library.CREATORS
            library.load_library(self._api, beside, names=needed)
        except UserError as error:
            missing = "" if beside or not info.plugin_file else f", and {info.plugin_file} is not beside it"
            raise UserError(f"{path}: the engine needs the plugin library{missing}; {error}") from error
        # The engine may use TensorRT's own plugins too (build-engine --ms-deform-attn tensorrt).
        self._api.init_libnvinfer_plugins(self._logger, "")
        return contract.PLUGIN_VERSION

    def _load(self, path: Path) -> trt.ICudaEngine:
        data = path.read_bytes()
        if hasattr(self._runtime, "get_engine_validity"):
            validity, diagnosis = self._runtime.get_engine_validity(data[: self._runtime.engine_header_size])
            if validity == self._api.EngineValidity.INVALID:
                reasons = _reasons(self._api, diagnosis)
                raise UserError(f"{path}: {self.name} cannot run this engine here ({reasons}); build it again")
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            reason = f" ({self._errors[-1]})" if self._errors else ""
            raise UserError(f"{path}: {self.name} cannot load this engine{reason}; build it again on this machine")
        return engine

    def _runtime_config(self, cuda_graphs: bool) -> tuple[Any, Any]:
        """TensorRT-RTX's settings and its cache of compiled kernels, None and None for TensorRT."""
        if self.name != "tensorrt-rtx":
            return None, None
        engine: Any = self._engine
        config = engine.create_runtime_config()
        strategy = self._api.CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategy.DISABLED
        cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            cache.deserialize(self._cache_path().read_bytes())
        config.set_runtime_cache(cache)
        return config, cache

    def _cache_path(self) -> Path:
        assert self.card.engine is not None
        key = f"{self.card.engine.sha256[:16]}-{self.device.capability}-{self._api.__version__}"
        return cache_folder() / "runtime" / f"{key}.cache"

    def _save_cache(self) -> None:
        from internimage_deploy.files import atomic_write

        if self._cache is not None:
            path = self._cache_path()
            with contextlib.suppress(OSError, UserError):  # it only saves time
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, bytes(self._cache.serialize()))

    def _create_context(self) -> ExecutionContext:
        engine: Any = self._engine
        context = engine.create_execution_context(self._config) if self._config else engine.create_execution_context()
        if context is None:
            reason = f": {self._errors[-1]}" if self._errors else ""
            raise UserError(f"the GPU {self.device.name} has too little memory for an execution context{reason}")
        names = (self.card.input.name, self.card.output.name)
        captures_itself = self.name == "tensorrt-rtx"
        return ExecutionContext(
            self.device,
            context,
            names,
            self.card.output.dtype,
            self._cuda_graphs and not captures_itself,
            self._errors,
            has_profiles=bool(self._profiles),
            binds_arrays=not self._cuda_graphs,
        )

    def _profile_for(self, shape: tuple[int, ...]) -> int:
        """Index of the profile for an input shape. Raises `UserError` if the engine was not built for it."""
        sides = shape[:3] if self.card.takes_uint8 else (shape[0], *shape[2:4])
        size: InputSize = (sides[0], sides[1], sides[2])
        if len(shape) != 4 or shape != tensor_shape(self.card.input, size):
            raise UserError(f"got an input of {shape}, this model takes {self.card.input.shape}")
        if not self._profiles:
            if shape != self.card.input.shape:
                raise UserError(f"got an input of {shape}, this engine takes {self.card.input.shape} only")
            return 0
        index = best_profile(self._profiles, size)
        if index is None:
            ranges = ", ".join(f"{_text(p.min)} to {_text(p.max)}" for p in self._profiles)
            raise UserError(
                f"the engine was built for {ranges} (batch x height x width), got {_text(size)}; "
                "resize the image, or build again with a larger --max"
            )
        return index


def load_tensorrt(
    path: Path,
    *,
    threads: int | None = None,
    trust_engine: bool = False,
    cuda_graphs: bool = True,
    device: int = 0,
) -> TensorRTBackend:
    """Load an engine into TensorRT; `threads` has no effect on a GPU. Raises `UserError`."""
    return TensorRTBackend(path, "tensorrt", trust_engine=trust_engine, cuda_graphs=cuda_graphs, device=device)


def load_rtx(
    path: Path,
    *,
    threads: int | None = None,
    trust_engine: bool = False,
    cuda_graphs: bool = True,
    device: int = 0,
) -> TensorRTBackend:
    """Load an engine into TensorRT-RTX; `threads` has no effect on a GPU. Raises `UserError`."""
    return TensorRTBackend(path, "tensorrt-rtx", trust_engine=trust_engine, cuda_graphs=cuda_graphs, device=device)


def _logger(api: ModuleType, errors: list[str]) -> Any:
    from internimage_deploy.runtime.engine.compile import make_logger

    logger = make_logger(api, lambda event: None)
    logger.errors = errors
    return logger


def _reasons(api: ModuleType, bits: SupportsInt) -> str:
    """The names of the reasons that are set in a bit field."""
    members = getattr(api, "EngineInvalidityDiagnostics", None)
    names = [
        name.lower().replace("_", " ")
        for name, member in (members.__members__.items() if members is not None else ())
        if int(bits) & int(member)
    ]
    return ", ".join(names) or "no reason given"


def _input_size(sides: tuple[int, ...]) -> InputSize:
    batch, height, width = sides
    return batch, height, width


def _text(size: InputSize) -> str:
    return "x".join(map(str, size))
