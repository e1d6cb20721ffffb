# SPDX-License-Identifier: Apache-2.0
"""Tracing a segmentor with PyTorch's ONNX exporter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from internimage_deploy.exporter.gelu import replace_gelu
from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.models.mask2former import split_projections
from internimage_deploy.exporter.network import Network
from internimage_deploy.exporter.opset import TRACED_OPSET
from internimage_deploy.exporter.options import SIZE_DIVISOR, ExportOptions
from internimage_deploy.exporter.symbolic import emit_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

# Small, not square, odd numbers of 32-pixel cells, two images: no size in the graph equals another by chance.
TRACED_BATCH, TRACED_SIZE = 2, (96, 160)
MAX_SIDE, MAX_BATCH = 32768, 1024


def trace(segmentor: Segmentor, options: ExportOptions) -> ir.Model:
    """The graph of `segmentor` as PyTorch's exporter writes it; the segmentor no longer runs afterwards."""
    emit_nodes(segmentor)
    replace_gelu(segmentor)
    split_projections(segmentor)
    network = Network(segmentor, options).eval()
    batch = options.batch or (TRACED_BATCH if options.batch is None else 1)
    height, width = options.size or TRACED_SIZE
    if options.input == "uint8":
        example = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
        axes = (1, 2)
    else:
        example = torch.zeros(batch, 3, height, width)
        axes = (2, 3)
    shapes = {}
    if options.batch is None:
        shapes[0] = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    if options.size is None:
        for axis, name in zip(axes, ("height", "width"), strict=True):
            shapes[axis] = SIZE_DIVISOR * torch.export.Dim(f"{name}_cells", min=1, max=MAX_SIDE // SIZE_DIVISOR)
    with _quiet(), torch.no_grad():
        exported = torch.export.export(network, (example,), dynamic_shapes=(shapes,) if shapes else None, strict=False)
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=TRACED_OPSET, optimize=False, verbose=False, profile=False
        )
        assert program is not None
        model = program.model
        _simplify(model)
    return model


def _simplify(model: ir.Model) -> None:
    """Inline functions, compute what is constant, and keep one of everything that is there twice.

    `ONNXProgram.optimize` also applies onnxscript's pattern rules: a fifth of the time for a few nodes of shape
    arithmetic, and the rules, which are global, keep every weight they have seen alive.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    passes.InlinePass()(model)
    for _ in range(2):  # what the first round folds makes more constant
        optimizer.fold_constants(model, onnx_shape_inference=True)
        optimizer.remove_unused_nodes(model)
    for node in model.graph:  # PyTorch's exporter gives a convolution without bias one of zeros
        if node.op_type == "Conv" and len(node.inputs) == 3 and _is_zero(node.inputs[2]):
            node.resize_inputs(2)
    optimizer.remove_unused_nodes(model)
    for step in (
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        step(model)


def _is_zero(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.const_value.numpy().any()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence PyTorch's exporter: it warns of packages we need not and of its own deprecated calls.

    Its optimiser tells of norms over constants that it does not compute; the rewrites leave none.
    """
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
