# SPDX-License-Identifier: Apache-2.0
"""Make the README's figure: held-out scenes, the labels that a model computes for them, and the overlay.

python examples/toy_street/picture.py MODEL.onnx docs/toy_street.png [--seed SEED]...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scenes import CLASSES, FIRST_HELD_OUT, PALETTE, scene

from internimage_deploy import Segmenter

_GAP = 4  # pixels of white between images
_LEGEND = 22  # height of the strip of class names


def strip(segmenter: Segmenter, seed: int) -> NDArray[np.uint8]:
    """Image, labels and overlay of one scene, side by side."""
    result = segmenter(scene(seed).image)
    return _join([result.image, result.colors(), result.overlay(0.55)], axis=1)


def legend(width: int) -> NDArray[np.uint8]:
    """The class names beside their colours, in one row."""
    row = np.full((_LEGEND, width, 3), 255, np.uint8)
    cell = width / len(CLASSES)
    for index, (name, colour) in enumerate(zip(CLASSES, PALETTE, strict=True)):
        x = int(index * cell)
        row[5:17, x + 2 : x + 14] = colour
        cv2.putText(row, name, (x + 18, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1, cv2.LINE_AA)
    return row


def _join(parts: list[NDArray[np.uint8]], axis: int) -> NDArray[np.uint8]:
    shape = list(parts[0].shape)
    shape[axis] = _GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, gap)][:-1], axis=axis)


def main() -> None:
    """Segment the scenes and write the figure."""
    parser = argparse.ArgumentParser(description="Make the README's figure.")
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, action="append", help="a scene to show; may be repeated")
    args = parser.parse_args()
    with Segmenter.load(args.model) as segmenter:
        rows = [strip(segmenter, seed) for seed in args.seed or (FIRST_HELD_OUT + 7, FIRST_HELD_OUT + 11)]
    whole = _join([*rows, legend(rows[0].shape[1])], axis=0)
    # 256 colours: a third of the size, and no difference that a README shows.
    Image.fromarray(whole).quantize(256).save(args.output, optimize=True)
    print(f"{args.output}: {whole.shape[1]}x{whole.shape[0]}, {args.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
