# SPDX-License-Identifier: Apache-2.0
"""DCNv3 nodes as the parser needs them: with the function for TensorRT-RTX, as plugin nodes for TensorRT.

Whether a function or a plugin of the same name wins changed twice between versions of TensorRT's parser, and a plugin's
namespace counts in some and not in others. A node without a function, with `plugin_version` and `plugin_namespace`
written on it, means the plugin in all of them.
"""

from __future__ import annotations

import onnx
from onnx import helper

from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import Graph, attribute, node_name
from internimage_deploy.operators import contract

_NAMES = {(contract.DOMAIN, contract.OP_TYPE), (contract.OFFICIAL_DOMAIN, contract.OFFICIAL_OP_TYPE)}


def dcnv3_nodes(graph: Graph) -> list[onnx.NodeProto]:
    """The DCNv3 nodes of the main graph, ours and the official exporter's."""
    return [node for node in graph.nodes if (node.domain, node.op_type) in _NAMES]


def rename_official(graph: Graph) -> int:
    """Turn `mmdeploy::TRTDCNv3` nodes into `internimage::DCNv3`; returns how many there were.

    Raises:
        UserError: a node has an attribute that the operator does not know.
    """
    known = {entry.name for entry in contract.ATTRIBUTES}
    renamed = 0
    for node in dcnv3_nodes(graph):
        if node.op_type != contract.OFFICIAL_OP_TYPE:
            continue
        kept = [entry for entry in node.attribute if entry.name != "im2col_step"]
        for entry in kept:
            if entry.name not in known:
                raise UserError(f"node {node_name(node)}: {node.op_type} has an unknown attribute '{entry.name}'")
        del node.attribute[:]
        node.attribute.extend(kept)
        node.op_type, node.domain = contract.OP_TYPE, contract.DOMAIN
        renamed += 1
    if renamed:
        imports = [entry for entry in graph.model.opset_import if entry.domain != contract.OFFICIAL_DOMAIN]
        del graph.model.opset_import[:]
        graph.model.opset_import.extend(imports)
        if not any(entry.domain == contract.DOMAIN for entry in imports):
            graph.model.opset_import.append(helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION))
    return renamed


def to_plugin_nodes(graph: Graph) -> None:
    """Drop the function and make every DCNv3 node name the plugin, in place."""
    functions = [f for f in graph.model.functions if (f.domain, f.name) not in _NAMES]
    del graph.model.functions[:]
    graph.model.functions.extend(functions)
    for node in dcnv3_nodes(graph):
        _write_default_attributes(node)
        for name, text in (
            ("plugin_version", contract.PLUGIN_VERSION),
            ("plugin_namespace", contract.PLUGIN_NAMESPACE),
        ):
            if attribute(node, name) is None:
                node.attribute.append(helper.make_attribute(name, text))


def _write_default_attributes(node: onnx.NodeProto) -> None:
    """Add the attributes that the node leaves at their defaults: the parser passes on only those that it has."""
    for entry in contract.ATTRIBUTES:
        if attribute(node, entry.name) is not None:
            continue
        if entry.default is None:
            raise UserError(f"node {node_name(node)}: the attribute '{entry.name}' is missing; export the model again")
        value = float(entry.default) if entry.type == "float" else int(entry.default)
        node.attribute.append(helper.make_attribute(entry.name, value))
