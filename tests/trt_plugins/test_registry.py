# SPDX-License-Identifier: Apache-2.0
"""The compiled library before NVIDIA's own plugin registry: TensorRT-RTX's, which works without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from internimage_deploy.operators import contract
from internimage_deploy.operators import ms_deform_attn as ms_deform_attn_contract

pytest.importorskip("tensorrt_rtx_bindings", reason="needs NVIDIA's registry: pip install tensorrt_rtx_cu13_bindings")

ATTRIBUTES = {a.name for a in contract.PLUGIN_ATTRIBUTES}

PROLOGUE = """
import ctypes, json, sys
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
def address_of(plugin):
    # pybind11 keeps the C++ object's address behind the Python object's two header words.
    return ctypes.c_void_p.from_address(id(plugin) + 2 * ctypes.sizeof(ctypes.c_void_p))
arrays = []  # the binding does not keep a field's data alive
def collect(**values):
    if not values:
        return trt.PluginFieldCollection([])
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


def test_lists_the_creators_with_every_attribute(plugin):
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
    assert set(found["fields"]["DCNv3"]) == set(found["fields"]["DCNv3Packed"]) == ATTRIBUTES
    assert set(found["fields"]["TRTDCNv3"]) == ATTRIBUTES | {"im2col_step"}
    assert found["fields"].pop("MSDeformAttn") == found["fields"].pop("UpsampleArgmax") == []
    assert set(found["fields"]) == {"DCNv3", "DCNv3Packed", "TRTDCNv3"}
    assert found["versions"] == [contract.PLUGIN_VERSION] * 5
    assert found["namespaces"] == [contract.PLUGIN_NAMESPACE] * 5


PROBE = """
#include <NvInferRuntime.h>
#include <cstring>
using namespace nvinfer1;
// Clones a plugin and returns the sum of its serialised integers, or -1.
extern "C" int probe(IPluginV3* plugin) {
    IPluginV3* clone = plugin->clone();
    if (clone == nullptr) return -1;
    auto* runtime = static_cast<IPluginV3OneRuntime*>(clone->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
    int sum = fields != nullptr ? 0 : -1;
    for (int i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        if (fields->fields[i].type == PluginFieldType::kINT32) {
            sum += *static_cast<const int*>(fields->fields[i].data);
        }
    }
    delete clone;
    return sum;
}
// A clone's answers about MSDeformAttn tensors of value type `type`: bit i set where tensor i may have its type, then
// whether the output has the type, whether right shapes pass and whether a wrong one is refused.
extern "C" int answers(IPluginV3* plugin, int type) {
    IPluginV3* clone = plugin->clone();
    if (clone == nullptr) return -1;
    auto* build = static_cast<IPluginV3OneBuild*>(clone->getCapabilityInterface(PluginCapabilityType::kBUILD));
    const auto kind = static_cast<DataType>(type);
    const DataType types[6] = {kind, DataType::kINT32, DataType::kINT32, DataType::kFLOAT, kind, kind};
    const Dims dims[6] = {{4, {-1, -1, 2, 8}},        {2, {3, 2}},          {1, {3}},
                          {6, {-1, -1, 2, 3, 4, 2}}, {5, {-1, -1, 2, 3, 4}}, {3, {-1, -1, 16}}};
    DynamicPluginTensorDesc tensors[6]{};
    for (int i = 0; i < 6; ++i) {
        tensors[i].desc.type = types[i];
        tensors[i].desc.format = TensorFormat::kLINEAR;
        tensors[i].desc.dims = dims[i];
    }
    int result = 0;
    for (int i = 0; i < 6; ++i) result |= build->supportsFormatCombination(i, tensors, 5, 1) << i;
    DataType output{};
    result |= (build->getOutputDataTypes(&output, 1, types, 5) == 0 && output == kind) << 6;
    result |= (build->configurePlugin(tensors, 5, tensors + 5, 1) == 0) << 7;
    tensors[4].desc.dims.d[3] = 2;
    result |= (build->configurePlugin(tensors, 5, tensors + 5, 1) != 0) << 8;
    delete clone;
    return result;
}
"""


@pytest.fixture(scope="session")
def probe(tmp_path_factory, headers, nvcc):
    """A library that asks clones, for the Python binding of clone() returns nothing."""
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
        probe = ctypes.CDLL("{probe}").probe
        library.load_library(trt, path)
        fields = collect(group=(4, "int32"), group_channels=(16, "int64"), stride_h=(200, "int32"),
                         offset_scale=(2.0, "float32"), mask_softmax=(1, "int32"))
        result = {{}}
        for name in ("DCNv3", "DCNv3Packed", "TRTDCNv3"):
            for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
                plugin = library.find_creator(trt, name).create_plugin("layer", fields, phase)
                parts = [plugin.get_capability_interface(kind) for kind in (
                    trt.PluginCapabilityType.CORE, trt.PluginCapabilityType.BUILD, trt.PluginCapabilityType.RUNTIME)]
                whole = all(part is not None for part in parts)
                result[f"{{name}} {{phase.name}}"] = [whole, probe(address_of(plugin))]
        print(json.dumps(result))
        """,
    )
    # kernel 3 + 3, stride 200 + 1, pad 1 + 1, dilation 1 + 1, group 4, channels 16, softmax 1
    total = 232
    assert made == {
        f"{name} {phase}": [True, total]
        for name in ("DCNv3", "DCNv3Packed", "TRTDCNv3")
        for phase in ("BUILD", "RUNTIME")
    }


def test_ms_deform_attn_is_made_cloned_and_knows_its_tensors(plugin, probe):
    made = in_registry(
        plugin,
        f"""
        asked = ctypes.CDLL("{probe}")
        library.load_library(trt, path)
        creator = library.find_creator(trt, "{ms_deform_attn_contract.OP_TYPE}")
        result = {{}}
        for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
            plugin = creator.create_plugin("layer", collect(), phase)
            result[phase.name] = [asked.probe(address_of(plugin))]
            for kind in (trt.float32, trt.float16, trt.bfloat16, trt.int32):
                result[phase.name].append(asked.answers(address_of(plugin), int(kind)))
        try:
            result["attribute"] = creator.create_plugin("layer", collect(group=(4, "int32")), phase) is not None
        except Exception:
            result["attribute"] = False
        print(json.dumps(result))
        """,
    )
    right, integers = 0b111111111, 0b111001110  # values of an integer type are refused, nothing else changes
    answers = [0, right, right, right, integers]
    assert made == {"BUILD": answers, "RUNTIME": answers, "attribute": False}


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
