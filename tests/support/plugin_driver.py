# SPDX-License-Identifier: Apache-2.0
"""A plugin driven as TensorRT drives it, through the C functions of tests/trt_plugins/cpp/driver.cpp."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager

import ml_dtypes
import numpy as np

FLOAT, HALF, INT8, INT32, BF16 = 0, 1, 2, 3, 7
CODES = {"float32": FLOAT, "float16": HALF, "bfloat16": BF16, "int32": INT32}
TYPES = {"float32": (FLOAT, np.float32), "float16": (HALF, np.float16), "bfloat16": (BF16, ml_dtypes.bfloat16)}
LINEAR, CHW4 = 0, 3
FIELD = {"float16": 0, "float32": 1, "float64": 2, "int8": 3, "int16": 4, "int32": 5, "int64": 10}
INVALID_VALUE = 1  # cudaErrorInvalidValue


def rows(shapes):
    """Shapes as driver.cpp takes them: the number of dimensions, then eight."""
    return np.array([(len(s), *s, *([0] * (8 - len(s)))) for s in shapes], np.int64)


class Driver:
    """The plugins of one library; every plugin it makes is destroyed at the end."""

    def __init__(self, library, interface):
        self.lib = ctypes.CDLL(str(library))
        self.interface = interface
        for name in ("create", "create_from_nothing", "clone", "reload"):
            getattr(self.lib, f"driver_{name}").restype = ctypes.c_void_p
        for name in ("take_log", "field_names", "name", "timing_id"):
            if hasattr(self.lib, f"driver_{name}"):
                getattr(self.lib, f"driver_{name}").restype = ctypes.c_char_p
        self.lib.driver_start()
        self.made = []

    def log(self):
        return self.lib.driver_take_log().decode()

    def create(self, creator="DCNv3", types=None, lengths=None, **attributes):
        types = types or {}
        lengths = lengths or {}
        arrays = []
        for name, value in attributes.items():
            default = "float32" if isinstance(value, float) else "int32"
            arrays.append(None if value is None else np.array(value, types.get(name, default)).reshape(-1))
        count = len(arrays)
        codes = [FIELD[types.get(n, "float32" if isinstance(v, float) else "int32")] for n, v in attributes.items()]
        plugin = self.lib.driver_create(
            creator.encode(),
            count,
            (ctypes.c_char_p * count)(*(name.encode() for name in attributes)),
            (ctypes.c_int32 * count)(*codes),
            (ctypes.c_void_p * count)(*(0 if a is None else a.ctypes.data for a in arrays)),
            (ctypes.c_int32 * count)(
                *(lengths.get(n, 0 if a is None else a.size) for n, a in zip(attributes, arrays, strict=True))
            ),
        )
        return self.keep(plugin)

    def create_from_nothing(self, creator):
        return self.keep(self.lib.driver_create_from_nothing(ctypes.c_char_p(creator.encode())))

    def field_names(self, creator):
        return set(self.lib.driver_field_names(ctypes.c_char_p(creator.encode())).decode().split())

    def keep(self, plugin):
        if plugin:
            self.made.append(plugin)
        return plugin

    def call(self, name, plugin, *arguments):
        return getattr(self.lib, f"driver_{name}")(ctypes.c_void_p(plugin), *arguments)

    def _described(self, name, plugin, shapes, types, *arguments):
        """Call a function that takes all tensors: inputs, then the output. `types`: one code, or one per tensor."""
        dims = rows(shapes)
        codes = [types] * len(shapes) if isinstance(types, int) else types
        return self.call(
            name, plugin, ctypes.c_void_p(dims.ctypes.data), (ctypes.c_int32 * len(shapes))(*codes), len(shapes) - 1,
            *arguments,
        )  # fmt: skip

    def configure(self, plugin, shapes, types, inputs=None):
        return self._described("configure", plugin, shapes, types, len(shapes) - 1 if inputs is None else inputs)

    def shape_change(self, plugin, shapes, types):
        return self._described("shape_change", plugin, shapes, types)

    def enqueue(self, plugin, operands, output, shapes=None):
        """Run on the arrays, with their own shapes unless others are claimed."""
        tensors = [*operands, output]
        pointers = (ctypes.c_void_p * len(operands))(*(a.ctypes.data for a in operands))
        types = [CODES[a.dtype.name] for a in tensors]
        own = [a.shape for a in tensors]
        return self._described(
            "enqueue", plugin, shapes or own, types, pointers, ctypes.c_void_p(output.ctypes.data)
        )  # fmt: skip

    def output_shape(self, plugin, shapes):
        """The shape for inputs of `shapes`, all of them dynamic; None if the plugin refuses."""
        dims = rows(shapes)
        output = np.zeros(8, np.int64)
        rank = self.call(
            "output_shape", plugin, ctypes.c_void_p(dims.ctypes.data), len(shapes), ctypes.c_void_p(output.ctypes.data)
        )
        return None if rank < 0 else tuple(output[:rank].tolist())

    def supports(self, plugin, position, types, formats, inputs, outputs=1):
        count = position + 1
        codes = (ctypes.c_int32 * count)(*types[:count])
        layouts = (ctypes.c_int32 * count)(*formats[:count])
        return bool(self.call("supports", plugin, position, codes, layouts, inputs, outputs))

    def tactics(self, plugin):
        buffer = (ctypes.c_int32 * 64)()
        return list(buffer[: self.call("tactics", plugin, buffer)])

    def close(self):
        for plugin in self.made:
            self.call("destroy", plugin)


@contextmanager
def driving(library, interface):
    """A driver of `library(interface)`, whose launches succeed again afterwards."""
    made = Driver(library(interface), interface)
    yield made
    made.lib.driver_fail_launches(0)
    made.close()
