# SPDX-License-Identifier: Apache-2.0
"""Graph changes that make ONNX Runtime faster on a CPU, made in memory while a model is loaded.

The file itself must not contain them, because they would slow it down or break it on a GPU.

`winograd`: a 3x3 convolution of stride 1 computes 4x4 outputs from 6x6 inputs with 36 products per pair of channels
instead of 144 (Winograd's minimal filtering F(4x4, 3x3), https://arxiv.org/abs/1509.09308):
Y = A^T ((G g G^T) * (B^T d B)) A. The transform of the input is a convolution of stride 4 with one kernel for all
channels, the products are 36 matrix products over channels, the inverse transform is a transposed convolution.
Exact in real arithmetic; in float32 the error of one layer is some 1e-6 of its range (direct: 2e-7), because the points
0, 1, -1, 2, -1/2 keep the transforms' numbers small. ONNX Runtime has no such algorithm of its own, and half precision
would not stand it. The transformed kernels G g G^T are left to constant folding, so that weights stay where they are:
in memory or in an external file, neither read nor copied here.

`labels-last`: upsampling and argmax with the classes innermost, where the argmax reads neighbouring numbers. The same
operations on the same numbers; TensorRT-RTX 1.7 cannot compile the Resize this needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from internimage_deploy.card import Array

if TYPE_CHECKING:
    import onnx

TILE = 4  # outputs per tile and direction
_POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-1, 2))  # and infinity
_MIN_CHANNELS = 128  # below, the transforms cost more than the products save
_MIN_PIXELS = 64 * 64  # below, reading the transformed kernels, four times the size, costs more
_UPSAMPLING = 4


def adapt(model: onnx.ModelProto) -> int:
    """Make every applicable change, in place; returns the number of changes.

    A graph with a damaged node is left alone, for the backend to refuse.
    """
    if any(not _is_whole(node) for node in model.graph.node):
        return 0
    return labels_last(model) + winograd(model)


_ATTRIBUTE_TYPES = {  # of the attributes that are read here: onnx.AttributeProto's INT, STRING and INTS
    **dict.fromkeys(("axis", "keepdims", "group"), 2),
    "auto_pad": 3,
    **dict.fromkeys(("strides", "dilations", "pads"), 7),
}
_MIN_INPUTS = {"ArgMax": 1, "Resize": 1, "Conv": 2}


def _is_whole(node: onnx.NodeProto) -> bool:
    """Whether a node has the inputs, output and attribute types that are read here."""
    if node.op_type not in _MIN_INPUTS:
        return True
    return (
        len(node.input) >= _MIN_INPUTS[node.op_type]
        and len(node.output) >= 1
        and all(_ATTRIBUTE_TYPES.get(entry.name, entry.type) == entry.type for entry in node.attribute)
    )


def labels_last(model: onnx.ModelProto) -> int:
    """Resize -> ArgMax over axis 1 becomes Transpose -> Resize -> ArgMax over axis 3; returns how often."""
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    done = 0
    for argmax in [node for node in graph.node if node.op_type == "ArgMax" and _attribute(node, "axis", 0) == 1]:
        resize = producer.get(argmax.input[0])
        if resize is None or resize.op_type != "Resize" or _attribute(argmax, "keepdims", 1):
            continue
        scales = _constant(graph, f"{resize.name}/scales", np.array([1, _UPSAMPLING, _UPSAMPLING, 1], np.float32))
        logits, last = resize.input[0], f"{resize.name}/channels_last"
        _insert_before(graph, resize, _node("Transpose", [logits], last, perm=[0, 2, 3, 1]))
        del resize.input[:]
        resize.input.extend([last, "", scales])
        for attribute in argmax.attribute:
            if attribute.name == "axis":
                attribute.i = 3
        _drop_value_info(graph, resize.output[0])
        done += 1
    return done


def winograd(model: onnx.ModelProto) -> int:
    """Replace every 3x3 convolution that profits by transforms and matrix products; returns how many."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    sizes = _known_sizes(model)
    done = 0
    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        if conv.input[1] not in weights or not _fits(conv, weights[conv.input[1]].dims, sizes.get(conv.output[0])):
            continue
        if weights[conv.input[1]].data_type != 1:  # float32
            continue
        _replace(graph, conv, tuple(weights[conv.input[1]].dims))
        done += 1
    return done


def transforms() -> tuple[Array, Array, Array]:
    """A^T (4, 6), G (6, 3) and B^T (6, 6) of F(4, 3), float64: y = A^T ((G g) * (B^T d)).

    With V_k the Vandermonde matrix of the points (infinity's row picks the highest power), A^T = V_4^T, G = V_3 and
    B^T = V_6^-T (Toom and Cook). B^T's rows are scaled to a largest entry of 1 and G's rows by the inverse.
    """

    def vandermonde(powers: int) -> Array:
        rows = [[point**power for power in range(powers)] for point in _POINTS]
        return np.array([*rows, [0] * (powers - 1) + [1]], dtype=np.float64)

    inverse = np.linalg.inv(vandermonde(TILE + 2).T)
    size = np.abs(inverse).max(1, keepdims=True)
    return vandermonde(TILE).T, vandermonde(3) * size, inverse / size


def _fits(conv: onnx.NodeProto, kernel: Sequence[int], size: tuple[int, int] | None) -> bool:
    if len(kernel) != 4 or tuple(kernel[2:]) != (3, 3) or min(kernel[:2]) < _MIN_CHANNELS:
        return False
    plain = _attribute(conv, "group", 1) == 1 and _attribute(conv, "auto_pad", b"NOTSET") == b"NOTSET"
    ones = all(list(_attribute(conv, name, [1, 1])) == [1, 1] for name in ("strides", "dilations"))
    padded = list(_attribute(conv, "pads", [0] * 4)) == [1] * 4
    if not (plain and ones and padded) or size is None or size[0] % TILE or size[1] % TILE:
        return False
    return size[0] * size[1] >= _MIN_PIXELS


def _replace(graph: onnx.GraphProto, conv: onnx.NodeProto, kernel: tuple[int, ...]) -> None:
    out_channels, in_channels = kernel[:2]
    tile, elements, name = TILE + 2, (TILE + 2) ** 2, conv.name or conv.output[0]
    output_transform, kernel_transform, input_transform = transforms()
    x, weight, y = conv.input[0], conv.input[1], conv.output[0]
    bias = conv.input[2] if len(conv.input) > 2 else ""

    def shared(role: str, value: Array) -> str:
        return _constant(graph, f"winograd/{role}", value)

    # Kronecker squares: a 2-D transform is the 1-D one along rows and columns.
    to_products = (
        np.einsum("ia,jb->ijab", input_transform, input_transform).reshape(elements, 1, tile, tile).astype(np.float32)
    )
    from_products = (
        np.einsum("pi,qj->ijpq", output_transform, output_transform).reshape(elements, 1, TILE, TILE).astype(np.float32)
    )
    of_kernel = np.einsum("ia,jb->abij", kernel_transform, kernel_transform).reshape(9, elements).astype(np.float32)
    steps: list[onnx.NodeProto] = []

    def step(op_type: str, inputs: list[str], role: str, **attributes: Any) -> str:
        steps.append(_node(op_type, inputs, role if role == y else f"{name}/winograd/{role}", **attributes))
        return str(steps[-1].output[0])

    ints = {
        role: shared(role, np.array(value, np.int64))
        for role, value in {
            f"kernel_rows_{out_channels}x{in_channels}": [out_channels, in_channels, 9],
            "one": [1],
            "inferred": [-1],
            "elements": [elements],
            f"channels_{in_channels}": [in_channels],
            f"channels_{out_channels}": [out_channels],
            "side": [TILE],
        }.items()
    }
    rows = step("Reshape", [weight, ints[f"kernel_rows_{out_channels}x{in_channels}"]], "kernel_rows")
    mixed = step("MatMul", [rows, shared("of_kernel", of_kernel)], "kernel_products")
    kernel_matrices = step("Transpose", [mixed], "kernel_matrices", perm=[2, 0, 1])  # (36, O, C)

    batch, height, width = (step("Shape", [x], role, start=i, end=i + 1) for role, i in (("n", 0), ("h", 2), ("w", 3)))
    tiles_h = step("Div", [height, ints["side"]], "tiles_h")
    tiles_w = step("Div", [width, ints["side"]], "tiles_w")
    planes_shape = step("Concat", [ints["inferred"], ints["one"], height, width], "planes_shape", axis=0)
    planes = step("Reshape", [x, planes_shape], "planes")  # (N*C, 1, H, W)
    read = step(
        "Conv", [planes, shared("to_products", to_products)], "read", strides=[TILE, TILE], pads=[1] * 4
    )  # (N*C, 36, H/4, W/4)
    read_shape = step(
        "Concat", [batch, ints[f"channels_{in_channels}"], ints["elements"], ints["inferred"]], "rs", axis=0
    )
    read = step("Transpose", [step("Reshape", [read, read_shape], "read_4d")], "read_by_element", perm=[2, 1, 0, 3])
    flat_shape = step(
        "Concat", [ints["elements"], ints[f"channels_{in_channels}"], ints["inferred"]], "flat_shape", axis=0
    )
    product = step("MatMul", [kernel_matrices, step("Reshape", [read, flat_shape], "flat")], "products")
    wide_shape = step(
        "Concat", [ints["elements"], ints[f"channels_{out_channels}"], batch, ints["inferred"]], "wide_shape", axis=0
    )
    wide = step("Transpose", [step("Reshape", [product, wide_shape], "wide")], "by_channel", perm=[2, 1, 0, 3])
    grid_shape = step("Concat", [ints["inferred"], ints["elements"], tiles_h, tiles_w], "grid_shape", axis=0)
    grid = step("Reshape", [wide, grid_shape], "grid")  # (N*O, 36, H/4, W/4)
    written = step("ConvTranspose", [grid, shared("from_products", from_products)], "written", strides=[TILE, TILE])
    shape = step("Concat", [batch, ints[f"channels_{out_channels}"], height, width], "shape", axis=0)
    if bias:
        result = step("Reshape", [written, shape], "result")
        column = shared(f"column_{out_channels}", np.array([1, out_channels, 1, 1], np.int64))
        step("Add", [result, step("Reshape", [bias, column], "bias")], y)
    else:
        step("Reshape", [written, shape], y)
    for new in steps:
        _insert_before(graph, conv, new)
    graph.node.remove(conv)


def _known_sizes(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Height and width of every value (N, C, H, W); for free sizes an example with the divisors of all.

    "height/4" of a height that is a multiple of 32 is a multiple of 8, and of no more: 17 * 32 stands for the height.
    """

    def number(dim: onnx.TensorShapeProto.Dimension) -> int:
        if dim.HasField("dim_value"):
            return int(dim.dim_value)
        name, _, divisor = dim.dim_param.partition("/")
        known = name in ("height", "width") and divisor in ("", "1", "2", "4", "8", "16", "32")
        return 17 * 32 // int(divisor or 1) if known else 1

    sizes = {}
    for value in model.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4:
            sizes[value.name] = (number(dims[2]), number(dims[3]))
    return sizes


def _node(op_type: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    import onnx

    return onnx.helper.make_node(op_type, inputs, [output], name=output, **attributes)


def _insert_before(graph: onnx.GraphProto, place: onnx.NodeProto, node: onnx.NodeProto) -> None:
    graph.node.insert(list(graph.node).index(place), node)


def _constant(graph: onnx.GraphProto, name: str, value: Array) -> str:
    """Add an initializer unless there is one of that name."""
    import onnx

    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return name


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _drop_value_info(graph: onnx.GraphProto, name: str) -> None:
    """Drop the recorded shape of a value whose shape changed."""
    for value in [info for info in graph.value_info if info.name == name]:
        graph.value_info.remove(value)
