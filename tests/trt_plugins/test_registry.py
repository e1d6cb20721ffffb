# SPDX-License-Identifier: Apache-2.0
"""The compiled library before NVIDIA's own plugin registry: TensorRT-RTX's, which works without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from internimage_deploy.operators import contract

pytest.importorskip("tensorrt_rtx_bindings", reason="needs NVIDIA's registry: pip install tensorrt_rtx_cu13_bindings")

ATTRIBUTES = {a.name for a in contract.ATTRIBUTES}

PROLOGUE = """
import json, sys
import numpy as np
import tensorrt_rtx_bindings as trt
from pathlib import Path
from internimage_deploy.trt_plugins import library
class Logger(trt.ILogger):
    messages = []
    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            self.messages.append(message)
logger = Logger()
runtime = trt.Runtime(logger)
path = Path(sys.argv[1])
types = {"int32": trt.PluginFieldType.INT32, "int64": trt.PluginFieldType.INT64, "float32": trt.PluginFieldType.FLOAT32,
         "float64": trt.PluginFieldType.FLOAT64}
arrays = []  # the binding does not keep a field's data alive
def collect(**values):
    arrays.extend(np.array([value], dtype) for value, dtype in values.values())
    return trt.PluginFieldCollection([
        trt.PluginField(name, array, types[dtype])
        for array, (name, (_, dtype)) in zip(arrays[-len(values):], values.items())])
"""


def in_registry(plugin, script):
    """Run `script` in a process of its own, for a registry is never emptied; returns what it prints as JSON."""
    code = PROLOGUE + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code, str(plugin)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_lists_both_creators_with_every_attribute(plugin):
    found = in_registry(
        plugin,
        """
        before = library.find_creator(trt)
        first = library.load_library(trt, path)
        again = library.load_library(trt, path)
        creators = {c.name: c for c in trt.get_plugin_registry().all_creators}
        print(json.dumps({
            "before": before is None, "first": str(first), "again": again,
            "fields": {n: [f.name for f in creators[n].field_names] for n in library.CREATORS},
            "versions": [creators[n].plugin_version for n in library.CREATORS],
            "namespaces": [creators[n].plugin_namespace for n in library.CREATORS],
        }))
        """,
    )
    assert found["before"]
    assert found["first"] == str(plugin)
    assert found["again"] is None
    assert set(found["fields"]["DCNv3"]) == ATTRIBUTES
    assert set(found["fields"]["TRTDCNv3"]) == ATTRIBUTES | {"im2col_step"}
    assert found["versions"] == [contract.PLUGIN_VERSION] * 2
    assert found["namespaces"] == [contract.PLUGIN_NAMESPACE] * 2


PROBE = """
#include <NvInferRuntime.h>
// Clones a plugin and returns the sum of its serialised integers, or -1.
extern "C" int probe(nvinfer1::IPluginV3* plugin) {
    nvinfer1::IPluginV3* clone = plugin->clone();
    if (clone == nullptr) return -1;
    auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        clone->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
    const nvinfer1::PluginFieldCollection* fields = runtime->getFieldsToSerialize();
    int sum = 0;
    for (int i = 0; i < fields->nbFields; ++i) {
        if (fields->fields[i].type == nvinfer1::PluginFieldType::kINT32) {
            sum += *static_cast<const int*>(fields->fields[i].data);
        }
    }
    delete clone;
    return sum;
}
"""


@pytest.fixture(scope="session")
def probe(tmp_path_factory, headers, nvcc):
    """A library that clones, for the Python binding of clone() returns nothing."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE)
    command = [nvcc.path, "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-w", "-isystem", headers.path]
    command += [folder / "probe.cpp", "-o", folder / "probe.so"]
    subprocess.run(command, check=True)
    return folder / "probe.so"


def test_creates_and_clones(plugin, probe):
    made = in_registry(
        plugin,
        f"""
        import ctypes
        probe = ctypes.CDLL("{probe}").probe
        library.load_library(trt, path)
        fields = collect(group=(4, "int32"), group_channels=(16, "int64"), stride_h=(200, "int32"),
                         offset_scale=(2.0, "float32"), mask_softmax=(1, "int32"))
        result = {{}}
        for name in library.CREATORS:
            for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
                plugin = library.find_creator(trt, name).create_plugin("layer", fields, phase)
                parts = [plugin.get_capability_interface(kind) for kind in (
                    trt.PluginCapabilityType.CORE, trt.PluginCapabilityType.BUILD, trt.PluginCapabilityType.RUNTIME)]
                # pybind11 keeps the C++ object's address behind the Python object's two header words.
                address = ctypes.c_void_p.from_address(id(plugin) + 2 * ctypes.sizeof(ctypes.c_void_p))
                result[f"{{name}} {{phase.name}}"] = [all(part is not None for part in parts), probe(address)]
        print(json.dumps(result))
        """,
    )
    # kernel 3 + 3, stride 200 + 1, pad 1 + 1, dilation 1 + 1, group 4, channels 16, softmax 1
    total = 232
    assert made == {
        f"{name} {phase}": [True, total] for name in ("DCNv3", "TRTDCNv3") for phase in ("BUILD", "RUNTIME")
    }


REFUSED = {
    "no group": 'group_channels=(16, "int32")',
    "no group_channels": 'group=(4, "int32")',
    "stride 0": 'group=(4, "int32"), group_channels=(16, "int32"), stride_w=(0, "int32")',
    "pad -1": 'group=(4, "int32"), group_channels=(16, "int32"), pad_h=(-1, "int64")',
    "softmax 2": 'group=(4, "int32"), group_channels=(16, "int32"), mask_softmax=(2, "int32")',
    "float kernel": 'group=(4, "int32"), group_channels=(16, "int32"), kernel_h=(3.0, "float32")',
    "integer scale": 'group=(4, "int32"), group_channels=(16, "int32"), offset_scale=(1, "int32")',
    "unknown": 'group=(4, "int32"), group_channels=(16, "int32"), strides=(1, "int32")',
}


def test_refuses_bad_attributes(plugin):
    cases = ", ".join(f"{name!r}: collect({fields})" for name, fields in REFUSED.items())
    made = in_registry(
        plugin,
        f"""
        library.load_library(trt, path)
        made = {{}}
        for name, fields in {{{cases}}}.items():
            try:
                plugin = library.find_creator(trt).create_plugin("layer", fields, trt.TensorRTPhase.BUILD)
            except Exception:
                plugin = None
            made[name] = plugin is not None
        print(json.dumps(made))
        """,
    )
    assert made == dict.fromkeys(REFUSED, False)
