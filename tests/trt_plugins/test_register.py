# SPDX-License-Identifier: Apache-2.0
"""The registering library before NVIDIA's plugin registries, of TensorRT's lean runtime 10 and 11: they need no driver.

cpp/registry_probe.cpp is the host: it only opens libraries, as Triton does.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_build import exported, needed

from internimage_deploy.cache import build_once, cache_folder, fingerprint, host_compiler, run_compiler
from internimage_deploy.errors import UserError
from internimage_deploy.trt_plugins import build, library

# The newest of each major version. Two versions of one package cannot be installed together.
LEAN = {10: "10.16.1.11", 11: "11.4.0.106"}
HERE = Path(__file__).parent
CREATORS = {f"{name} 1 ''" for name in library.CREATORS}


@pytest.fixture(scope="session", params=LEAN, ids=lambda number: f"TensorRT {LEAN[number]}")
def lean(request):
    """The lean runtime's library, unpacked from NVIDIA's wheel into the cache."""
    number = request.param
    folder = cache_folder() / "tests" / f"tensorrt-lean-{LEAN[number]}"
    name = f"libnvinfer_lean.so.{number}"

    def download(stamp):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["-d", str(folder), f"tensorrt-lean-cu12-libs=={LEAN[number]}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"TensorRT's lean runtime {LEAN[number]} could not be downloaded: {done.stderr.strip()[-300:]}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (folder / name).write_bytes(archive.read(f"tensorrt_lean_libs/{name}"))
        wheel.unlink()
        stamp.write_text("")

    build_once(folder / "complete", download)
    return folder / name


def compile_cached(name, source, command):
    """A program or library of the tests' own, compiled once per source state."""
    key = fingerprint([source, *build.SOURCES.rglob("*.h")], command)
    target = cache_folder() / "tests" / f"{name}-{key}"
    command = [*command, "-std=c++17", "-O1", str(source), "-o"]
    build_once(target, lambda path: run_compiler([*command, str(path)], target.with_suffix(".log")))
    target.chmod(0o755)  # files of the cache are not for running
    return target


@pytest.fixture(scope="session")
def probe(headers, nvcc):
    # nvcc brings the CUDA headers to the host compiler, which is all that it calls here.
    command = [str(nvcc.path), "-cudart=none", f"-I{build.SOURCES}", "-isystem", str(headers.path), "-ldl"]
    command += ["-Xcompiler", "-Wall,-Wextra,-Werror,-Wno-deprecated-declarations"]
    return compile_cached("registry-probe", HERE / "cpp" / "registry_probe.cpp", command)


@pytest.fixture(scope="session")
def register(plugin):
    return build.find_register_library(plugin)


def run(program, *libraries, **environment):
    """What the probe prints, as a dict, its creators, and its standard error stream."""
    variables = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", library.LIBRARY_VARIABLE)}
    done = subprocess.run(
        [program, *libraries], capture_output=True, text=True, timeout=120, env=variables | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    values = {name: int(value) for name, _, value in lines if name != "creator"}
    return values, [value for name, _, value in lines if name == "creator"], done.stderr


def test_it_links_and_exports_nothing(register):
    assert register.name == "libinternimage_trt_register.so"
    assert exported(register) == set()
    assert needed(register) <= {"libstdc++", "libm", "libgcc_s", "libc", "libdl"}


def test_opening_the_plugin_library_alone_registers_nothing(probe, plugin, lean):
    _, creators, _ = run(probe, lean, plugin)
    assert not CREATORS & set(creators)


def test_a_host_that_only_opens_it_gets_working_plugins(probe, register, lean):
    values, creators, errors = run(probe, lean, register)
    assert set(creators) >= CREATORS
    assert errors == ""
    assert values.pop("registry.version") == int(lean.suffix[1:])
    expected = {
        "created": 1,
        "capabilities": 3,
        "formats": 4,
        "mixed_types": 0,
        "configure": 0,
        "tactics": 2,
        "valid_tactics": 0,
        "set_tactic": 0,
        "set_unknown_tactic": -1,
        "reloaded": 1,
        "same_fields": 1,
        "shape_change": 0,
        "wrong_shape": -1,
        "created_without_channels": 0,
    }
    enqueued = {values.pop(f"{phase}.enqueue") for phase in ("build", "runtime")}
    assert values == {f"{phase}.{name}": value for phase in ("build", "runtime") for name, value in expected.items()}
    if ctypes.util.find_library("cuda") is None:
        assert enqueued == {35}  # cudaErrorInsufficientDriver, which is also what no driver is


def test_it_registers_once(probe, register, lean, tmp_path):
    second = shutil.copy(register, tmp_path)
    environment = {library.LIBRARY_VARIABLE: str(register.with_name(build.LIBRARY))}
    _, creators, errors = run(probe, lean, register, second, **environment)
    assert len(set(creators) & CREATORS) == len([name for name in creators if name in CREATORS]) == len(CREATORS)
    assert errors == ""


def test_the_registering_library_may_be_opened_first_and_finds_tensorrt_itself(probe, register, lean):
    # As with LD_PRELOAD; `lean` is opened after it.
    _, creators, errors = run(probe, lean, LD_PRELOAD=str(register), LD_LIBRARY_PATH=str(lean.parent))
    assert set(creators) >= CREATORS
    assert errors == ""


LINKED = """
#include <cstdio>
extern "C" void* getPluginRegistry() noexcept;
int main() {
    // The registry is called through its class's table, whose slot differs by version.
    using List = void* const* (*)(void*, int*);
    void* registry = getPluginRegistry();
    int count = 0;
    (*reinterpret_cast<List**>(registry))[SLOT](registry, &count);
    printf("registry.count %d\\n", count);
}
"""


def test_preloaded_into_a_program_that_links_tensorrt(register, lean, tmp_path):
    (tmp_path / "linked.cpp").write_text(LINKED)
    slot = 13 if lean.suffix == ".10" else 9  # of getAllCreators
    command = [host_compiler(), f"-DSLOT={slot}", "-Wl,--no-as-needed", str(lean), f"-Wl,-rpath,{lean.parent}"]
    linked = compile_cached("linked", tmp_path / "linked.cpp", command)
    before = run(linked)[0]["registry.count"]
    values, _, errors = run(linked, LD_PRELOAD=str(register))
    assert values["registry.count"] == before + len(CREATORS)
    assert errors == ""


def complaint(probe, *libraries, **environment):
    _, creators, errors = run(probe, *libraries, **environment)
    assert creators == []
    (line,) = errors.splitlines()
    assert line.startswith("internimage-deploy: the plugins are not registered with TensorRT: ")
    return line


def test_what_is_missing_is_said_in_one_line_and_the_host_goes_on(probe, plugin, register, tmp_path):
    assert "no libnvinfer.so was found" in complaint(probe, "-", register)
    alone = shutil.copy(register, tmp_path)
    assert f"{tmp_path / build.LIBRARY}: cannot open shared object file" in complaint(probe, "-", alone)
    other = {library.LIBRARY_VARIABLE: "libm.so.6"}
    assert "is no plugin library of this version" in complaint(probe, "-", alone, **other)
    # The environment's library is taken where the neighbour is missing.
    named = {library.LIBRARY_VARIABLE: str(plugin)}
    assert "no libnvinfer.so was found" in complaint(probe, "-", alone, **named)


STAND_IN = """
#include <cstdlib>
extern "C" int getInferLibVersion() { return VERSION; }
extern "C" void* getPluginRegistry() { abort(); }
"""


@pytest.mark.parametrize(("number", "release"), [(8601, "8.6"), (8503, "8.5"), (9200, "9.2")])
def test_a_tensorrt_of_other_classes_is_not_given_the_plugins(probe, plan, register, tmp_path, number, release):
    (tmp_path / "stand_in.cpp").write_text(STAND_IN)
    name = f"libnvinfer.so.{number // 1000}"
    command = [host_compiler(), f"-DVERSION={number}", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
    shutil.copy(compile_cached("stand-in", tmp_path / "stand_in.cpp", command), tmp_path / name)
    line = complaint(probe, "-", tmp_path / name, register)
    built = ".".join(plan.headers.version.split(".")[:2])
    assert f"was built with the headers of TensorRT {built}, and {name} is {release}" in line


def test_what_a_library_was_built_for(plan, plugin, register):
    assert library.built_for(plugin) == (plan.headers.version, "v3")
    library.check(plugin, "10.3.0")
    library.check(plugin, "11.4.0")
    for old in ("8.5.2", "8.6.1", "9.2.0"):
        with pytest.raises(UserError, match=rf"{plan.headers.version}, and TensorRT {old} cannot take it") as caught:
            library.check(plugin, old)
        assert "--tensorrt-include DIR" in str(caught.value)
        assert "TensorRT repository" in str(caught.value)
    with pytest.raises(UserError, match="no plugin library of this version"):
        library.check(register, "10.3.0")
