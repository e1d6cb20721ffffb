# SPDX-License-Identifier: Apache-2.0
"""Execution contexts, CUDA graphs, GPU arrays and failures of the GPU, on the stand-ins for TensorRT and CUDA."""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from internimage_deploy import Segmenter
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.gpu import dlpack
from internimage_deploy.runtime.gpu.device import Device, DeviceError
from internimage_deploy.runtime.gpu.device_array import DeviceArray
from internimage_deploy.runtime.gpu.execution_context import ExecutionContext
from support import fake_cuda
from support.engine_stand_in import stand_in_engine
from support.tiny_models import color_model, picture


@pytest.fixture
def gpu():
    return fake_cuda.make_driver()


@pytest.fixture
def load(monkeypatch, tmp_path, gpu):
    """Build and load an engine on the stand-ins, up to a size; returns the `Segmenter` and the module `tensorrt`."""

    def load(*largest, size=None, graphs=True, device=0, **options):
        profiles = {} if size else {"min": ((1, 32, 32),) * len(largest), "max": largest}
        model = color_model(tmp_path / "m.onnx", size=size, batch=1 if size else None)
        options = {"gpu": gpu, **options}
        path, trt = stand_in_engine(monkeypatch, model, **profiles, **options)
        return Segmenter.load(path, cuda_graphs=graphs, device=device), trt

    return load


def images(seed, side=64):
    return np.random.default_rng(seed).integers(0, 256, (1, side, side, 3), np.uint8)


def logits(batch):
    """What `color_model` returns: means of 4x4 pixels."""
    _, height, width, _ = batch.shape
    return batch.reshape(1, height // 4, 4, width // 4, 4, 3).mean((2, 4), dtype=np.float32).transpose(0, 3, 1, 2)


def content(array):
    """What lies at the address of a GPU array, which is host memory here."""
    raw = (ctypes.c_uint8 * array.nbytes).from_address(array.address)
    return np.frombuffer(raw, array.dtype).reshape(array.shape).copy()


class Foreign:
    """Another library's array on the GPU, which a stream of its own still computes."""

    def __init__(self, gpu, batch, *, offset=0, **changes):
        handle = ctypes.c_void_p()
        gpu.cuStreamCreate(ctypes.byref(handle), 1)
        self.stream, self.changes, self.shape = handle.value, changes, batch.shape
        self._memory = np.zeros(batch.nbytes + 512, np.uint8)
        start = -self._memory.ctypes.data % 256 + offset
        self.view = self._memory[start : start + batch.nbytes].reshape(batch.shape)
        fake_cuda.STREAMS[self.stream].put(lambda: np.copyto(self.view, batch))

    @property
    def __cuda_array_interface__(self):
        interface = {
            "shape": self.shape,
            "typestr": "|u1",
            "data": (self.view.ctypes.data, False),
            "version": 3,
            "stream": self.stream,
        }
        return interface | self.changes


# Execution contexts and profiles


def test_each_thread_has_its_own_contexts(load):
    segmenter, trt = load((1, 128, 128))
    barrier = threading.Barrier(4)

    def work(index):
        barrier.wait()
        image, expected = picture(32 + 32 * (index % 3), 64)
        return all(np.array_equal(segmenter(image).labels, expected) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4
    assert len(trt.contexts) == 4


@pytest.mark.parametrize(
    ("version", "sharing", "contexts"),
    [("8.5.3", False, 1), ("8.6.1", False, 1), ("8.6.1", True, 2), ("10.13.0", False, 2)],
    ids=["8.5", "8.6 without profile sharing", "8.6 with it", "10"],
)
def test_execution_contexts_that_a_version_allows(version, sharing, contexts, load, monkeypatch):
    """Where a second one would be refused, batches run one at a time, and threads wait for each other."""
    segmenter, trt = load((2, 128, 128), version=version, card={"profile_sharing": sharing}, embed_plugin=False)
    monkeypatch.setattr(trt, "__version__", version)
    if version.startswith("8"):
        object.__setattr__(segmenter.backend._engine, "_sharing", sharing)
    many = [picture(64, 64 + 32 * (index % 2)) for index in range(6)]
    for found, (_, expected) in zip(segmenter([image for image, _ in many]), many, strict=True):
        np.testing.assert_array_equal(found.labels, expected)
    waits = [segmenter.backend.submit(images(seed)) for seed in range(4)]
    for seed, wait in reversed(list(enumerate(waits))):
        np.testing.assert_allclose(wait(), logits(images(seed)), rtol=1e-5)
    # Every size that alternates keeps a context, where there may be more than one.
    assert len(trt.contexts) >= contexts if contexts > 1 else len(trt.contexts) == 1

    def work(index):
        image, expected = many[index]
        return all(np.array_equal(segmenter(image).labels, expected) for _ in range(5))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [True] * 3
    if contexts == 1:
        assert len(trt.contexts) == 1
    segmenter.close()


def test_the_only_context_leaves_each_thread_its_output_on_the_gpu(load):
    segmenter, _ = load((1, 64, 64), version="8.5.3", embed_plugin=False, graphs=False)
    outputs = {}
    turn = threading.Barrier(2)

    def work(index):
        batch = images(index)
        outputs[index] = segmenter.backend.run_on_device(DeviceArray(batch.ctypes.data, batch.shape, np.uint8, batch))
        turn.wait(60)
        return content(outputs[index])

    with ThreadPoolExecutor(2) as pool:
        for index, found in enumerate(pool.map(work, range(2))):
            np.testing.assert_allclose(found, logits(images(index)), rtol=1e-5)
    segmenter.close()


def test_an_engine_without_profiles_is_not_given_one(load):
    segmenter, trt = load(size=(64, 64), version="8.5.3", embed_plugin=False)
    waits = [segmenter.backend.submit(images(seed)) for seed in range(3)]
    for seed, wait in enumerate(waits):
        np.testing.assert_allclose(wait(), logits(images(seed)), rtol=1e-5)
    assert ("IExecutionContext", "set_optimization_profile_async") not in trt.used
    assert len(trt.contexts) == 2


def test_a_gpu_without_room_for_a_second_context_runs_on_one(load):
    segmenter, trt = load((1, 64, 64))
    create = trt.ICudaEngine._create_execution_context
    trt.ICudaEngine._create_execution_context = lambda self, *a: None if trt.contexts else create(self, *a)
    waits = [segmenter.backend.submit(images(seed)) for seed in range(4)]
    for seed, wait in enumerate(waits):
        np.testing.assert_allclose(wait(), logits(images(seed)), rtol=1e-5)
    assert len(trt.contexts) == 1


def test_contexts_for_more_sizes_leave_the_gpu_room(load, gpu):
    segmenter, trt = load((1, 256, 256))
    object.__setattr__(segmenter.backend._engine, "device_memory_size_v2", gpu.memory // 2)
    for side in (64, 96, 128, 64, 96, 128):
        image, expected = picture(side, side)
        np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert len(trt.contexts) == 2  # those that overlap, and none for a third size


# CUDA graphs


def test_graphs_are_captured_once_and_replayed(load, gpu):
    segmenter, trt = load((1, 128, 128))
    image, expected = picture(64, 64)
    for _ in range(5):
        np.testing.assert_array_equal(segmenter(image).labels, expected)
    # The first run is a plain one, the second captures, the others replay.
    assert (gpu.captured, gpu.launched, sum(context.runs for context in trt.contexts)) == (1, 4, 2)
    assert [context.bound for context in trt.contexts] == [2]  # addresses that did not change are not set again
    segmenter.close()
    assert gpu.freed == 1


def test_alternating_sizes_keep_their_graphs(load, gpu):
    """Each size has an execution context of its own, as NVIDIA advises; the least used makes room for one too many."""
    segmenter, trt = load((1, 256, 256))
    pictures = [picture(side, 64) for side in (64, 96, 128, 160, 192)]
    for _ in range(4):
        for image, expected in pictures[:4]:
            np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert (len(trt.contexts), gpu.captured, gpu.launched, gpu.freed) == (4, 4, 12, 0)
    for image, expected in (pictures[4], pictures[1], pictures[4], pictures[0]):
        np.testing.assert_array_equal(segmenter(image).labels, expected)
    # The fifth size took the context of the first, whose graph went; then the first took that of the third.
    assert (len(trt.contexts), gpu.captured, gpu.freed) == (4, 5, 2)
    segmenter.close()
    assert (gpu.freed, gpu.open, gpu.used, gpu.pinned) == (5, set(), 0, 0)


def test_a_size_that_cannot_be_captured_leaves_the_other_its_graph(load, gpu):
    gpu.capturable = lambda number: number == 1
    segmenter, _ = load((1, 128, 128))
    for side in (64, 64, 96, 96, 96, 64, 64):
        image, expected = picture(side, side)
        np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert (gpu.captures, gpu.captured, gpu.launched) == (2, 1, 3)  # the failed capture is not tried again


@pytest.mark.parametrize("version", ["8.5.3", "10.13.0"])
def test_one_execution_context_captures_again_after_another_size(version, monkeypatch, tmp_path, gpu):
    model = color_model(tmp_path / "m.onnx")
    options = {"min": (1, 32, 32), "max": (1, 128, 128), "embed_plugin": False}
    path, trt = stand_in_engine(monkeypatch, model, version=version, gpu=gpu, **options)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(path.read_bytes())
    device = Device()
    with device.current():
        context = ExecutionContext(device, engine.create_execution_context(), ("image", "logits"), "float32", True, [])
        for seed, side in enumerate((64, 64, 64, 96, 96, 64, 64)):
            context.start(images(seed, side), 0)
            np.testing.assert_allclose(context.finish(), logits(images(seed, side)), rtol=1e-5)
        assert (gpu.captured, gpu.freed) == (3, 2)
        context.close()
    assert (gpu.freed, gpu.open, gpu.used, gpu.pinned) == (3, set(), 0, 0)


def test_what_cannot_be_captured_runs_without_graphs(load, gpu):
    gpu.capturable = lambda number: False
    segmenter, _ = load((1, 128, 128))
    image, expected = picture(64, 64)
    for _ in range(3):
        np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert (gpu.captures, gpu.launched) == (1, 0)


def test_a_call_that_fails_while_it_is_captured(load, gpu):
    """The stream stops capturing, and what was captured until then is freed."""
    segmenter, trt = load((1, 64, 64))
    good = trt.IExecutionContext._execute_async_v3
    trt.IExecutionContext._execute_async_v3 = lambda self, stream_handle: (
        fake_cuda.STREAMS[stream_handle].captured is None and good(self, stream_handle)
    )
    image, expected = picture(64, 64)
    for _ in range(3):
        np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert (gpu.captured, gpu.launched) == (1, 0)
    assert not any(kind in ("graph", "executable") for kind, _ in gpu.open)


def test_graphs_can_be_switched_off(load, gpu):
    segmenter, _ = load((1, 64, 64), graphs=False)
    for _ in range(3):
        segmenter(picture(64, 64)[0])
    assert gpu.captures == 0


# Arrays on the GPU


@pytest.mark.parametrize("graphs", [False, True])
def test_arrays_on_the_gpu_stay_there(graphs, load, gpu):
    segmenter, _ = load((1, 64, 64), graphs=graphs)
    for seed in range(4):
        array = Foreign(gpu, images(seed))
        output = segmenter.backend.run_on_device(array)
        np.testing.assert_allclose(content(output), logits(images(seed)), rtol=1e-5)
        interface = output.__cuda_array_interface__
        assert (interface["shape"], interface["typestr"], interface["version"]) == ((1, 3, 16, 16), "<f4", 3)
        assert interface["stream"] is None  # ready
    assert "cuCtxSynchronize" not in gpu.calls  # the stream of the array is waited for, on the GPU
    # Without graphs the array is read where it lies; a graph reads the address that it was captured with.
    assert gpu.copies == ["DtoD"] * 4 * graphs
    assert gpu.captured == graphs
    with pytest.raises(UserError, match="the GPU array holds float32, this model takes uint8"):
        segmenter.backend.run_on_device(Foreign(gpu, images(0), typestr="<f4"))


def test_an_array_at_an_address_that_tensorrt_refuses_is_copied(load, gpu):
    segmenter, _ = load((1, 64, 64), graphs=False)
    output = segmenter.backend.run_on_device(Foreign(gpu, images(0), offset=3))
    np.testing.assert_allclose(content(output), logits(images(0)), rtol=1e-5)
    assert gpu.copies == ["DtoD"]


def test_an_array_that_tells_no_stream_is_waited_for(load, gpu):
    segmenter, _ = load((1, 64, 64), graphs=False)
    output = segmenter.backend.run_on_device(Foreign(gpu, images(0), version=2, stream=None))
    np.testing.assert_allclose(content(output), logits(images(0)), rtol=1e-5)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_callers_stream_orders_the_run_without_the_cpu(graphs, load, gpu):
    segmenter, _ = load((1, 64, 64), graphs=graphs)
    array = Foreign(gpu, images(0))
    first = segmenter.backend.run_on_device(array, stream=array.stream)
    assert not content(first).any()  # nothing has run yet: the CPU did not wait
    kept = np.empty_like(content(first))
    stream = fake_cuda.STREAMS[array.stream]
    stream.put(lambda: np.copyto(kept, content(first)))
    stream.put(lambda: np.copyto(array.view, images(1)))
    second = segmenter.backend.run_on_device(array, stream=array.stream)  # overwrites the first output
    assert second.__cuda_array_interface__["stream"] == array.stream
    stream.synchronize()
    np.testing.assert_allclose(kept, logits(images(0)), rtol=1e-5)
    np.testing.assert_allclose(content(second), logits(images(1)), rtol=1e-5)


def test_an_output_that_is_not_ready_is_ordered_before_its_dlpack_reader(load, gpu):
    segmenter, _ = load((1, 64, 64), graphs=False)
    array = Foreign(gpu, images(0))
    output = segmenter.backend.run_on_device(array, stream=array.stream)
    output.__dlpack__(stream=2)
    fake_cuda.STREAMS[2].synchronize()
    np.testing.assert_allclose(content(output), logits(images(0)), rtol=1e-5)


class ByDlpack(Foreign):
    """As PyTorch: `__dlpack__` orders the array's stream before the one that it is told, and before none by itself."""

    __cuda_array_interface__ = None

    def __dlpack_device__(self):
        return dlpack.CUDA, 0

    def __dlpack__(self, *, stream=-1):
        self.told = stream
        if stream != -1:
            fake_cuda.STREAMS[stream].put(fake_cuda.STREAMS[self.stream].synchronize)
        return dlpack.export_array(self.view.ctypes.data, self.shape, np.uint8, (dlpack.CUDA, 0), self)


def test_dlpack_arrays_are_ready_on_the_stream_that_reads_them(load, gpu):
    segmenter, _ = load((1, 64, 64), graphs=False)
    array = ByDlpack(gpu, images(0))
    output = segmenter.backend.run_on_device(array)
    assert array.told == 1  # the default stream
    np.testing.assert_allclose(content(output), logits(images(0)), rtol=1e-5)
    array, own = ByDlpack(gpu, images(1)), Foreign(gpu, images(0)).stream
    output = segmenter.backend.run_on_device(array, stream=own)
    assert array.told == own
    fake_cuda.STREAMS[own].synchronize()
    np.testing.assert_allclose(content(output), logits(images(1)), rtol=1e-5)


# Several GPUs


def test_arrays_on_another_gpu_are_rejected(load, gpu):
    gpu.devices = 2
    segmenter, _ = load((1, 64, 64))
    array = Foreign(gpu, images(0))
    gpu.elsewhere[array.view.ctypes.data] = 1
    with pytest.raises(UserError, match=r"the GPU array is on GPU 1, and the model on GPU 0; copy .* with device=1$"):
        segmenter.backend.run_on_device(array)
    far = SimpleNamespace(__dlpack__=lambda **_: pytest.fail("exported"), __dlpack_device__=lambda: (2, 1))
    with pytest.raises(UserError, match="the GPU array is on GPU 1, and the model on GPU 0"):
        segmenter.backend.run_on_device(far)


def test_a_model_on_the_second_gpu(load, gpu):
    gpu.devices = 2
    segmenter, _ = load((1, 64, 64), device=1)
    array = Foreign(gpu, images(0))
    gpu.elsewhere[array.view.ctypes.data] = 1
    output = segmenter.backend.run_on_device(array)
    gpu.elsewhere[output.address] = 1
    assert output.__dlpack_device__() == (2, 1)
    np.testing.assert_allclose(content(output), logits(images(0)), rtol=1e-5)


# Failures


@pytest.mark.parametrize("pycuda", [True, False])
def test_pycuda_is_used_where_it_is_and_not_needed(pycuda, monkeypatch, tmp_path, gpu):
    path, _ = stand_in_engine(monkeypatch, color_model(tmp_path / "m.onnx"), gpu=gpu, pycuda=pycuda, max=(1, 64, 64))
    segmenter = Segmenter.load(path)
    image, expected = picture(64, 64)
    np.testing.assert_array_equal(segmenter(image).labels, expected)
    if pycuda:
        import pycuda.driver as module

        assert module.allocations == 4  # input and output, on the GPU and on the host
    segmenter.close()
    assert (gpu.used, gpu.pinned, gpu.open, gpu.stack) == (0, 0, set(), [])


@pytest.mark.parametrize("pycuda", [True, False])
@pytest.mark.parametrize("call", ["cuMemAlloc_v2", "cuMemcpyHtoDAsync_v2", "cuEventSynchronize"])
def test_an_error_that_ends_the_context_says_so(call, pycuda, load, gpu):
    segmenter, _ = load((1, 64, 64), pycuda=pycuda)
    gpu.failing[call] = 700
    with pytest.raises(DeviceError, match="an illegal memory access was encountered") as caught:
        segmenter.backend.run(images(0))
    assert (caught.value.code, caught.value.sticky) == (700, True)
    assert gpu.stack == []
    segmenter.close()  # frees what it can, without another error


def test_tensorrts_failure_gets_the_code_of_the_gpu(load, gpu):
    segmenter, trt = load((1, 64, 64))
    trt.IExecutionContext._execute_async_v3 = lambda self, stream_handle: setattr(gpu, "dead", 719) or False
    with pytest.raises(DeviceError, match="execute_async_v3 failed on Stand-in GPU") as caught:
        segmenter.backend.run(images(0))
    assert caught.value.sticky


def test_a_failure_frees_what_belonged_to_the_contexts(load, gpu):
    """Graphs, events, streams and page-locked memory too, while the error and its traceback are kept."""
    segmenter, _ = load((1, 64, 64))
    backend = segmenter.backend
    for seed in range(3):
        backend.run(images(seed))
    lost = backend.submit(images(0))
    gpu.failing["cuMemcpyHtoDAsync_v2"] = 999
    with pytest.raises(DeviceError) as caught:
        backend.submit(images(1))
    assert (caught.value.code, caught.value.sticky) == (999, False)
    assert (gpu.used, gpu.pinned, gpu.open, gpu.freed) == (0, 0, set(), 1)
    with pytest.raises(DeviceError, match="the batch was lost when another one failed on the GPU"):
        lost()
    gpu.failing.clear()
    np.testing.assert_allclose(backend.run(images(2)), logits(images(2)), rtol=1e-5)  # as usable as before


def test_no_gpu_of_that_number(monkeypatch, tmp_path, gpu):
    path, _ = stand_in_engine(monkeypatch, color_model(tmp_path / "m.onnx"), gpu=gpu, max=(1, 64, 64))
    with pytest.raises(UserError, match="no GPU number 3: this machine has 1"):
        load_backend(path, device=3)
