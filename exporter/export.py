# SPDX-License-Identifier: Apache-2.0
"""Exporting a checkpoint, or a segmentor in memory, to one ONNX file that carries its model card."""

from __future__ import annotations

import gc
import logging
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from internimage_deploy._version import __version__
from internimage_deploy.card import MAX_SIDE, METADATA_KEY, ModelCard, TensorSpec, label_dtype
from internimage_deploy.datasets.classes import Palette, lookup, read_classes, read_palette
from internimage_deploy.errors import UserError, quoted
from internimage_deploy.exporter import naming, rewrites
from internimage_deploy.exporter.checkpoint import read_checkpoint
from internimage_deploy.exporter.interrupt import repeat_keyboard_interrupt
from internimage_deploy.exporter.opset import lower_opset
from internimage_deploy.exporter.options import (
    DEFAULT_OPSET,
    DEFAULT_TOLERANCE,
    SIZE_DIVISOR,
    Activation,
    Emit,
    ExportOptions,
    Input,
)
from internimage_deploy.exporter.source import SourceModel, StatedLabels, random_model
from internimage_deploy.exporter.tracing import trace
from internimage_deploy.exporter.verify import DEFAULT_CHECK, Check, Report, compare, make_references
from internimage_deploy.files import staging_folder
from internimage_deploy.onnx_tools.logits import LOGITS

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 9  # the first in which a function may declare defaults for its attributes
EXTERNAL_DATA_ABOVE = 1_900_000_000  # bytes of weights; a protobuf message ends at 2 GiB

# progress("tracing") is a context manager that lasts as long as the step of that name.
Progress = Callable[[str], AbstractContextManager[object]]

_log = logging.getLogger("internimage_deploy.exporter")


@dataclass(frozen=True)
class ExportedModel:
    """The result of an export.

    Attributes:
        path: the ONNX file.
        external_data: the file beside it that holds the weights, where they are too large for one file.
        card: the model card inside the file.
        report: the comparison with PyTorch; None where it was switched off.
        notes: what was dropped, assumed or guessed while the checkpoint was read, one sentence each, and the names of
            the objects in it that were not rebuilt.
    """

    path: Path
    external_data: Path | None
    card: ModelCard
    report: Report | None
    notes: tuple[str, ...] = ()


def no_progress(step: str) -> AbstractContextManager[object]:
    """Show nothing."""
    return nullcontext(step)


def export(
    checkpoint: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    random: str | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    input: Input = "uint8",
    emit: Emit = "labels",
    arch: str | None = None,
    offset_scale: float | None = None,
    post_norm_blocks: Iterable[int] | None = None,
    activation: Activation | None = None,
    attention_heads: int | None = None,
    norm_groups: int | None = None,
    ema: bool = False,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    palette: str | os.PathLike[str] | Sequence[Sequence[int]] | None = None,
    resize: tuple[int, int] | Literal["own"] | None = None,
    plain: bool = False,
    without: Iterable[str] = (),
    opset: int = DEFAULT_OPSET,
    verify: bool = True,
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
    progress: Progress = no_progress,
) -> ExportedModel:
    """Export an InternImage segmentation checkpoint to one portable ONNX file that carries its model card.

    The file runs in ONNX Runtime as it is, and `build_engine` compiles it for TensorRT. It is checked by ONNX and
    compared with PyTorch on random input before it takes its place: either every file appears or none.

    Args:
        checkpoint: the official checkpoint (.pth); None where `random` names a released model.
        output: the ONNX file to write, its name ending in `.onnx`; an existing one is replaced. Weights of more than
            1.9 GB go into OUTPUT.data beside it.
        random: name of a released model to export with random weights, for tests and timing, such as
            "upernet_internimage_t_512_160k_ade20k".
        size: fixed (height, width) of the network's input in pixels, multiples of 32. None leaves both free: the file
            takes every size that is a multiple of 32.
        batch: fixed number of images per run. None means 1 with a fixed `size`, and a free batch size without.
        input: "uint8" for an input `image` (N, H, W, 3), RGB 0 to 255, uint8, normalised inside the graph; "float"
            for an input `input` (N, 3, H, W), float32, already normalised.
        emit: "labels" for an output `labels` (N, H, W) at network size, uint8 (int32 above 256 classes); "logits" for
            an output `logits` (N, classes, H/4, W/4), float32.
        arch: name of the released model that the checkpoint belongs to, for settings that neither the weights nor the
            training config in the checkpoint show.
        offset_scale: DCNv3's offset scale, where nothing else states it (L and XL: 2.0, other released models: 1.0).
        post_norm_blocks: indices of the blocks of level 2 that a post-norm follows, where nothing else states them.
        activation: the activation function, where nothing else states it.
        attention_heads: Mask2Former's number of attention heads, where nothing else states it.
        norm_groups: number of groups of Mask2Former's group norms, where nothing else states it (released models: 32).
        ema: take the exponential moving average of the weights where the checkpoint holds both.
        classes: class names, where the checkpoint lacks them: a data set's name such as "cityscapes", a text file with
            one name per line, or the names in the order of the ids.
        palette: colours, where the checkpoint lacks them: a data set's name, a file with a line "red green blue" per
            class or a JSON list of triples, or the triples, each value from 0 to 255.
        resize: (long, short) in pixels that the runtime resizes images to fit into, keeping their aspect ratio, or
            "own" for the image's own size, where the checkpoint does not state what it was evaluated with.
        plain: leave out every algebraic rewrite, to measure what they gain. One that a free size needs stays.
        without: names of single rewrites to leave out; `internimage_deploy.exporter.rewrites.REWRITES` has them all.
        opset: version of the standard operators: 16, 17 or 18.
        verify: compare the file with PyTorch on random input, at several sizes where the size is free.
        tolerance: maximum of |ONNX - PyTorch| / max(1, largest |logit|) that passes the comparison.
        seed: seed of the random weights and of the comparison's input.
        progress: called with the name of each long step ("loading", "reference", "tracing", "optimising", "writing",
            "checking", "verifying"); returns a context manager that lasts as long as the step.

    Returns:
        Where the file is, its card, the comparison with PyTorch and notes on what the checkpoint left open. The notes
        are also logged.

    Raises:
        UserError: an argument does not fit, the checkpoint cannot be read or is of another kind of model, the file
            cannot be written, or it disagrees with PyTorch by more than `tolerance`.
        MissingDependency: `verify` is set and ONNX Runtime is not installed.
    """
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise UserError(
            f"checkpoint: got {type(checkpoint).__name__}, expected the path of a .pth or .safetensors file; save the "
            "state_dict() of a model first"
        )
    source, target = None if checkpoint is None else Path(checkpoint), Path(output)
    if (source is None) == (random is None):
        raise UserError("expected either a checkpoint or the name of a released model in random=, not both or neither")
    check_paths(source, target)
    options = ExportOptions(
        size=size,
        batch=1 if batch is None and size is not None else batch,
        input=input,
        emit=emit,
        plain=plain,
        without=tuple(without),
        opset=opset,
    )
    stated = StatedLabels(
        classes=None if classes is None else read_classes(classes)[0],
        palette=_stated_palette(classes, palette),
        resize=None if resize is None else _checked_resize(resize),
    )
    rewrites.select(options)  # refuses what cannot be left out before any work is done
    with staging_folder(target):  # a folder that cannot be written to is found before the checkpoint is read
        pass
    with progress("loading"):
        if source is not None:
            model = read_checkpoint(
                source,
                arch=arch,
                offset_scale=offset_scale,
                post_norm_blocks=None if post_norm_blocks is None else tuple(post_norm_blocks),
                act_layer=activation,
                attention_heads=attention_heads,
                norm_groups=norm_groups,
                ema=ema,
                stated=stated,
            )
        else:
            assert random is not None
            model = random_model(random, seed, stated)
    for note in model.notes:
        _log.info("note: %s", note)
    for detail in model.details:
        _log.debug("note: %s", detail)
    return export_model(model, options, target, check=Check(tolerance, seed) if verify else None, progress=progress)


def _stated_palette(
    classes: str | os.PathLike[str] | Sequence[str] | None,
    palette: str | os.PathLike[str] | Sequence[Sequence[int]] | None,
) -> Palette | None:
    """The colours that the user states, by themselves or with a data set's name as `classes`."""
    if palette is not None:
        return read_palette(palette)
    known = lookup(classes) if isinstance(classes, str) else None
    return None if known is None else known[1]


def _checked_resize(resize: object) -> tuple[int, int] | Literal["own"]:
    match resize:
        case "own":
            return "own"
        case (int(first), int(second)) if min(first, second) > 0 and max(first, second) <= MAX_SIDE:
            return max(first, second), min(first, second)
    raise UserError(f"resize: got {quoted(resize)}, expected (long, short) in pixels up to {MAX_SIDE:,}, or 'own'")


def check_paths(checkpoint: Path | None, output: Path) -> None:
    """Check that `output` can be the name of the exported file.

    Raises:
        UserError: the name does not end in .onnx, or it is the checkpoint's own file.
    """
    if output.suffix.lower() != ".onnx":
        raise UserError(f"{output}: the commands that read the file know it by its ending; name it {output}.onnx")
    if checkpoint is not None and checkpoint.exists() and output.exists() and output.samefile(checkpoint):
        raise UserError(f"{output} is the checkpoint itself; name another file")


def export_model(
    model: SourceModel,
    options: ExportOptions,
    target: Path,
    *,
    check: Check | None = DEFAULT_CHECK,
    progress: Progress = no_progress,
    external_data_above: int = EXTERNAL_DATA_ABOVE,
) -> ExportedModel:
    """Write `model` to the ONNX file `target`, check the file, and compare it with PyTorch.

    Weights beyond `external_data_above` bytes go into `target` + ".data" beside it. Either every file appears or none.

    Args:
        model: its segmentor is used up: the layers are replaced by what is exported, so it no longer runs in PyTorch.
        options: shape, interface and rewrites.
        target: the file to write; an existing one is replaced.
        check: how to compare with PyTorch; None skips the comparison.
        progress: see `export`.
        external_data_above: in bytes.

    Raises:
        UserError: the file cannot be written, or it disagrees with PyTorch by more than the tolerance.
    """
    segmentor = model.segmentor
    with staging_folder(target) as stage, repeat_keyboard_interrupt():
        references = []
        if check is not None:
            with progress("reference"):
                references = make_references(segmentor, options, check)
        applied = rewrites.apply(segmentor, options)
        card = _card(model, options, applied)
        with progress("tracing"):
            graph = trace(segmentor, options)
        with progress("optimising"):
            finish(graph, options, card)
        with progress("writing"):
            path = stage / target.name
            external = save(graph, path, external_data_above)
        # The largest models have gigabytes of weights, which the traced graph keeps in cycles of references.
        del graph
        segmentor.to("meta")
        gc.collect()
        with progress("checking"):
            check_file(path)
        report = None
        if check is not None:
            with progress("verifying"):
                report = compare(path, card, references, check)
    return ExportedModel(
        target, target.parent / external.name if external else None, card, report, model.notes + model.details
    )


def finish(model: ir.Model, options: ExportOptions, card: ModelCard) -> None:
    """Turn the traced graph into the one that is shipped; see `naming`."""
    lower_opset(model, options.opset)
    naming.name_everything(model, card.input.name, card.output.name)
    naming.name_sizes(model)
    naming.add_functions(model)
    naming.strip(model)
    model.ir_version = IR_VERSION
    model.graph.name = card.architecture
    model.metadata_props[METADATA_KEY] = card.to_json()


def save(model: ir.Model, path: Path, external_data_above: int = EXTERNAL_DATA_ABOVE) -> Path | None:
    """Write `model` to `path`; returns the file of its external data, if it needs one."""
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


def _card(model: SourceModel, options: ExportOptions, applied: tuple[str, ...]) -> ModelCard:
    batch = "batch" if options.batch is None else options.batch
    height, width = options.size or ("height", "width")
    quarter = tuple(side // 4 for side in options.size) if options.size else ("height/4", "width/4")
    config = model.segmentor.config
    classes = config.head.num_classes
    input_spec = (
        TensorSpec("image", "uint8", (batch, height, width, 3))
        if options.input == "uint8"
        else TensorSpec("input", "float32", (batch, 3, height, width))
    )
    output_spec = (
        TensorSpec("labels", label_dtype(classes).__name__, (batch, height, width))
        if options.emit == "labels"
        else TensorSpec(LOGITS, "float32", (batch, classes, *quarter))
    )
    tools = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
    return ModelCard(
        architecture=model.architecture,
        classes=model.classes,
        palette=model.palette,
        input=input_spec,
        output=output_spec,
        resize=model.resize,
        window=model.window,
        size_divisor=SIZE_DIVISOR,
        rewrites=applied,
        model=config.asdict(),
        source=model.source,
        tools={"internimage-deploy": __version__, "python": platform.python_version(), **tools},
    )
