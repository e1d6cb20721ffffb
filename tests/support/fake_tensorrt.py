# SPDX-License-Identifier: Apache-2.0
"""A module `tensorrt` made from NVIDIA's type stubs: every name, attribute and argument must be one that they know.

What little it does: parsing reads the ONNX file's inputs and outputs, a "plan" is the ONNX file itself, and executing
it runs ONNX Runtime on the memory that was bound.
"""

import ast
import ctypes
import importlib.metadata
import inspect
import json
import re
import weakref
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx

from internimage_deploy.onnx_tools.graph import Graph, element_types
from internimage_deploy.trt_plugins import library
from support.fake_cuda import STREAMS
from support.plugin_functions import define_plugins

NUMPY = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.INT32: "INT32"}
DTYPES = {"FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32}


def repaired(text):
    """The stubs' text as Python: an argument called `in`, and ones without a default after others with one."""
    return re.sub(r"(channel_axis: int)(?=\))", r"\1 = 0", re.sub(r"\bin: ", "in_: ", text))


def stub_file(name):
    """The text of a file of the stubs."""
    (file,) = (f for f in importlib.metadata.files("tensorrt-stubs") if str(f) == name)
    return repaired(Path(file.locate()).read_text())


@cache
def stubs():
    """{class name: its definition} of the stubs."""
    tree = ast.parse(stub_file("tensorrt_bindings/tensorrt.pyi"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


class Member(int):
    """A member of an enumeration."""

    def __new__(cls, value, name):
        member = super().__new__(cls, value)
        member.name = name
        return member


def signatures(definition):
    """{method: [signature, ...]}, {attribute} and {member: value} of a class."""
    methods, attributes, members = {}, set(), {}
    for node in definition.body:
        if isinstance(node, ast.FunctionDef):
            if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
                attributes.add(node.name)
                continue
            arguments = node.args
            first = len(arguments.args) - len(arguments.defaults)
            kinds = inspect.Parameter
            parameters = [
                kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=None if i >= first else kinds.empty)
                for i, a in enumerate(arguments.args)
            ]
            if arguments.vararg:
                parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
            methods.setdefault(node.name, []).append(inspect.Signature(parameters))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            attributes.add(node.target.id)
    if "__members__" in attributes:
        names = sorted(name for name in attributes if re.fullmatch(r"[A-Z][A-Z0-9_]*", name))
        members = {name: index for index, name in enumerate(names)}
    return methods, attributes, members


def make(version="10.13.0", *, without=()):
    """The module. `without` names what an older or newer version lacks: "Class.member" or "Class".

    `module.used` collects the (class, member) pairs that the program touched, `module.contexts` how many `runs` and
    `bound` addresses each execution context had.
    """
    module = ModuleType("tensorrt")
    module.__version__ = version
    module.used = set()
    module.configs, module.loaded, module.contexts = [], [], []
    module.alive = weakref.WeakSet()  # execution contexts that are not deleted
    for name, definition in stubs().items():
        if name not in without:
            setattr(module, name, _class(module, name, definition, without))
    _behave(module)
    return module


def _class(module, name, definition, without):
    methods, attributes, members = signatures(definition)
    bases = [base.id for base in definition.bases if isinstance(base, ast.Name)]
    for base in bases:
        if base in stubs():
            more_methods, more_attributes, _ = signatures(stubs()[base])
            methods = {**more_methods, **methods}
            attributes = attributes | more_attributes
    if members:
        body = {m: Member(v, m) for m, v in members.items() if f"{name}.{m}" not in without}
        body["__members__"] = dict(body)
        return type(name, (), body)

    def gone(member):
        return f"{name}.{member}" in without

    def __init__(self, *args, **kwargs):
        if "__init__" in methods:
            _bind(name, "__init__", methods["__init__"], (self, *args), kwargs)
        hook = getattr(type(self), "_made", None)
        if hook:
            hook(self, *args, **kwargs)

    def __setattr__(self, attribute, value):
        if type(self).__module__ == "tensorrt" and attribute not in attributes and not attribute.startswith("_"):
            raise AttributeError(f"tensorrt.{name} has no attribute {attribute}")
        if attribute in attributes:
            module.used.add((name, attribute))
        if gone(attribute):
            raise AttributeError(f"tensorrt.{name}.{attribute} is not in version {module.__version__}")
        object.__setattr__(self, attribute, value)

    body = {attribute: None for attribute in attributes if not gone(attribute)}
    body |= {"__init__": __init__, "__setattr__": __setattr__, "__module__": "tensorrt"}
    for node in definition.body:
        if isinstance(node, ast.ClassDef):
            body[node.name] = _class(module, node.name, node, without)
    for method, known in methods.items():
        if method not in ("__init__", "__del__") and not method.startswith("__") and not gone(method):
            body[method] = _method(module, name, method, known)
    return type(name, (), body)


def _method(module, name, method, known):
    def call(self, *args, **kwargs):
        module.used.add((name, method))
        _bind(name, method, known, (self, *args), kwargs)
        hook = getattr(type(self), f"_{method}", None)
        return hook(self, *args, **kwargs) if hook else True

    call.__name__ = method
    return call


def _bind(name, method, known, args, kwargs):
    for signature in known:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            continue
        return
    raise TypeError(f"tensorrt.{name}.{method}: no overload takes {args[1:]}, {kwargs}")


def _behave(trt):
    """What the parts do, attached under the method's name with an underscore before it."""
    registry = trt.IPluginRegistry()
    trt.get_plugin_registry = lambda: registry
    trt.own_plugins = []  # namespaces
    trt.init_libnvinfer_plugins = lambda logger, namespace: trt.own_plugins.append(namespace) is None

    def hook(cls, name):
        def put(function):
            setattr(cls, f"_{name}", function)
            return function

        return put

    key = {"plugin_version": "1", "plugin_namespace": ""}

    @hook(trt.IPluginRegistry, "load_library")
    def load_library(self, path):
        trt.loaded.append(path)
        made = [type("Creator", (), {"name": name} | key)() for name in library.CREATORS]
        object.__setattr__(self, "all_creators", made)
        return object()

    object.__setattr__(registry, "all_creators", [])
    object.__setattr__(registry, "plugin_creator_list", [])

    @hook(trt.Builder, "create_network")
    def create_network(self, flags=0):
        network = trt.INetworkDefinition()
        object.__setattr__(network, "_flags", flags)
        return network

    @hook(trt.Builder, "create_builder_config")
    def create_builder_config(self):
        config = trt.IBuilderConfig()
        state = {"_flags": {"TF32"}, "_preview": set(), "_profiles": [], "_limits": {}, "_cache": None}
        for name, value in state.items():
            object.__setattr__(config, name, value)
        trt.configs.append(config)
        return config

    hook(trt.Builder, "create_optimization_profile")(lambda self: trt.IOptimizationProfile())

    @hook(trt.IOptimizationProfile, "set_shape")
    def set_shape(self, input, min, opt, max):
        object.__setattr__(self, "_shapes", (input, min, opt, max))

    @hook(trt.IBuilderConfig, "add_optimization_profile")
    def add_optimization_profile(self, profile):
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    hook(trt.IBuilderConfig, "set_flag")(lambda self, flag: self._flags.add(flag.name))
    hook(trt.IBuilderConfig, "clear_flag")(lambda self, flag: self._flags.discard(flag.name))

    @hook(trt.IBuilderConfig, "set_preview_feature")
    def set_preview_feature(self, feature, enable):
        (self._preview.add if enable else self._preview.discard)(feature.name)

    hook(trt.IBuilderConfig, "set_memory_pool_limit")(
        lambda self, pool, pool_size: self._limits.__setitem__(pool.name, pool_size)
    )

    @hook(trt.IBuilderConfig, "create_timing_cache")
    def create_timing_cache(self, data):
        if bytes(data).startswith(b"damaged"):
            return None
        cache = trt.ITimingCache()
        object.__setattr__(cache, "_data", bytes(data))
        return cache

    @hook(trt.IBuilderConfig, "set_timing_cache")
    def set_timing_cache(self, cache, ignore_mismatch):
        if cache is None:
            raise TypeError("set_timing_cache(): incompatible function arguments")
        if cache._data.startswith(b"foreign"):
            return False
        object.__setattr__(self, "_cache", cache)
        return True

    @hook(trt.ITimingCache, "combine")
    def combine(self, input_cache, ignore_mismatch):
        if input_cache._data.startswith(b"foreign"):
            return False
        _add_timings(self, *input_cache._data.split())
        return True

    hook(trt.IBuilderConfig, "get_timing_cache")(lambda self: self._cache)
    hook(trt.ITimingCache, "serialize")(lambda self: self._data)

    @hook(trt.OnnxParser, "made")
    def parser_made(self, network, logger):
        object.__setattr__(self, "_network", network)
        object.__setattr__(self, "num_errors", 0)

    @hook(trt.OnnxParser, "parse")
    def parse(self, model, path=None):
        proto = onnx.load_from_string(model)
        for kind, values in (("input", proto.graph.input), ("output", proto.graph.output)):
            tensors = [_tensor(trt, value) for value in values]
            object.__setattr__(self._network, f"num_{kind}s", len(tensors))
            object.__setattr__(self._network, f"_{kind}s", tensors)
        types = element_types(Graph(proto, Path()))
        layers = [_layer(trt, node, types) for node in proto.graph.node]
        object.__setattr__(self._network, "num_layers", len(layers))
        object.__setattr__(self._network, "_layers", layers)
        object.__setattr__(self._network, "_model", (bytes(model), path))
        return True

    hook(trt.INetworkDefinition, "get_layer")(lambda self, index: self._layers[index])
    hook(trt.ILayer, "get_output")(lambda self, index: self._outputs[index])
    hook(trt.ILayer, "set_output_type")(lambda self, index, dtype: self._output_types.__setitem__(index, dtype.name))
    hook(trt.INetworkDefinition, "get_input")(lambda self, index: self._inputs[index])
    hook(trt.INetworkDefinition, "get_output")(lambda self, index: self._outputs[index])

    @hook(trt.Builder, "build_serialized_network")
    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            for step in range(2):
                if not monitor.step_complete("Building engine", step):
                    return None
            monitor.phase_finish("Building engine")
        if config._cache is not None:
            _add_timings(config._cache, b"measured")
        profiles = [[list(shape) for shape in profile[1:]] for profile in config._profiles]
        sharing = "PROFILE_SHARING_0806" in config._preview
        plan = {"folder": network._model[1], "profiles": profiles, "sharing": sharing}
        return json.dumps(plan).encode() + b"\n" + network._model[0]

    @hook(trt.Runtime, "deserialize_cuda_engine")
    def deserialize_cuda_engine(self, serialized_engine):
        head, _, model = bytes(serialized_engine).partition(b"\n")
        engine = trt.ICudaEngine()
        object.__setattr__(engine, "_plan", json.loads(head))
        object.__setattr__(engine, "_session", session_of(model, Path(engine._plan["folder"]).parent))
        sharing = engine._plan["sharing"] or int(trt.__version__.partition(".")[0]) >= 10
        object.__setattr__(engine, "_sharing", sharing)
        return engine

    @hook(trt.ICudaEngine, "create_execution_context")
    def create_execution_context(self, strategy=None):
        context = trt.IExecutionContext()
        # Profile 0 is assigned by itself, without profile sharing to the first execution context only.
        first = not any(other._engine is self for other in trt.alive)
        profile = 0 if self._sharing or first or not self._plan["profiles"] else None
        counts = SimpleNamespace(runs=0, bound=0)
        state = {"_engine": self, "_profile": profile, "_shapes": {}, "_addresses": {}, "_counts": counts}
        for name, value in state.items():
            object.__setattr__(context, name, value)
        trt.alive.add(context)
        trt.contexts.append(counts)
        return context

    @hook(trt.IExecutionContext, "set_optimization_profile_async")
    def set_optimization_profile_async(self, profile_index, stream_handle):
        # NVIDIA's binding raises where the C++ method answers false (python/src/infer/pyCore.cpp).
        taken = any(
            other is not self and other._engine is self._engine and other._profile == profile_index
            for other in trt.alive
        )
        if (taken and not self._engine._sharing) or profile_index >= max(len(self._engine._plan["profiles"]), 1):
            raise RuntimeError("Error in set optimization profile async.")
        object.__setattr__(self, "_profile", profile_index)
        self._shapes.clear()
        return True

    @hook(trt.IExecutionContext, "set_input_shape")
    def set_input_shape(self, name, shape):
        profiles = self._engine._plan["profiles"]
        if profiles:
            if self._profile is None:
                return False
            smallest, _, largest = profiles[self._profile]
            if not all(low <= side <= high for low, side, high in zip(smallest, shape, largest, strict=True)):
                return False
        self._shapes[name] = tuple(shape)
        return True

    hook(trt.IExecutionContext, "infer_shapes")(lambda self: [] if self._shapes else ["input"])

    @hook(trt.IExecutionContext, "get_tensor_shape")
    def get_tensor_shape(self, name):
        return _compute(self, np.zeros(*_input(self))).shape

    @hook(trt.IExecutionContext, "set_tensor_address")
    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        self._counts.bound += 1
        return memory != 0 and memory % 256 == 0

    @hook(trt.IExecutionContext, "execute_async_v3")
    def execute_async_v3(self, stream_handle):
        source, target = self._addresses[_in(self).name], self._addresses[_out(self).name]
        shape, dtype = _input(self)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize

        def work():
            batch = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(source), dtype).reshape(shape)
            output = _compute(self, batch)
            ctypes.memmove(target, output.ctypes.data, output.nbytes)

        self._counts.runs += 1
        STREAMS[stream_handle].put(work)
        return True


def session_of(model, folder):
    """An ONNX Runtime session of a plan's model, in which the operator's ONNX function plays the plugin."""
    import onnxruntime as ort

    proto = onnx.load_from_string(model)
    if not proto.functions:
        define_plugins(proto)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _tensor(trt, value):
    tensor = trt.ITensor()
    object.__setattr__(tensor, "name", value.name)
    object.__setattr__(tensor, "dtype", getattr(trt.DataType, NUMPY[value.type.tensor_type.elem_type]))
    object.__setattr__(tensor, "shape", [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim])
    return tensor


def _add_timings(cache, *timings):
    """Put timings, which are words, into a timing cache."""
    object.__setattr__(cache, "_data", b" ".join(sorted({*cache._data.split(), *timings})))


def _layer(trt, node, types):
    """The layer of a node. In a weakly typed network every floating-point tensor is FLOAT before the build."""
    layer = trt.ILayer()
    outputs = []
    for name in node.output:
        tensor = trt.ITensor()
        kind = types[name]
        kind = onnx.TensorProto.FLOAT if kind == onnx.TensorProto.FLOAT16 else kind
        object.__setattr__(tensor, "dtype", getattr(trt.DataType, NUMPY.get(kind, "INT32")))
        object.__setattr__(tensor, "is_shape_tensor", False)
        outputs.append(tensor)
    kinds = {"Cast": "CAST", "Constant": "CONSTANT", "Softmax": "SOFTMAX", "Shape": "SHAPE"}
    kind = getattr(trt.LayerType, "PLUGIN_V2" if node.domain else kinds.get(node.op_type, "ELEMENTWISE"))
    state = {"name": node.name, "type": kind, "num_outputs": len(outputs), "_outputs": outputs, "_output_types": {}}
    for name, value in state.items():
        object.__setattr__(layer, name, value)
    return layer


def _in(context):
    return context._engine._session.get_inputs()[0]


def _out(context):
    return context._engine._session.get_outputs()[0]


def _input(context):
    kind = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[_in(context).type]
    return context._shapes[_in(context).name], kind


def _compute(context, batch):
    return np.ascontiguousarray(context._engine._session.run(None, {_in(context).name: batch})[0])
