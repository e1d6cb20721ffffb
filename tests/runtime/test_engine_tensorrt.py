# SPDX-License-Identifier: Apache-2.0
"""The TensorRT path against a stand-in made from NVIDIA's type stubs (fake_tensorrt) and one for CUDA (fake_cuda)."""

import dataclasses
import itertools
import re
import subprocess
import sys
import threading
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from internimage_deploy import Segmenter
from internimage_deploy.cli.main import LazyGroup, group
from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime import verification
from internimage_deploy.runtime.backends import ort_gpu, registry
from internimage_deploy.runtime.backends import tensorrt as backend_module
from internimage_deploy.runtime.backends.base import Backend, run_each
from internimage_deploy.runtime.backends.fastest import sample
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.engine import build as build_module
from internimage_deploy.runtime.engine import compile as compile_module
from internimage_deploy.runtime.engine import sidecar, timing_cache
from internimage_deploy.runtime.engine.build import build, default_timing_cache
from internimage_deploy.runtime.engine.compile import compile_engine, network_flags
from internimage_deploy.runtime.engine.compilers import Compiler, find, load_module
from internimage_deploy.runtime.engine.layer_precision import keep_float32
from internimage_deploy.runtime.engine.prepare import BuildOptions, make_job, prepare
from internimage_deploy.runtime.engine.protocol import CompilerWarning
from internimage_deploy.runtime.gpu import device
from internimage_deploy.runtime.gpu.device import Device, DeviceBuffer, DeviceError, OutOfDeviceMemory
from support import fake_cuda, fake_tensorrt
from support.engine_models import DYNAMIC, exported, rtx
from support.tiny_models import color_model, picture

# What the stubs (10.13) hold and another version lacks.
LACKS = {
    "8.6.1": ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", "IProgressMonitor", "BuilderFlag.STRIP_PLAN"),
    "10.13.0": (),
    "11.1.0": (
        *("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "BuilderFlag.FP16", "BuilderFlag.BF16"),
        *("BuilderFlag.OBEY_PRECISION_CONSTRAINTS", "PreviewFeature.PROFILE_SHARING_0806"),
    ),
}


@pytest.fixture
def compile_here(monkeypatch, tmp_path):
    """Build with a stand-in of a version, in this process; returns (BuiltEngine, module, its only config)."""

    def compile_here(model, version="10.13.0", **options):
        trt = fake_tensorrt.make(version, without=LACKS[version])
        monkeypatch.setattr(
            build_module,
            "compile_in_process",
            lambda job, on_event: compile_engine(trt, job, on_event, threading.Event()),
        )
        library = tmp_path / "plugin.so"
        compiler = Compiler("tensorrt", version)
        monkeypatch.setattr("internimage_deploy.trt_plugins.library.check", lambda library, tensorrt: None)
        library.write_bytes(b"library")
        target = tmp_path / f"{version}.engine"
        options = BuildOptions(**options)
        built = build(model, target, compiler, options, on_event=events.append, find_plugin=lambda: library)
        return built, trt, trt.configs[0]

    compile_here.events = events = []
    return compile_here


@pytest.mark.parametrize("version", LACKS)
def test_an_engine_with_the_plugin_inside(version, compile_here, tmp_path):
    options = {"precision": "fp16", "workspace_mib": 256, "embed_plugin": True}
    built, trt, config = compile_here(exported(*DYNAMIC), version, **options)
    assert trt.loaded == [str(tmp_path / "plugin.so")]
    assert config.plugins_to_serialize == [str(tmp_path / "plugin.so")]
    assert config._limits == {"WORKSPACE": 256 << 20}
    # 8.6 has no strong typing, so the converted graph goes with the flag; from 9.1 on the graph's types are all.
    weakly_typed = {"FP16", "OBEY_PRECISION_CONSTRAINTS"} if version == "8.6.1" else set()
    assert config._flags == {"VERSION_COMPATIBLE"} | weakly_typed
    info = sidecar.read(built.path).engine
    assert (info.version, info.plugin_version, info.plugin_embedded, info.version_compatible) == (
        version,
        "1",
        True,
        True,
    )
    assert (info.plugin_file, len(list(tmp_path.glob("*.so")))) == ("", 1)
    assert "loading it needs --trust-engine" in built.notes[0]
    assert [profile[0] for profile in config._profiles] == ["image"]
    assert config._profiles[0][3] == (1, 1024, 1024, 3)


def test_the_plugin_lies_beside_the_engine(compile_here, monkeypatch, tmp_path):
    built, trt, config = compile_here(exported(*DYNAMIC), optimization_level=2)
    assert "plugins_to_serialize" not in config.__dict__
    assert (config._flags, config.builder_optimization_level) == (set(), 2)
    info = sidecar.read(built.path).engine
    assert (info.plugin_version, info.plugin_embedded, info.version_compatible) == ("1", False, False)
    assert set(info.plugins) >= {"DCNv3Packed", "UpsampleArgmax"}
    assert "copy the engine, its card and the library together" in built.notes[0]
    beside = tmp_path / info.plugin_file
    # Of the library's content, the text "library": printf library | sha256sum
    assert beside.name == "plugin-b718f1354f72.so"
    assert beside.read_bytes() == b"library"
    assert info.plugin_sha256.startswith("b718f1354f72")

    def load_as_in_a_new_process():
        object.__setattr__(trt.get_plugin_registry(), "all_creators", [])
        trt.loaded.clear()
        return load_backend(built.path)

    fake_cuda.install(monkeypatch, fake_cuda.make_driver())
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    load_as_in_a_new_process()
    assert trt.loaded == [str(beside)]
    beside.write_bytes(b"another")
    with pytest.raises(UserError, match=r"not the plugin library that 10.13.0.engine was built with .*; copy it again"):
        load_as_in_a_new_process()
    beside.unlink()
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_PLUGIN", str(tmp_path / "plugin.so"))
    load_as_in_a_new_process()
    assert trt.loaded == [str(tmp_path / "plugin.so")]


def test_profiles_are_shared(compile_here):
    """TensorRT 8.6 to 9 share a profile between execution contexts only where the engine was built for it."""
    built, _, config = compile_here(exported(*DYNAMIC), "8.6.1")
    assert config._preview == {"PROFILE_SHARING_0806"}
    assert sidecar.read(built.path).engine.profile_sharing
    here, options = Path(), BuildOptions()
    for version, asked, shared in (("8.5.3", False, False), ("9.2.0", True, True), ("10.0.1", False, True)):
        compiler = Compiler("tensorrt", version)
        prepared = prepare(exported(*DYNAMIC), compiler, options)
        job = make_job(prepared, compiler, options, model=here, weights_beside=here, output=here, plugin=None)
        assert (job.share_profiles, prepared.parser.can_share_profiles) == (asked, shared)


def test_tf32_is_left_out_unless_asked_for(compile_here):
    for precision in ("fp32", "fp16"):
        built, _, config = compile_here(exported(*DYNAMIC), precision=precision)
        assert ("TF32" in config._flags, sidecar.read(built.path).engine.tf32) == (False, False)
    built, _, config = compile_here(exported(*DYNAMIC), tf32=True)
    assert ("TF32" in config._flags, sidecar.read(built.path).engine.tf32) == (True, True)


def test_what_is_kept_in_float32_stays_so_in_a_weakly_typed_network(compile_here, monkeypatch):
    """The parser names layers after nodes; those of nodes that return float32 after the conversion are told to."""
    networks = []
    monkeypatch.setattr(
        compile_module,
        "keep_float32",
        lambda api, network, *names: networks.append(network) or keep_float32(api, network, *names),
    )
    built, _, _ = compile_here(exported(*DYNAMIC), "8.6.1", precision="fp16", keep_fp32=("decode_head.conv_seg/Conv",))
    (network,) = networks
    told = {layer.name for layer in network._layers if layer.precision is not None}
    layers = {layer.name: layer for layer in network._layers}
    assert all(layers[name].precision.name == "FLOAT" and layers[name]._output_types == {0: "FLOAT"} for name in told)
    assert {name for name in built.card.kept_fp32 if "/" in name and layers[name].type.name != "CAST"} <= told
    assert "decode_head.conv_seg/Conv" in told
    norms = {name for name in layers if name.endswith("/LayerNormalization")}
    assert norms
    assert norms <= told
    assert not {name for name in told if name.endswith((".conv/Conv", "fc1/MatMul", "/DCNv3", "/Shape"))}
    networks.clear()
    compile_here(exported(*DYNAMIC), precision="fp16")
    assert networks == []  # strongly typed: the graph's types are all


def test_layers_are_told_apart_by_their_names():
    trt = fake_tensorrt.make("8.6.1")
    nodes = [helper.make_node("Mul", ["a", "b"], [name], name) for name in ("n/Mul", "n/Mul_1", "n/Mul_2")]
    network = trt.INetworkDefinition()
    types = dict.fromkeys(("n/Mul", "n/Mul_1", "n/Mul_2"), TensorProto.FLOAT)
    object.__setattr__(network, "_layers", [fake_tensorrt._layer(trt, node, types) for node in nodes])
    object.__setattr__(network, "num_layers", 3)
    # n/Mul_1 is a node of its own; n/Mul_2 is the second layer of n/Mul.
    assert keep_float32(trt, network, {"n/Mul"}, {"n/Mul", "n/Mul_1"}) == 2
    assert [layer.precision is not None for layer in network._layers] == [True, False, True]


def test_the_error_says_why_the_plugin_does_not_load(compile_here, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    built, trt, _ = compile_here(exported(*DYNAMIC))
    object.__setattr__(trt.get_plugin_registry(), "all_creators", [])  # as in a new process
    fake_cuda.install(monkeypatch, fake_cuda.make_driver())
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    (tmp_path / built.card.engine.plugin_file).unlink()
    with pytest.raises(UserError, match=r"library, and plugin-.*so is not beside it; .* compiled for TensorRT 10.13.0"):
        load_backend(built.path)


def test_an_engine_without_its_plugin_inside_finds_tensorrts_own_plugins_too(compile_here, monkeypatch):
    built, trt, _ = compile_here(exported(*DYNAMIC))
    assert trt.own_plugins == []
    fake_cuda.install(monkeypatch, fake_cuda.make_driver())
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    load_backend(built.path)
    assert trt.own_plugins == [""]


def test_flags_are_those_of_the_version():
    def flags(version):
        trt = fake_tensorrt.make(version, without=LACKS[version])
        names = trt.NetworkDefinitionCreationFlag.__members__
        value = network_flags(trt, strongly_typed=version != "8.6.1")
        return {name for name, member in names.items() if value >> int(member) & 1}

    assert flags("8.6.1") == {"EXPLICIT_BATCH"}
    assert flags("10.13.0") == {"STRONGLY_TYPED"}
    assert flags("11.1.0") == {"STRONGLY_TYPED"}


def test_an_option_that_the_version_lacks(compile_here, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--embed-plugin needs TensorRT 8.6 or later, this is 8.5.3; leave it out"):
        prepare(exported(*DYNAMIC), Compiler("tensorrt", "8.5.3"), BuildOptions(embed_plugin=True))
    monkeypatch.setitem(LACKS, "8.5.3", ("IBuilderConfig.builder_optimization_level",))
    with pytest.raises(UserError, match=r"--optimization-level needs version 8.6 or later .* this is 8.5.3"):
        compile_here(color_model(tmp_path / "m.onnx"), "8.5.3", optimization_level=2)


def test_the_timing_cache(compile_here, tmp_path):
    cache = tmp_path / "deep" / "timing.cache"
    compile_here(exported(*DYNAMIC), timing_cache=cache)
    assert cache.read_bytes() == b"measured"
    # Of another GPU TensorRT rejects it, of damaged data it makes none: the build goes on with an empty one.
    for content in (b"foreign", b"damaged"):
        cache.write_bytes(content)
        compile_here(exported(*DYNAMIC), timing_cache=cache)
        assert cache.read_bytes() == b"measured"


def test_two_builds_at_once_keep_the_timings_of_both(compile_here, monkeypatch, tmp_path):
    cache = tmp_path / "timing.cache"

    def load(config, path, load=timing_cache.load):
        """The other build ends after this one has read the file."""
        taken = load(config, path)
        path.write_bytes(b"others")
        return taken

    monkeypatch.setattr(timing_cache, "load", load)
    compile_here(color_model(tmp_path / "m.onnx"), timing_cache=cache)
    assert cache.read_bytes() == b"measured others"


def test_a_timing_cache_is_written_by_one_process_at_a_time(tmp_path):
    """Eight processes add a line each to what is there, as `save` does with TensorRT's caches."""
    cache = tmp_path / "timing.cache"
    program = f"""
import sys, time
from pathlib import Path
from internimage_deploy.runtime.engine import timing_cache

class Cache:
    def __init__(self, data): self.data = data
    def combine(self, other, ignore): self.data += other.data
    def serialize(self): time.sleep(0.05); return self.data

class Config:
    def get_timing_cache(self): return Cache(sys.argv[1].encode())
    def create_timing_cache(self, data): return Cache(data)

timing_cache.save(Config(), Path({str(cache)!r}), print)
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, str(number)]) for number in range(8)]
    assert [process.wait(120) for process in processes] == [0] * 8
    assert sorted(cache.read_text()) == list("01234567")


def test_a_timing_cache_that_cannot_be_written_costs_no_engine(compile_here, tmp_path):
    (tmp_path / "file").touch()
    built, _, _ = compile_here(exported(*DYNAMIC), timing_cache=tmp_path / "file" / "timing.cache")
    assert built.path.is_file()
    (warning,) = (event.text for event in compile_here.events if isinstance(event, CompilerWarning))
    assert built.warnings == (warning,)
    assert warning.startswith("the timing cache is not kept (")


def test_whatever_is_kept_lies_in_the_chosen_folder(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    assert default_timing_cache("10.1") == tmp_path / "cache" / "timing" / "tensorrt-10.1.cache"
    kept = ort_gpu._tensorrt_options(0)["trt_engine_cache_path"]
    assert kept == str(tmp_path / "cache" / "onnxruntime-tensorrt")
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "file"))
    assert ort_gpu._tensorrt_options(1) == {"device_id": "1"}
    assert "engines are built anew each time: cannot write" in caplog.text


def test_the_shared_api_is_in_tensorrt_rtx(compile_here, monkeypatch, tmp_path):
    """Every class member that building and running touches exists in the real TensorRT-RTX module."""
    rtx()
    real = load_module("tensorrt-rtx")
    segmenter, trt = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"))
    segmenter(picture(64, 96)[0])
    assert len(trt.used) > 15
    assert [f"{c}.{m}" for c, m in sorted(trt.used) if not hasattr(getattr(real, c), m)] == []
    # TensorRT-RTX's own part, by name.
    for owner, names in {
        "Runtime": ("get_engine_validity", "engine_header_size"),
        "ICudaEngine": ("create_runtime_config",),
        "IRuntimeConfig": ("cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"),
        "IRuntimeCache": ("serialize", "deserialize"),
        "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE", "DISABLED"),
        "EngineValidity": ("INVALID",),
    }.items():
        assert [name for name in names if not hasattr(getattr(real, owner), name)] == []


def engine_of(compile_here, monkeypatch, model, *, gpu=None, **options):
    """A `Segmenter` on a stand-in engine of `model`, and the module."""
    built, trt, _ = compile_here(model, **options)
    fake_cuda.install(monkeypatch, gpu or fake_cuda.make_driver())
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    return Segmenter.load(built.path), trt


def sizes(*largest):
    return {"min": ((1, 32, 32),) * len(largest), "max": largest}


def test_labels_equal_those_of_onnxruntime(compile_here, monkeypatch, tmp_path):
    model = color_model(tmp_path / "m.onnx")
    segmenter, _ = engine_of(compile_here, monkeypatch, model, **sizes((2, 128, 128)))
    image, labels = picture(96, 120)
    np.testing.assert_array_equal(segmenter(image).labels, labels)
    np.testing.assert_array_equal(segmenter(image).labels, Segmenter.load(model, backend="onnxruntime")(image).labels)
    segmenter.close()


def test_batches_overlap_and_keep_their_order(compile_here, monkeypatch, tmp_path):
    segmenter, trt = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **sizes((2, 128, 128)))
    orders = [*itertools.permutations(range(3)), (0, 1, 2)]
    image, labels = picture(64, 96)
    parts = np.split(np.arange(96), 3)
    columns = [np.concatenate([parts[index] for index in order]) for order in orders]
    results = segmenter([np.ascontiguousarray(image[:, chosen]) for chosen in columns])
    for chosen, found in zip(columns, results, strict=True):
        np.testing.assert_array_equal(found.labels, labels[:, chosen])
    assert len(trt.contexts) == 2  # two execution contexts in one thread


def test_submit_returns_before_the_work_is_done(compile_here, monkeypatch, tmp_path):
    segmenter, _ = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **sizes((1, 64, 64)))
    backend = segmenter.backend
    batch = np.full((1, 64, 64, 3), 7, np.uint8)
    waits = [backend.submit(batch + step) for step in range(5)]  # the third waits for the first by itself
    means = [float(wait()[0, 0].mean()) for wait in reversed(waits)][::-1]
    assert np.allclose(np.diff(means), 1, atol=1e-3)


def test_profiles_are_switched(compile_here, monkeypatch, tmp_path):
    options = sizes((1, 64, 128), (1, 128, 64))
    segmenter, trt = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **options)
    for height, width in ((64, 128), (128, 64), (32, 32), (64, 128), (96, 32)):
        image, expected = picture(height, width)
        np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert ("IExecutionContext", "set_optimization_profile_async") in trt.used
    with pytest.raises(UserError, match=r"built for 1x32x32 to 1x64x128, 1x32x32 to 1x128x64 \(batch"):
        segmenter(picture(128, 128)[0])


def test_parts_are_timed_on_the_gpu(compile_here, monkeypatch, tmp_path):
    segmenter, _ = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **sizes((1, 64, 64)))
    times = segmenter.backend.measure(np.zeros((1, 64, 64, 3), np.uint8))
    assert set(times) == {"h2d_ms", "infer_ms", "d2h_ms", "enqueue_ms"}
    assert min(times.values()) > 0


def test_a_gpu_that_is_full(compile_here, monkeypatch, tmp_path):
    gpu = fake_cuda.make_driver(memory=50_000)
    segmenter, _ = engine_of(
        compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), gpu=gpu, **sizes((1, 512, 512))
    )
    with pytest.raises(OutOfDeviceMemory, match=r"cuMemAlloc of 0.8 MB: the GPU Stand-in GPU is out of memory; use a"):
        segmenter(picture(512, 512)[0])
    image, expected = picture(64, 64)  # the device is as usable as before
    np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert gpu.stack == []


def test_a_call_that_fails_is_named(compile_here, monkeypatch, tmp_path):
    segmenter, trt = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **sizes((1, 64, 64)))
    good = trt.IExecutionContext._execute_async_v3
    trt.IExecutionContext._execute_async_v3 = lambda self, stream_handle: False
    with pytest.raises(DeviceError, match=r"execute_async_v3 failed on Stand-in GPU for an input of \(1, 64, 64, 3\)"):
        segmenter(picture(64, 64)[0])
    trt.IExecutionContext._execute_async_v3 = good
    image, expected = picture(64, 64)
    np.testing.assert_array_equal(segmenter(image).labels, expected)


def test_engines_that_do_not_fit(compile_here, monkeypatch, tmp_path):
    built, trt, _ = compile_here(color_model(tmp_path / "m.onnx"))
    fake_cuda.install(monkeypatch, fake_cuda.make_driver(capability=(7, 5)))
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)

    def with_info(**changes):
        card = sidecar.read(built.path)
        info = dataclasses.replace(card.engine, **changes)
        sidecar.path_of(built.path).write_text(dataclasses.replace(card, engine=info).to_json())

    with_info(compute_capabilities=("8.6",))
    with pytest.raises(UserError, match=r"built for compute capability 8.6, and this GPU \(Stand-in GPU\) has 7.5"):
        load_backend(built.path)
    with_info(compute_capabilities=(), version_compatible=True)
    with pytest.raises(UserError, match="--trust-engine"):
        load_backend(built.path)
    load_backend(built.path, trust_engine=True)
    with pytest.raises(UserError, match=r"an engine for TensorRT, and this is TensorRT-RTX 10.13.0"):
        load_backend(built.path, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("verify",), "64x64, batch 1: (1, 64, 64) uint8"),
        (("verify", "--size", "64x96", "--against"), "64x96: 100.0000% of the labels agree"),
        (("benchmark", "--runs", "3", "--no-cuda-graphs"), "tensorrt: median"),
    ],
    ids=["verify", "verify against the ONNX file", "benchmark"],
)
def test_commands_open_an_engine_with_an_embedded_plugin(arguments, printed, compile_here, monkeypatch):
    model = exported(*DYNAMIC)
    built, trt, _ = compile_here(model, embed_plugin=True)
    assert built.card.engine.plugin_embedded
    fake_cuda.install(monkeypatch, fake_cuda.make_driver())
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    name, *options = arguments
    if "--against" in options:
        options += [model, "--against-backend", "onnxruntime"]
    command = LazyGroup().get_command(click.Context(group), name)
    words = [str(word) for word in (built.path, *options)]
    refused = CliRunner().invoke(command, words)
    assert isinstance(refused.exception, UserError)
    assert "load it with --trust-engine" in str(refused.exception)
    done = CliRunner().invoke(command, [*words, "--trust-engine"], catch_exceptions=False)
    assert printed in done.output


def test_without_tensorrt_or_a_gpu(compile_here, monkeypatch, tmp_path):
    built, trt, _ = compile_here(color_model(tmp_path / "m.onnx"))
    with pytest.raises(MissingDependency, match=r"running 10.13.0.engine needs the package 'tensorrt'.*\[gpu\]"):
        load_backend(built.path)
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    monkeypatch.setattr(device, "gpu_problem", lambda: "the NVIDIA driver sees no GPU")
    with pytest.raises(UserError, match=r"running an engine needs an NVIDIA GPU: the NVIDIA driver sees no GPU$"):
        load_backend(built.path)


def test_verify_runs_the_batches_that_an_engine_takes(compile_here, monkeypatch, tmp_path):
    model = color_model(tmp_path / "m.onnx")
    options = {"min": ((3, 64, 64),), "opt": ((4, 64, 96),), "max": ((8, 96, 96),)}
    segmenter, _ = engine_of(compile_here, monkeypatch, model, **options)
    engine = segmenter.backend
    assert verification.default_sizes(engine.card) == ((64, 64), (64, 96))
    run = verification.run_alone(engine, (64, 96))
    assert (run.batch, run.batch_difference) == (3, None)
    assert sample(engine.card).shape == (3, 64, 96, 3)
    assert verification.compare(engine, load_backend(model, "onnxruntime"), (64, 96)).agreement == 1


def test_stubs_alone_are_no_tensorrt():
    """The stubs are a folder that Python imports as an empty package."""
    absent = find("tensorrt")
    assert not isinstance(absent, Compiler)
    assert str(absent).startswith("TensorRT: not installed; run  pip install")


def test_buffers_are_reused(monkeypatch):
    gpu = fake_cuda.make_driver()
    fake_cuda.install(monkeypatch, gpu)
    device = Device()
    with device.current():
        buffer = DeviceBuffer(device)
        assert buffer.reserve(100)
        address = buffer.address
        assert not buffer.reserve(50)
        assert (buffer.address, gpu.used) == (address, 100)
        buffer.reserve(200)
        assert gpu.used == 200
        buffer.free()
        assert (gpu.used, buffer.address) == (0, 0)
    assert (device.name, device.capability) == ("Stand-in GPU", "8.6")


def test_no_gpu_of_that_number(monkeypatch):
    fake_cuda.install(monkeypatch, fake_cuda.make_driver(devices=1))
    with pytest.raises(UserError, match=re.escape("no GPU number 3: this machine has 1")):
        Device(3)


class Doubling(Backend):
    """Doubles numbers, `in_flight` at a time; a number in `broken` spoils everything in flight with it."""

    def __init__(self, in_flight, broken=()):
        self.in_flight, self.broken = in_flight, broken
        self.peak, self.started = 0, []

    def run(self, batch):
        if batch in self.broken:
            raise UserError(f"no {batch}")
        return batch * 2

    def submit(self, batch):
        self.started.append(batch)
        self.peak = max(self.peak, len(self.started))

        def wait():
            beside = list(self.started)
            self.started.remove(batch)
            if any(other in self.broken for other in beside):
                raise UserError("spoilt")
            return batch * 2

        return wait


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_outputs_come_in_order_and_with_what_they_belong_to(in_flight):
    backend = Doubling(in_flight)
    assert list(run_each(backend, ((f"tag {n}", n) for n in range(5)))) == [(f"tag {n}", 2 * n) for n in range(5)]
    assert backend.peak == in_flight


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_a_batch_that_fails_leaves_the_others_in_flight_alone(in_flight):
    found = dict(run_each(Doubling(in_flight, broken=(2,)), ((n, n) for n in range(6))))
    assert isinstance(error := found.pop(2), UserError)
    assert str(error) == "no 2"
    assert found == {0: 0, 1: 2, 3: 6, 4: 8, 5: 10}


def test_a_batch_that_cannot_be_started_leaves_the_others_alone():
    class Picky(Doubling):
        def submit(self, batch):
            if batch in self.broken:
                raise UserError("too large")
            return super().submit(batch)

    found = dict(run_each(Picky(2, broken=(1,)), ((n, n) for n in range(4))))
    assert str(found.pop(1)) == "no 1"
    assert found == {0: 0, 2: 4, 3: 6}
