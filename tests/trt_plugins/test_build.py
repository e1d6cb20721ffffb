# SPDX-License-Identifier: Apache-2.0
"""Finding tools, the cache, its key, its lock and its failures; the command; CMake and the ptxas table."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from internimage_deploy import cache
from internimage_deploy.cli.build_plugin import build_plugin
from internimage_deploy.errors import UserError
from internimage_deploy.operators import contract, ms_deform_attn
from internimage_deploy.trt_plugins import build, library, toolchain

ROOM = Path(build.__file__).parent
REPOSITORY = Path(__file__).parents[2]


def tool(name):
    """A program of this environment, which need not be activated, or of the machine."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def exported(path):
    """Names in the dynamic symbol table that the library defines."""
    listing = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listing.splitlines()}


def needed(path):
    """Libraries the dynamic loader will look for."""
    listing = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"NEEDED.*\[(.+?)\.so", listing))


def test_library_exports_the_entry_points_and_links_neither_tensorrt_nor_cuda(plugin):
    assert exported(plugin) == {"setLoggerFinder", "getCreators", "internimage_plugin_built_for"}
    assert needed(plugin) <= {
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "ld-linux-x86-64",
        "libpthread",
        "libdl",
        "librt",
    }


def test_second_build_takes_the_cached_file(plan, plugin):
    again, built = build.build(plan)
    assert (again, built) == (plugin, False)
    assert plugin in build.cached_libraries()
    assert plugin in build.cached_libraries(plan.headers.version)
    assert plugin not in build.cached_libraries("7.0.0")


def test_command_copies_the_cached_library_and_prints_what_it_found(plan, plugin, tmp_path):
    target = tmp_path / "plugin.so"
    result = CliRunner().invoke(build_plugin, ["--compute-capability", "8.7", "-o", str(target)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(target)
    assert target.read_bytes() == plugin.read_bytes()
    register = tmp_path / "libinternimage_trt_register.so"
    assert register.read_bytes() == build.find_register_library(plugin).read_bytes()
    assert f"{register}, for programs" in result.stderr
    assert "looks beside itself for libinternimage_trt_plugins.so, or takes $INTERNIMAGE" in result.stderr
    result = CliRunner().invoke(build_plugin, ["--compute-capability", "8.7", "-o", str(register)])
    assert isinstance(result.exception, UserError)
    assert "the registering library gets that name" in str(result.exception)
    found = (str(plan.nvcc.path), plan.nvcc.version, plan.headers.version)
    for text in (*found, "IPluginV3", "TensorRT 10 and later", "compute capability 8.7", "from the cache"):
        assert text in result.stderr


@pytest.mark.parametrize("option", ["--compute-capability", "--arch"])
@pytest.mark.parametrize("text", ["87", "8.7", "sm_87"])
def test_compute_capabilities_are_written_in_any_usual_way(plugin, text, option):
    result = CliRunner().invoke(build_plugin, [option, text])
    assert result.stdout.strip() == str(plugin)


def test_help_shows_the_options_name_alone():
    shown = CliRunner().invoke(build_plugin, ["--help"]).stdout
    assert "--compute-capability" in shown
    assert "--arch" not in shown


def test_wrong_arguments():
    for text in ("fast", "8", "8.7.1"):
        wrong = CliRunner().invoke(build_plugin, ["--compute-capability", text])
        assert wrong.exit_code == 2
        assert f"'{text}' is no compute capability" in wrong.output
    unknown = CliRunner().invoke(build_plugin, ["--compute-capability", "1.2"])
    assert isinstance(unknown.exception, UserError)
    assert re.search(r"compute capability 1\.2: CUDA \S+ compiles for .*8\.7", str(unknown.exception))


def test_key_follows_everything_the_library_depends_on(plan, monkeypatch, tmp_path):
    other_cuda = dataclasses.replace(plan.nvcc, version="12.6")
    other_headers = dataclasses.replace(plan.headers, version="10.3.0")
    plans = [
        plan,
        dataclasses.replace(plan, architectures=(87, 89)),
        dataclasses.replace(plan, interface="v2"),
        dataclasses.replace(plan, nvcc=other_cuda),
        dataclasses.replace(plan, headers=other_headers),
    ]
    keys = {p.key for p in plans}
    # Where tools and headers lie does not matter.
    moved = dataclasses.replace(plan, headers=dataclasses.replace(plan.headers, path=Path("/elsewhere")))
    assert moved.key == plan.key
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    with (tmp_path / "csrc" / "kernel" / "dcnv3_math.h").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    keys.add(plan.key)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    keys.add(plan.key)
    assert len(keys) == len(plans) + 2


def test_compiler_errors_are_shown_whole_and_kept(plan, monkeypatch, tmp_path, empty_cache):
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    broken = "".join(f"#warning line {n}\n" for n in range(100)) + "#error no such thing\n"
    (tmp_path / "csrc" / "plugin" / "dcnv3_attributes.cpp").write_text(broken)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(build, "KERNEL_SOURCES", ())
    monkeypatch.setattr(build, "PLUGIN_SOURCES", ("plugin/dcnv3_attributes.cpp",))
    with pytest.raises(UserError) as caught:
        build.build(plan)
    message = str(caught.value)
    log = Path(re.search(r"complete output is in (\S+)", message)[1])
    for text in (message, log.read_text()):
        assert "no such thing" in text
        assert "line 0" in text
    assert str(plan.nvcc.path) in log.read_text()
    assert not plan.target.exists()
    assert build.cached_libraries() == []


def test_of_many_builders_one_builds(empty_cache):
    target = empty_cache / "thing" / "lib.so"
    calls = []

    def slow(path):
        calls.append(path)
        time.sleep(0.2)
        path.write_text("whole")

    results = []
    threads = [threading.Thread(target=lambda: results.append(cache.build_once(target, slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(results) == [False] * 7 + [True]
    assert target.read_text() == "whole"


def test_a_failed_build_leaves_nothing_and_the_next_one_works(empty_cache):
    target = empty_cache / "thing" / "lib.so"

    def fail(path):
        path.write_text("half")
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        cache.build_once(target, fail)
    assert not target.exists()
    assert cache.build_once(target, lambda path: path.write_text("whole"))


def test_a_cache_that_cannot_be_written_to(monkeypatch, tmp_path, plan):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write"):
        build.build(plan)


HEADER_VERSIONS = {
    "8.6.1": "#define NV_TENSORRT_MAJOR 8 //!< x\n#define NV_TENSORRT_MINOR 6\n#define NV_TENSORRT_PATCH 1\n",
    "11.1.0": "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n#define TRT_PATCH_ENTERPRISE 0\n"
    "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< x\n#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE\n"
    "#define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE\n",
}


def fake_headers(folder, version):
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").write_text("")
    (folder / "NvInferVersion.h").write_text(HEADER_VERSIONS[version])
    return folder


def test_headers_are_found_in_order(tmp_path, monkeypatch):
    named = fake_headers(tmp_path / "named", "11.1.0")
    fake_headers(tmp_path / "root" / "include", "8.6.1")
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "root"))
    assert toolchain.find_headers(named).version == "11.1.0"
    found = toolchain.find_headers()
    assert (found.version, found.major, found.source) == ("8.6.1", 8, "TENSORRT_ROOT")
    with pytest.raises(UserError, match="--tensorrt-include"):
        toolchain.find_headers(tmp_path)


def test_interface_follows_the_headers(tmp_path, monkeypatch):
    old = fake_headers(tmp_path / "old", "8.6.1")
    new = fake_headers(tmp_path / "new", "11.1.0")
    assert build.make_plan(tensorrt_include=old).interface == "v2"
    assert build.make_plan(tensorrt_include=new).interface == "v3"
    assert build.make_plan(tensorrt_include=new, interface="v2").interface == "v2"
    with pytest.raises(UserError, match="needs TensorRT 10"):
        build.make_plan(tensorrt_include=old, interface="v3")


def fake_nvcc(path, release, codes):
    path.parent.mkdir(parents=True)
    script = f'#!/bin/sh\ncase "$1" in --version) echo "release {release}, V{release}.1";; *) printf "{codes}";; esac\n'
    path.write_text(script)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("release", "codes", "expected"),
    [
        ("11.4", r"sm_35\nsm_72\nsm_75\nsm_80\nsm_86\nsm_87\n", (72, 75, 80, 86, 87)),
        ("12.9", r"sm_72\nsm_75\nsm_90\nsm_100\nsm_101\nsm_120\n", (72, 75, 90, 100, 101, 120)),
        ("13.0", r"sm_75\nsm_87\nsm_88\nsm_110\nsm_121\n", (75, 87, 110, 121)),
    ],
)
def test_architectures_follow_the_toolkit(tmp_path, monkeypatch, release, codes, expected):
    path = fake_nvcc(tmp_path / "bin" / "nvcc", release, codes)
    found = toolchain.find_nvcc(path)
    assert (found.version, found.architectures) == (release, expected)
    monkeypatch.setenv("CUDACXX", str(path))
    assert toolchain.find_nvcc() == found
    # CMake asks the same question.
    script = tmp_path / "ask.cmake"
    script.write_text(
        f"include({ROOM}/cmake/architectures.cmake)\nplugin_architectures({path} found)\nmessage(STATUS ${{found}})\n"
    )
    output = subprocess.run([tool("cmake"), "-P", script], capture_output=True, text=True, check=True).stdout
    *real, newest = expected
    assert "".join(f"{number}-real" for number in real) + str(newest) in output.replace(";", "")


def test_no_compiler_says_what_to_install(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="pip install nvidia-cuda-nvcc"):
        toolchain.find_nvcc(tmp_path / "nvcc")


def test_cmake_lists_the_same_sources():
    listed = re.findall(r"csrc/(\S+\.(?:cpp|cu))", (ROOM / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted((*build.KERNEL_SOURCES, *build.PLUGIN_SOURCES, build.REGISTER_SOURCE))


def test_wheel_holds_every_source(tmp_path):
    configuration = (REPOSITORY / "pyproject.toml").read_text()
    patterns = re.search(r'"internimage_deploy.trt_plugins" = (\[.*?\])', configuration, re.S)[1]
    held = {path for pattern in json.loads(patterns) for path in ROOM.glob(pattern)}
    inside = (path for folder in ("csrc", "cmake") for path in (ROOM / folder).rglob("*"))
    assert held == {path for path in inside if path.is_file()} | {ROOM / "CMakeLists.txt"}


def test_the_kernel_includes_nothing_of_tensorrt_or_the_plugin():
    for path in (ROOM / "csrc" / "kernel").iterdir():
        included = re.findall(r'#include [<"](.+)[>"]', path.read_text())
        assert not [name for name in included if "/" in name or name.startswith(("NvInfer", "plugin"))], path


def test_library_lookup_order(plugin, monkeypatch, tmp_path, empty_cache):
    with pytest.raises(UserError, match="build-plugin"):
        library.find_library()
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(plugin))
    assert library.find_library() == plugin
    other = tmp_path / "other.so"
    other.write_text("")
    assert library.find_library(other) == other
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(UserError, match="INTERNIMAGE_DEPLOY_PLUGIN: no plugin library"):
        library.find_library()


def test_of_cached_libraries_the_one_for_most_gpus_comes_first(plan, empty_cache):
    for number, architectures in enumerate([(87,), (75, 80, 87), (89,)]):
        folder = empty_cache / "plugin" / str(number)
        folder.mkdir(parents=True)
        (folder / build.LIBRARY).write_text("")
        record = {"sources": build.sources_key(), "machine": platform.machine(), "tensorrt": "10.14.1"}
        record["interface"] = "v3"
        (folder / build.RECORD).write_text(json.dumps(record | {"architectures": architectures}))
        os.utime(folder / build.LIBRARY, (number, number))
    (empty_cache / "plugin" / "half").mkdir()
    (empty_cache / "plugin" / "half" / build.RECORD).write_text("{")
    assert [path.parent.name for path in build.cached_libraries("10.3.0")] == ["1", "2", "0"]
    assert library.find_library(tensorrt="10.3.0").parent.name == "1"
    with pytest.raises(UserError, match=r"for TensorRT 8\.6"):
        library.find_library(tensorrt="8.6.1")


# Headers and interface of a library, and of the TensorRT versions 8.5.2, 8.6.1, 9.2.0, 10.3.0 and 11.4.0 those that
# can take it: the classes of all others differ in memory.
SERVED = {
    ("8.5.1", "v2"): {"8.5.2"},
    ("8.6.0", "v2"): {"8.6.1"},
    ("9.0.1", "v2"): {"9.2.0"},
    ("10.14.1", "v2"): {"10.3.0"},
    ("10.14.1", "v3"): {"10.3.0", "11.4.0"},
    ("11.1.0", "v3"): {"10.3.0", "11.4.0"},
    ("11.1.0", "v2"): {"11.4.0"},
}


@pytest.mark.parametrize(("built", "interface"), SERVED)
@pytest.mark.parametrize("tensorrt", ["8.5.2", "8.6.1", "9.2.0", "10.3.0", "11.4.0"])
def test_a_library_is_offered_only_to_a_tensorrt_of_its_classes(empty_cache, built, interface, tensorrt):
    folder = empty_cache / "plugin" / "one"
    folder.mkdir(parents=True)
    (folder / build.LIBRARY).write_text("")
    record = {"sources": build.sources_key(), "machine": platform.machine(), "tensorrt": built, "architectures": [87]}
    (folder / build.RECORD).write_text(json.dumps(record | {"interface": interface}))
    if tensorrt in SERVED[built, interface]:
        assert library.find_library(tensorrt=tensorrt).parent.name == "one"
    else:
        with pytest.raises(UserError, match=f"has not been compiled for TensorRT {tensorrt}: run ") as caught:
            library.find_library(tensorrt=tensorrt)
        assert ("--tensorrt-include" in str(caught.value)) == (toolchain.major(tensorrt) < 10)


@pytest.mark.parametrize(("tensorrt", "release"), [("8.5.2", "8.5"), ("8.6.1", "8.6"), ("9.2.0", "9")])
def test_an_old_tensorrt_asks_for_its_own_headers(tmp_path, monkeypatch, empty_cache, tensorrt, release):
    for folder in toolchain.SYSTEM_FOLDERS:
        if toolchain.headers_version(Path(folder)):
            pytest.skip(f"TensorRT's headers are installed in {folder}")
    monkeypatch.setattr(toolchain, "_download_headers", None)  # never called
    with pytest.raises(UserError) as caught:
        library.find_library(tensorrt=tensorrt, build=True)
    message = str(caught.value)
    assert f"a plugin for TensorRT {tensorrt} needs the headers of TensorRT {release}, and those on PyPI are" in message
    for text in ("NVIDIA's public TensorRT repository", "libnvinfer-headers-dev", "--tensorrt-include DIR"):
        assert text in message
    assert "\n" not in message
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "root"))
    fake_headers(tmp_path / "root" / "include", "11.1.0")
    with pytest.raises(UserError, match=r"those in .*/root/include are 11\.1\.0"):
        toolchain.find_headers(tensorrt=tensorrt)
    own = fake_headers(tmp_path / "own", "8.6.1")
    if release == "8.6":
        assert toolchain.find_headers(own, tensorrt=tensorrt).version == "8.6.1"
    # The command asks for the TensorRT that is installed, unless headers are named.
    monkeypatch.delenv("TENSORRT_ROOT")
    monkeypatch.setattr(toolchain, "installed_tensorrt", lambda: tensorrt)
    refused = CliRunner().invoke(build_plugin, [])
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception) == message


def test_the_version_of_the_installed_tensorrt(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "tensorrt_cu12-8.6.1.dist-info").mkdir()
    (tmp_path / "tensorrt_cu12-8.6.1.dist-info" / "METADATA").write_text("Name: tensorrt-cu12\nVersion: 8.6.1\n")
    assert toolchain.installed_tensorrt() == "8.6.1"


def test_the_v3_plugin_is_empty_for_the_other_interface(headers, nvcc, tmp_path):
    """So that it compiles with headers that do not know IPluginV3; `make plugin-headers` takes real ones."""
    for interface in ("2", "3"):
        target = tmp_path / f"v{interface}.o"
        command = [nvcc.path, "-std=c++17", "-c", f"-DPLUGIN_INTERFACE={interface}", f"-I{build.SOURCES}"]
        command += ["-isystem", headers.path, build.SOURCES / "plugin" / "plugin_v3.cpp", "-o", target]
        subprocess.run(command, check=True)
    symbols = [subprocess.run(["nm", tmp_path / f"v{n}.o"], capture_output=True, text=True).stdout for n in "23"]
    assert ["PluginV3" in text for text in symbols] == [False, True]


def test_headers_are_checked_against_what_the_plugin_says_of_them(headers, tmp_path):
    def check(folder):
        command = [sys.executable, "tools/plugin_headers.py", folder]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    done = check(headers.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"TensorRT {headers.version} +v2 ok, v3 ok, layout ok", done.stdout)
    # One more function before loadLibrary() moves it.
    other = shutil.copytree(headers.path, tmp_path / "other")
    for name in ("NvInferRuntime.h", "NvInferRuntimeCommon.h"):
        text = (other / name).read_text()
        added = "virtual void added() = 0;\n    virtual PluginLibraryHandle loadLibrary("
        (other / name).write_text(text.replace("virtual PluginLibraryHandle loadLibrary(", added))
    done = check(other)
    assert done.returncode == 1
    assert "layout FAILS" in done.stdout
    assert "IPluginRegistry::loadLibrary is at" in done.stdout
    assert "expected the include" in check(tmp_path).stderr


def test_importing_compiles_nothing(tmp_path):
    code = (
        "import importlib, pkgutil, internimage_deploy.trt_plugins as room\n"
        "for module in pkgutil.iter_modules(room.__path__): importlib.import_module(f'{room.__name__}.{module.name}')\n"
        "import sys; assert 'torch' not in sys.modules and 'tensorrt' not in sys.modules"
    )
    environment = os.environ | {cache.CACHE_VARIABLE: str(tmp_path / "cache"), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not (tmp_path / "cache").exists()


def test_ptxas_has_no_spills_and_no_more_registers():
    command = [sys.executable, "benchmarks/ptxas.py", "--arch", "87", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sm_87   79 kernels" in done.stdout


def test_ptxas_table_covers_every_architecture_and_variant():
    table = json.loads((REPOSITORY / "benchmarks/results/ptxas.json").read_text())["kernels"]
    assert set(table) == {f"sm_{n}" for n in (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)}
    for kernels in table.values():
        assert len(kernels) == 79
        assert all(k["stack"] == k["spill_stores"] == k["spill_loads"] == 0 for k in kernels.values())


def test_ptxas_check_sees_a_worse_kernel():
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        import ptxas
    finally:
        sys.path.pop(0)
    log = (
        "ptxas info    : Compiling entry function '_ZN11internimage6kernelINS_12Dcnv3VariantINS_4HalfELi8ELi2ELi16ELb1"
        "ELNS_4BodyE2EEENS_11Dcnv3ParamsENS_13Dcnv3GeometryEEEvT0_T1_' for 'sm_87'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 81 registers, used 0 barriers\n"
    )
    table = ptxas.parse(log)
    name = "float16 C16 8x2 softmax half"
    assert table == {"sm_87": {name: {"registers": 81, "stack": 8, "spill_stores": 12, "spill_loads": 4}}}
    kept = {"sm_87": {name: {"registers": 80}}}
    assert len(ptxas.worse(table, kept, same_compiler=True)) == 4
    assert len(ptxas.worse(table, kept, same_compiler=False)) == 3
    other = "_ZN11internimage6kernelINS_19MsDeformAttnVariantIfLi4ELi2ELi4EEENS_18MsDeformAttnParamsENS_4GridEEEvT0_T1_"
    assert ptxas.variant_name(other) == "MSDeformAttn float32 P4 4x2"
    last = "_ZN11internimage6kernelINS_21UpsampleArgmaxVariantIfLi4EEENS_20UpsampleArgmaxParamsENS_4GridEEEvT0_T1_"
    assert ptxas.variant_name(last) == "UpsampleArgmax float32 4x4"
    table["sm_87"][name] |= {"stack": 0, "spill_stores": 0, "spill_loads": 0, "registers": 80}
    assert ptxas.worse(table, kept, same_compiler=True) == []
    assert ptxas.worse(table, {"sm_87": {**kept["sm_87"], "lost": {}}}, same_compiler=True) != []


def test_the_document_states_the_contract():
    document = (REPOSITORY / "docs" / "plugin.md").read_text()
    rows = {}
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4 and cells[1] in ("int", "float"):
            rows |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[1:])
    assert set(rows) == {a.name for a in contract.PLUGIN_ATTRIBUTES}
    for attribute in contract.PLUGIN_ATTRIBUTES:
        kind, default, domain = rows[attribute.name]
        assert kind == attribute.type
        assert default == ("required" if attribute.default is None else str(attribute.default))
        if attribute.minimum is None:
            assert domain == "finite"
        elif attribute.maximum is None:
            assert domain == f"{attribute.minimum} and more"
        else:
            assert domain.startswith(f"{attribute.minimum} to {attribute.maximum}")


def test_the_document_states_the_contract_of_attention():
    document = (REPOSITORY / "docs" / "plugin.md").read_text()
    section = document[document.index("## MSDeformAttn") : document.index("## What is tested")]
    rows = dict(re.findall(r"^\| `(\w+)` \| (\([^|]*\)) \|", section, re.M))
    # The same in the contract's docstring: a name, a shape, a type and more.
    stated = dict(re.findall(r"^    (\w+) +(\(.*?\))  +", ms_deform_attn.__doc__, re.M))
    assert tuple(rows) == tuple(stated) == ms_deform_attn.INPUTS
    assert rows == stated
    assert ms_deform_attn.TENSORRT_OP_TYPE in section
