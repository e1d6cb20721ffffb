# SPDX-License-Identifier: Apache-2.0
"""Nodes of a graph for TensorRT that one plugin replaces, exactly.

`pack_offset_masks`: the exporter computes the offsets and the mask of a DCNv3 layer by one product and takes them apart
with two Slice nodes. A slice of the innermost axis is a copy in TensorRT, and a kernel of its own; the plugin
`DCNv3Packed` reads both from the product's result. InternImage-T has 30 such layers: 60 kernels less.
A layer whose product has an odd number of columns (27 per group, in the first stages of InternImage-S and -B) keeps its
slices: pairs of 16-bit offsets would straddle words there, and the kernel for such operands is slower.

`fuse_argmax`: a network ends with its logits upsampled to four times their size and an argmax over the classes, which
in TensorRT write and read all classes at full size: 157 MB for 150 classes at 512x512. The plugin `UpsampleArgmax`
reads the logits and writes the labels. It interpolates in float32, so labels of a float16 engine see less rounding.

`allow_half`: an attribute for the DCNv3 plugins, see `contract.PLUGIN_ATTRIBUTES`.

The columns are not rearranged to 32 per group, the width that would make every access a vector: that writes and reads a
fifth more for the offsets and the mask, which only a measurement could weigh against fewer accesses.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from internimage_deploy.onnx_tools.graph import Graph, attribute, consumers, drop_unused
from internimage_deploy.operators import contract, upsample_argmax


def pack_offset_masks(graph: Graph) -> int:
    """Make the plugin of every DCNv3 node that can read offsets and mask from one tensor do so, in place.

    Returns the number of these nodes.
    """
    find = _Finder(graph)
    packed = 0
    for node in graph.nodes:
        if (node.domain, node.op_type) != (contract.DOMAIN, contract.OP_TYPE):
            continue
        sides = (attribute(node, "kernel_h", 3), attribute(node, "kernel_w", 3))
        points = attribute(node, "group", 0) * sides[0] * sides[1]
        source, offset = find.slice_of_channels(node.input[1])
        other, mask = find.slice_of_channels(node.input[2])
        # With an open end, the mask's own number of channels says that nothing follows it.
        fits = (
            offset == (0, 2 * points)
            and mask is not None
            and mask[0] == 2 * points
            and mask[1] >= np.iinfo(np.int32).max
        )
        if source == other and fits and 3 * points % 2 == 0:
            node.op_type = contract.PACKED_OP_TYPE
            node.input[1] = source
            del node.input[2:]
            packed += 1
    if packed:
        drop_unused(graph)
    return packed


def fuse_argmax(graph: Graph) -> int:
    """Replace every upsampling by 4 that an argmax over the classes follows by the plugin, in place.

    Returns the number of these pairs.
    """
    find = _Finder(graph)
    outputs = {value.name for value in graph.model.graph.output}
    readers = consumers(graph.nodes)
    fused: set[str] = set()
    for node in graph.nodes:
        if node.op_type != "ArgMax" or node.domain:
            continue
        resize = find.producers.get(node.input[0])
        lowest_of_equal = attribute(node, "select_last_index", 0) == 0
        classes = attribute(node, "axis", 0) in (1, -3) and attribute(node, "keepdims", 1) == 0
        alone = len(readers[node.input[0]]) == 1 and node.input[0] not in outputs
        if resize is None or not (lowest_of_equal and classes and alone and find.upsamples_by_4(resize)):
            continue
        node.op_type, node.domain = upsample_argmax.OP_TYPE, contract.DOMAIN
        node.input[0] = resize.input[0]
        del node.attribute[:]
        fused.update((node.output[0], resize.output[0]))
    if not fused:
        return 0
    drop_unused(graph)
    # Labels are int32 now.
    kept = [value for value in graph.model.graph.value_info if value.name not in fused]
    del graph.model.graph.value_info[:]
    graph.model.graph.value_info.extend(kept)
    return len(fused) // 2


def allow_half(graph: Graph) -> None:
    """Let the plugins of DCNv3 nodes choose kernels that interpolate float16 values in float16, in place."""
    for node in graph.nodes:
        if node.domain == contract.DOMAIN and node.op_type in (contract.OP_TYPE, contract.PACKED_OP_TYPE):
            node.attribute.append(helper.make_attribute("allow_half", 1))


class _Finder:
    """Looks back from a value to what computes it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = {name: node for node in graph.nodes for name in node.output}
        self.stored = graph.initializers()

    def constant(self, name: str) -> list[float] | None:
        """The numbers of a small stored tensor or `Constant`, flat; None for anything else."""
        producer = self.producers.get(name)
        if producer is not None and producer.op_type == "Constant":
            tensor = attribute(producer, "value")
        else:
            tensor = self.stored.get(name)
        if not isinstance(tensor, onnx.TensorProto):
            return None
        values: list[float] = self.graph.array(tensor).ravel().tolist()
        return values

    def upsamples_by_4(self, node: onnx.NodeProto) -> bool:
        """True for a bilinear Resize of images to four times their height and width, with half-pixel centres."""
        if node.op_type != "Resize" or node.domain or len(node.input) != 3:
            return False
        # The second mode differs for sides of one pixel alone, which nothing upsampled by 4 has.
        centres = attribute(node, "coordinate_transformation_mode", b"half_pixel")
        return (
            attribute(node, "mode", b"nearest") == b"linear"
            and centres in (b"half_pixel", b"pytorch_half_pixel")
            and not attribute(node, "exclude_outside", 0)
            and not attribute(node, "axes", [])
            and self.constant(node.input[2]) == [1, 1, upsample_argmax.FACTOR, upsample_argmax.FACTOR]
        )

    def slice_of_channels(self, name: str) -> tuple[str, tuple[float, float] | None]:
        """The value of four dimensions whose last one is cut, with start and end; `name` and None without a slice."""
        node = self.producers.get(name)
        if node is None or node.op_type != "Slice" or len(node.input) < 4:
            return name, None
        starts, ends, axes = (self.constant(part) for part in node.input[1:4])
        steps = self.constant(node.input[4]) if len(node.input) > 4 and node.input[4] else [1]
        if axes not in ([3], [-1]) or steps != [1] or starts is None or ends is None:
            return name, None
        return node.input[0], (starts[0], ends[0])
