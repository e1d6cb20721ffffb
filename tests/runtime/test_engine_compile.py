# SPDX-License-Identifier: Apache-2.0
"""Building engines against a stand-in for TensorRT that is made from NVIDIA's type stubs (fake_tensorrt)."""

import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends import ort_gpu
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.engine import compile as compile_module
from internimage_deploy.runtime.engine import sidecar, timing_cache
from internimage_deploy.runtime.engine.build import default_timing_cache
from internimage_deploy.runtime.engine.compile import network_flags
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.layer_precision import keep_float32
from internimage_deploy.runtime.engine.prepare import BuildOptions, make_job, prepare
from internimage_deploy.runtime.engine.protocol import CompilerWarning
from internimage_deploy.trt_plugins import library
from support import fake_tensorrt
from support.engine_models import DYNAMIC, exported
from support.engine_stand_in import LACKS, run_with
from support.tiny_models import color_model


@pytest.mark.parametrize("version", ["8.6.1", "10.13.0", "11.1.0"])
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

    run_with(monkeypatch, trt)
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
    run_with(monkeypatch, trt)
    (tmp_path / built.card.engine.plugin_file).unlink()
    with pytest.raises(UserError, match=r"library, and plugin-.*so is not beside it; .* compiled for TensorRT 10.13.0"):
        load_backend(built.path)


def test_an_engine_without_its_plugin_inside_finds_tensorrts_own_plugins_too(compile_here, monkeypatch):
    built, trt, _ = compile_here(exported(*DYNAMIC))
    assert trt.own_plugins == []
    run_with(monkeypatch, trt)
    load_backend(built.path)
    assert trt.own_plugins == [""]


def test_a_library_needs_the_plugins_of_the_engine_only(compile_here, monkeypatch):
    """An older library beside its engine lacks what later versions added."""
    built, trt, _ = compile_here(exported(*DYNAMIC))
    needed = built.card.engine.plugins
    object.__setattr__(trt.get_plugin_registry(), "all_creators", [])  # as in a new process
    run_with(monkeypatch, trt)
    monkeypatch.setattr(
        library, "find_creator", lambda trt, name, find=library.find_creator: name in needed and find(trt, name)
    )
    load_backend(built.path)
    monkeypatch.setattr(library, "find_creator", lambda trt, name: None)
    with pytest.raises(UserError, match=f"did not take {', '.join(needed)} from"):
        load_backend(built.path)


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
