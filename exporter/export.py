# SPDX-License-Identifier: Apache-2.0
"""A segmentor in PyTorch to one ONNX file that carries its model card."""

from __future__ import annotations

import contextlib
import logging
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from internimage_deploy._version import __version__
from internimage_deploy.card import METADATA_KEY, ModelCard, TensorSpec, label_dtype
from internimage_deploy.exporter import naming as graph
from internimage_deploy.exporter import rewrites, verify
from internimage_deploy.exporter.gelu import replace_gelu
from internimage_deploy.exporter.interrupt import insistent_interrupt
from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.network import Network
from internimage_deploy.exporter.opset import TRACED_OPSET, lower_opset
from internimage_deploy.exporter.options import SIZE_DIVISOR, ExportOptions
from internimage_deploy.exporter.progress import Step, silent
from internimage_deploy.exporter.symbolic import emit_nodes
from internimage_deploy.files import staging_folder

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 9  # the first in which a function may declare defaults for its attributes
EXTERNAL_DATA_ABOVE = 1_900_000_000  # bytes of weights; a protobuf message ends at 2 GiB
# Small, not square, odd numbers of 32-pixel cells, two pictures: no size in the graph equals another by chance.
TRACED_BATCH, TRACED_SIZE = 2, (96, 160)
MAX_SIDE, MAX_BATCH = 32768, 1024


@dataclass(frozen=True)
class ModelFacts:
    """What the model card says that the network itself does not know; see `ModelCard`."""

    architecture: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    resize: tuple[int, int] | None = None
    source: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the files, the card inside, and the verification's findings (None: not verified)."""

    path: Path
    external_data: Path | None
    card: ModelCard
    report: verify.Report | None


def export(
    segmentor: Segmentor,
    options: ExportOptions,
    facts: ModelFacts,
    target: Path,
    *,
    check: verify.Check | None = verify.DEFAULT_CHECK,
    step: Step = silent,
    external_data_above: int = EXTERNAL_DATA_ABOVE,
) -> Exported:
    """Write `segmentor` to the ONNX file `target`, check the file, and compare it with PyTorch.

    Weights beyond `external_data_above` bytes go into `target` + ".data" beside it. Either every file appears or none.

    Args:
        segmentor: is used up: its layers are replaced by what is exported, so it no longer runs in PyTorch.
        options: shape, interface and rewrites.
        facts: what else the model card tells.
        target: the file to write; an existing one is replaced.
        check: how to compare with PyTorch; None does not.
        step: is told about each long step.
        external_data_above: in bytes.

    Raises:
        UserError: the file cannot be written, or it disagrees with PyTorch by more than the tolerance.
    """
    with staging_folder(target) as stage, insistent_interrupt():
        references = []
        if check is not None:
            with step("reference"):
                references = verify.references(segmentor, options, check)
        applied = rewrites.apply(segmentor, options)
        card = _card(segmentor, options, facts, applied)
        with step("tracing"):
            model = trace(segmentor, options)
        with step("optimising"):
            finish(model, options, card)
        with step("writing"):
            path = stage / target.name
            external = save(model, path, external_data_above)
        del model
        segmentor.to("meta")  # frees the weights, of which the largest models have gigabytes
        with step("checking"):
            check_file(path)
        report = None
        if check is not None:
            with step("verifying"):
                report = verify.compare(path, card, references, check)
    return Exported(target, target.parent / external.name if external else None, card, report)


def trace(segmentor: Segmentor, options: ExportOptions) -> ir.Model:
    """The graph of `segmentor` as PyTorch's exporter writes it; the segmentor no longer runs afterwards."""
    emit_nodes(segmentor)
    replace_gelu(segmentor)
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
        program.optimize()
    return program.model


def finish(model: ir.Model, options: ExportOptions, card: ModelCard) -> None:
    """Turn the traced graph into the one that is shipped; see `graph`."""
    lower_opset(model, options.opset)
    graph.name_everything(model, card.input.name, card.output.name)
    graph.name_sizes(model)
    graph.add_function(model)
    graph.strip(model)
    model.ir_version = IR_VERSION
    model.graph.name = card.architecture
    model.metadata_props[METADATA_KEY] = card.to_json()


def save(model: ir.Model, path: Path, external_data_above: int = EXTERNAL_DATA_ABOVE) -> Path | None:
    """Write `model` to `path`; answers the file of its external data, if it needs one."""
    import onnx_ir as ir

    weights = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in weights if tensor is not None) <= external_data_above:
        ir.save(model, path)
        return None
    external = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=external.name)
    return external


def check_file(path: Path) -> None:
    """ONNX's own full check with shape inference. Raises `onnx.checker.ValidationError`: the exporter has a bug."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)


def _card(segmentor: Segmentor, options: ExportOptions, facts: ModelFacts, applied: tuple[str, ...]) -> ModelCard:
    batch = "batch" if options.batch is None else options.batch
    height, width = options.size or ("height", "width")
    quarter = tuple(side // 4 for side in options.size) if options.size else ("height/4", "width/4")
    classes = segmentor.config.head.num_classes
    takes = (
        TensorSpec("image", "uint8", (batch, height, width, 3))
        if options.input == "uint8"
        else TensorSpec("input", "float32", (batch, 3, height, width))
    )
    gives = (
        TensorSpec("labels", label_dtype(classes).__name__, (batch, height, width))
        if options.emit == "labels"
        else TensorSpec(graph.LOGITS, "float32", (batch, classes, *quarter))
    )
    tools = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
    return ModelCard(
        architecture=facts.architecture,
        classes=facts.classes,
        palette=facts.palette,
        input=takes,
        output=gives,
        resize=facts.resize,
        size_divisor=SIZE_DIVISOR,
        rewrites=applied,
        model=segmentor.config.asdict(),
        source=facts.source,
        tools={"internimage-deploy": __version__, "python": platform.python_version(), **tools},
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hush PyTorch's exporter: it warns of packages we need not and of its own deprecated calls."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
