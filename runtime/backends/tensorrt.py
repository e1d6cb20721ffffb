# SPDX-License-Identifier: Apache-2.0
"""TensorRT and TensorRT-RTX engines: one class, since the two modules share their API."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.cache import cache_folder
from internimage_deploy.card import EngineInfo
from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime.backends.base import Backend, Handle, check_output
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.compilers import load_module
from internimage_deploy.runtime.engine.operators import Flavour
from internimage_deploy.runtime.engine.profiles import Profile, Size, fitting, tensor_shape
from internimage_deploy.runtime.gpu.cuda_graph import Recorder, recorder
from internimage_deploy.runtime.gpu.device import Device, DeviceArray, PerThread
from internimage_deploy.runtime.gpu.execution_context import Lane

if TYPE_CHECKING:
    import tensorrt as trt

_EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}


class TensorRTBackend(Backend):
    """An engine on a GPU; see `Backend`.

    Each thread has execution contexts of its own. `submit` keeps two batches in flight in a thread, so that one is
    copied while the other runs; `run_on_device` takes and returns GPU arrays.
    """

    in_flight = 2

    def __init__(
        self,
        path: Path,
        flavour: Flavour,
        *,
        trust_engine: bool = False,
        cuda_graphs: bool = True,
        device: int = 0,
    ) -> None:
        """Load `path`.

        Args:
            path: an engine, with its card beside it.
            flavour: the library to load it with.
            trust_engine: let the engine run the code it carries (version-compatible engines, embedded plugins).
            cuda_graphs: record launches and replay them, where the library at hand allows it.
            device: number of the GPU.

        Raises:
            UserError: the engine, its card, the library, the GPU and the plugin do not fit together.
        """
        self.name = flavour
        self.card = sidecar.read(path)
        assert self.card.engine is not None
        info = self.card.engine
        try:
            self._api: Any = load_module(flavour)
        except ImportError as error:
            raise MissingDependency(flavour, _EXTRAS[flavour], f"running {path.name}") from error
        sidecar.check_runtime(path, info, flavour, self._api.__version__)
        self.device = Device(device)
        sidecar.check_gpu(path, info, self.device.capability, self.device.name)
        sidecar.check_plugin(path, info, available=self._plugin(path, info), trusted=trust_engine)
        self._profiles = tuple(Profile(*(_size(p[kind]) for kind in ("min", "opt", "max"))) for p in info.profiles)
        self._errors: list[str] = []
        self._logger = _logger(self._api, self._errors)
        with self.device.current():
            self._runtime = self._api.Runtime(self._logger)
            if info.plugin_embedded or info.version_compatible:
                self._runtime.engine_host_code_allowed = True
            self._engine = self._load(path)
            self._config, self._cache = self._runtime_config(cuda_graphs)
        self._recorder: Recorder | None = recorder() if cuda_graphs and flavour == "tensorrt" else None
        self._lanes = PerThread(lambda: _Lanes(self._make_lane))

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self.submit(batch)()

    def submit(self, batch: npt.NDArray[Any]) -> Handle:
        """Start a batch and return the function that waits for its answer.

        Two may be started before the first is waited for; a third waits for the first by itself.

        Raises:
            UserError: the engine was not built for this size, or the GPU's memory does not hold it.
        """
        profile = self._profile_for(tuple(batch.shape))
        lanes = self._lanes.get()
        with self._guarded():
            ticket = lanes.start(np.ascontiguousarray(batch), profile)

        def wait() -> npt.NDArray[Any]:
            with self._guarded():
                return check_output(lanes.finish(ticket), self.card, len(batch))

        return wait

    def run_on_device(self, batch: Any) -> DeviceArray:
        """Run a GPU array (PyTorch, CuPy, ...); the answer stays on the GPU and is valid until this thread's next call.

        Raises:
            UserError: not a dense GPU array of the card's type, or a size the engine was not built for.
        """
        array = DeviceArray.of(batch)
        if array.dtype != np.dtype(self.card.input.dtype):
            raise UserError(f"the GPU array holds {array.dtype}, this model takes {self.card.input.dtype}")
        profile = self._profile_for(array.shape)
        lanes = self._lanes.get()
        with self._guarded():
            answer: DeviceArray = lanes.on_device(array, profile)
        return answer

    def measure(self, batch: npt.NDArray[Any]) -> dict[str, float]:
        """Run a batch and time its parts; see `Lane.measure`. Raises like `submit`."""
        profile = self._profile_for(tuple(batch.shape))
        lanes = self._lanes.get()
        with self._guarded():
            times: dict[str, float] = lanes.measure(np.ascontiguousarray(batch), profile)
        return times

    def close(self) -> None:
        with self.device.current():
            for lanes in self._lanes.close():
                lanes.close()
            self._save_cache()
            # Contexts before the engine, the engine before the runtime: the order that the libraries ask for.
            del self._engine, self._runtime

    @contextlib.contextmanager
    def _guarded(self) -> Any:
        """The device's context; after a failure this thread starts again with new execution contexts."""
        with self.device.current():
            self._errors.clear()
            try:
                yield
            except Exception:
                self._lanes.drop()
                raise

    def _plugin(self, path: Path, info: EngineInfo) -> str:
        """Load the plugin where the engine needs one in a file of its own; its version, empty where it needs none."""
        if not info.plugin_version or info.plugin_embedded:
            return ""
        from internimage_deploy.operators import contract
        from internimage_deploy.trt_plugins import library

        try:
            library.load_library(self._api)
        except UserError as error:
            raise UserError(f"{path}: the engine needs the DCNv3 plugin; {error}") from error
        return contract.PLUGIN_VERSION

    def _load(self, path: Path) -> trt.ICudaEngine:
        data = path.read_bytes()
        if hasattr(self._runtime, "get_engine_validity"):
            validity, why = self._runtime.get_engine_validity(data[: self._runtime.engine_header_size])
            if validity == self._api.EngineValidity.INVALID:
                raise UserError(
                    f"{path}: {self.name} cannot run this engine here ({_diagnosis(self._api, why)}); build it again"
                )
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            said = f" ({self._errors[-1]})" if self._errors else ""
            raise UserError(f"{path}: {self.name} cannot load this engine{said}; build it again on this machine")
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

    def _make_lane(self) -> Lane:
        engine: Any = self._engine
        context = engine.create_execution_context(self._config) if self._config else engine.create_execution_context()
        if context is None:
            said = f": {self._errors[-1]}" if self._errors else ""
            raise UserError(f"the GPU {self.device.name} has no room for an execution context{said}")
        names = (self.card.input.name, self.card.output.name)
        return Lane(self.device, context, names, self.card.output.dtype, self._recorder, self._errors)

    def _profile_for(self, shape: tuple[int, ...]) -> int:
        """Index of the profile for an input shape."""
        sides = shape[:3] if self.card.takes_uint8 else (shape[0], *shape[2:4])
        size: Size = (sides[0], sides[1], sides[2])
        if len(shape) != 4 or shape != tensor_shape(self.card.input, size):
            raise UserError(f"got an input of {shape}, this model takes {self.card.input.shape}")
        if not self._profiles:
            if shape != self.card.input.shape:
                raise UserError(f"got an input of {shape}, this engine takes {self.card.input.shape} only")
            return 0
        index = fitting(self._profiles, size)
        if index is None:
            ranges = ", ".join(f"{_text(p.min)} to {_text(p.max)}" for p in self._profiles)
            raise UserError(
                f"the engine was built for {ranges} (batch x height x width), got {_text(size)}; "
                "resize the picture, or build again with a larger --max"
            )
        return index


class _Lanes:
    """A thread's lanes. A batch takes a lane that is free, else the one that has been busy longest.

    Lanes are made when they are first needed, so who waits for every answer uses one.
    """

    def __init__(self, make: Callable[[], Lane]) -> None:
        self._make = make
        self._lanes: list[Lane] = []
        self._busy: dict[int, int] = {}  # ticket -> lane, the longest busy first
        self._answers: dict[int, npt.NDArray[Any]] = {}  # of batches whose lane was needed again
        self._next = 0
        self._lock = threading.Lock()  # a ticket may be waited for in another thread

    def start(self, batch: npt.NDArray[Any], profile: int) -> int:
        with self._lock:
            if len(self._busy) == TensorRTBackend.in_flight:
                self._empty(next(iter(self._busy)))
            index = next(lane for lane in range(TensorRTBackend.in_flight) if lane not in self._busy.values())
            self._lane(index).start(batch, profile)
            ticket = self._next
            self._next += 1
            self._busy[ticket] = index
            return ticket

    def finish(self, ticket: int) -> npt.NDArray[Any]:
        with self._lock:
            if ticket in self._busy:
                self._empty(ticket)
            return self._answers.pop(ticket)

    def on_device(self, batch: DeviceArray, profile: int) -> DeviceArray:
        with self._lock:
            for ticket in list(self._busy):
                self._empty(ticket)
            return self._lane(0).run_on_device(batch, profile)

    def measure(self, batch: npt.NDArray[Any], profile: int) -> dict[str, float]:
        with self._lock:
            for ticket in list(self._busy):
                self._empty(ticket)
            return self._lane(0).measure(batch, profile)

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()

    def _lane(self, index: int) -> Lane:
        while len(self._lanes) <= index:
            self._lanes.append(self._make())
        return self._lanes[index]

    def _empty(self, ticket: int) -> None:
        self._answers[ticket] = self._lanes[self._busy.pop(ticket)].finish()


def load_tensorrt(path: Path, *, threads: int | None = None, **options: Any) -> TensorRTBackend:
    """Load an engine into TensorRT; `threads` has no meaning on a GPU. Raises `UserError`."""
    return TensorRTBackend(path, "tensorrt", **options)


def load_rtx(path: Path, *, threads: int | None = None, **options: Any) -> TensorRTBackend:
    """Load an engine into TensorRT-RTX; `threads` has no meaning on a GPU. Raises `UserError`."""
    return TensorRTBackend(path, "tensorrt-rtx", **options)


def _logger(api: Any, errors: list[str]) -> Any:
    from internimage_deploy.runtime.engine.compile import make_logger

    logger = make_logger(api, lambda event: None)
    logger.errors = errors
    return logger


def _diagnosis(api: Any, bits: Any) -> str:
    """The names of the reasons that are set in a bit field."""
    members = getattr(api, "EngineInvalidityDiagnostics", None)
    names = [
        name.lower().replace("_", " ")
        for name, member in (members.__members__.items() if members is not None else ())
        if int(bits) & int(member)
    ]
    return ", ".join(names) or "no reason given"


def _size(sides: tuple[int, ...]) -> Size:
    batch, height, width = sides
    return batch, height, width


def _text(size: Size) -> str:
    return "x".join(map(str, size))
