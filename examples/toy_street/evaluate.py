# SPDX-License-Identifier: Apache-2.0
"""Score a model file on street scenes it has never seen.

    python examples/toy_street/evaluate.py MODEL.onnx [--count N] [--at-least MIOU]

paints held-out scenes, segments them with the runtime, and prints IoU by class and their mean. Exits with 1 if the
mean is below `--at-least`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from scenes import CLASSES, FIRST_HELD_OUT, scenes
from score import Score

from internimage_deploy import Segmenter, UserError


def evaluate(model: Path, count: int, *, backend: str = "auto", batch: int = 4) -> Score:
    """The score of a model file on the first `count` held-out scenes.

    Raises:
        UserError: the file cannot be loaded, or it has other classes.
    """
    with Segmenter.load(model, backend=backend, batch=batch) as segmenter:
        if segmenter.card.classes != CLASSES:
            raise UserError(
                f"{model} has {len(segmenter.card.classes)} classes, {segmenter.card.classes[0]} the first; "
                f"expected a model of {', '.join(CLASSES)}; train one with examples/toy_street/train.py"
            )
        made = scenes(range(FIRST_HELD_OUT, FIRST_HELD_OUT + count))
        score = Score(CLASSES)
        for start in range(0, count, batch):
            part = made[start : start + batch]
            for truth, result in zip(part, segmenter([item.image for item in part]), strict=True):
                score.add(truth.labels, result.labels)
    return score


def main() -> None:
    """Evaluate a model file and print the table."""
    parser = argparse.ArgumentParser(description="Score a model on held-out street scenes.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200, help="number of held-out scenes (default: 200)")
    parser.add_argument("--backend", default="auto", help="backend that runs the model (default: auto)")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="MIOU", help="exit with 1 below this mIoU")
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count: expected at least 1")
    started = time.perf_counter()
    try:
        score = evaluate(args.model, args.count, backend=args.backend)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(score.table())
    print(f"{args.count} held-out scenes, painted and segmented in {time.perf_counter() - started:.0f} s")
    if score.mean_iou() < args.at_least:
        sys.exit(f"error: mIoU {score.mean_iou():.3f}, expected at least {args.at_least}")


if __name__ == "__main__":
    main()
