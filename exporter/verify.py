# SPDX-License-Identifier: Apache-2.0
"""Comparing an exported file with PyTorch on random input."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.exporter import decisions
from internimage_deploy.exporter.options import DEFAULT_TOLERANCE, SIZE_DIVISOR, ExportOptions
from internimage_deploy.onnx_tools.logits import LOGITS

if TYPE_CHECKING:
    import onnxruntime as ort

    from internimage_deploy.exporter.models import Segmentor

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8] | npt.NDArray[np.int32]

# (batch, height, width) compared where they are free: the smallest, a landscape, one larger than the traced size.
FREE_SIZES = ((1, 32, 32), (2, 64, 128), (1, 192, 160))
MIN_AGREEMENT = 0.999
# A group norm over a map of one cell normalises very few numbers, so that rounding shows more: in Mask2Former's pixel
# decoder, where a side of the image is 32 pixels.
SINGLE_CELL_FACTOR = 2


@dataclass(frozen=True)
class Check:
    """Settings of a comparison; `tolerance` bounds |ONNX - PyTorch| / max(1, largest |logit|)."""

    tolerance: float = DEFAULT_TOLERANCE
    seed: int = 0


DEFAULT_CHECK = Check()


@dataclass(frozen=True)
class Reference:
    """A random input in the file's own form, and PyTorch's logits (N, classes, H/4, W/4) for it.

    `decisions` are the logits behind each of its attention masks; see `exporter.decisions`.
    """

    input: Pixels
    size: tuple[int, int]
    logits: npt.NDArray[np.float32]
    seconds: float
    decisions: list[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Comparison:
    """`error` is the largest |ONNX - PyTorch| of a logit, `agreement` the fraction of equal labels."""

    shape: tuple[int, int, int]  # (batch, height, width)
    error: float
    largest: float  # |logit|
    agreement: float
    torch_seconds: float
    onnx_seconds: float

    @property
    def relative_error(self) -> float:
        """`error` relative to max(1, largest |logit|)."""
        return self.error / max(1.0, self.largest)


@dataclass(frozen=True)
class Report:
    """The comparisons of one file."""

    comparisons: tuple[Comparison, ...]

    @property
    def error(self) -> float:
        """The largest error relative to max(1, largest |logit|)."""
        return max(c.relative_error for c in self.comparisons)


def make_references(segmentor: Segmentor, options: ExportOptions, check: Check = DEFAULT_CHECK) -> list[Reference]:
    """Random inputs of every size to try, with PyTorch's logits; to be called before the segmentor is used up."""
    if options.size is not None:
        sizes: list[tuple[int, int, int]] = [(options.batch or 1, *options.size)]
    else:
        sizes = [(options.batch or batch, height, width) for batch, height, width in FREE_SIZES]
    rng = np.random.default_rng(check.seed)
    return [_reference(segmentor, options, rng, *size) for size in sizes]


def _reference(
    segmentor: Segmentor, options: ExportOptions, rng: np.random.Generator, batch: int, height: int, width: int
) -> Reference:
    from internimage_deploy.exporter.network import Normalize

    pixels: Pixels
    if options.input == "uint8":
        pixels = rng.integers(0, 256, (batch, height, width, 3), np.uint8)
        x = Normalize()(torch.from_numpy(pixels))
    else:
        pixels = rng.standard_normal((batch, 3, height, width), np.float32)
        x = torch.from_numpy(pixels)
    start = time.perf_counter()
    with torch.inference_mode(), decisions.recorded(segmentor) as masks:
        logits = segmentor(x)
    return Reference(pixels, (height, width), logits.numpy(), time.perf_counter() - start, masks)


def compare(path: Path, card: ModelCard, references: list[Reference], check: Check = DEFAULT_CHECK) -> Report:
    """Run the file on each reference's input in ONNX Runtime.

    Raises:
        UserError: the error exceeds the tolerance, or the labels are not those of the logits.
    """
    session, outputs, masks = _session(path, card)
    comparisons = []
    for reference in references:
        start = time.perf_counter()
        feeds = {card.input.name: reference.input, **decisions.inputs(reference.decisions)}
        results = dict(zip(outputs + masks, session.run(outputs + masks, feeds), strict=True))
        seconds = time.perf_counter() - start
        tolerance = check.tolerance * (SINGLE_CELL_FACTOR if masks and min(reference.size) == SIZE_DIVISOR else 1)
        decisions.check([results[name] for name in masks], reference.decisions, tolerance)
        logits = results[LOGITS]
        labels = labels_of(logits, reference.size)
        if card.emits_labels:
            _expect_labels(results[card.output.name], labels)
            labels = results[card.output.name]
        expected = labels_of(reference.logits, reference.size)
        comparison = Comparison(
            shape=(len(logits), *reference.size),
            error=float(np.abs(logits - reference.logits).max()),
            largest=float(np.abs(reference.logits).max()),
            agreement=float((labels == expected).mean()),
            torch_seconds=reference.seconds,
            onnx_seconds=seconds,
        )
        if not comparison.relative_error <= tolerance:
            raise UserError(
                f"the exported file disagrees with PyTorch: its relative error is {comparison.relative_error:.1e}, "
                f"expected at most {tolerance:.0e}; raise --tolerance, or keep the file unchecked with --no-verify"
            )
        comparisons.append(comparison)
    return Report(tuple(comparisons))


def _expect_labels(labels: Labels, expected: npt.NDArray[np.int64]) -> None:
    """Check the upsampling and the argmax inside the file; rounding may turn a tie."""
    agreement = float((labels == expected).mean()) if labels.shape == expected.shape else 0.0
    if agreement < MIN_AGREEMENT:
        raise UserError(
            f"the exported file's labels are not those of its logits: {100 * agreement:.2f} % agree, "
            f"expected at least {100 * MIN_AGREEMENT} %; report this with the checkpoint's name"
        )


def labels_of(logits: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The labels (N, H, W) that PyTorch computes from logits (N, classes, H/4, W/4) at network size."""
    upsampled = F.interpolate(torch.from_numpy(logits), size=size, mode="bilinear", align_corners=False)
    return upsampled.argmax(dim=1).numpy()


def _session(path: Path, card: ModelCard) -> tuple[ort.InferenceSession, list[str], list[str]]:
    """A session of the file, the names of its outputs, and those of its attention masks, which are inputs too.

    The logits are among the outputs whatever the file itself returns.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependency("onnxruntime", "export", "verifying an export (or use --no-verify)") from error
    import onnx

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if path.with_name(f"{path.name}.data").exists():  # weights of gigabytes: one copy is enough
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    model = onnx.load(str(path), load_external_data=False)
    if card.emits_labels:
        model.graph.output.append(onnx.helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, [None] * 4))
    masks = decisions.expose(model)
    probe = path.with_name(f".{path.name}.probe")
    try:
        probe.write_bytes(model.SerializeToString())
        session = ort.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
    finally:
        probe.unlink(missing_ok=True)
    return session, [card.output.name, LOGITS] if card.emits_labels else [card.output.name], masks
