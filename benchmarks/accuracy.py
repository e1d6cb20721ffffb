# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the demo's models in every form that an export has.  Writes results/accuracy.json.

    python benchmarks/accuracy.py [--scenes 200] [MODEL ...]

Every variant segments the same held-out scenes, in ONNX Runtime on the CPU: mIoU, and the fraction of pixels whose
label differs from that of the plain export. The float16 graph is the one that `build-engine --fp16` compiles.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

import report
from internimage_deploy import Segmenter, export
from internimage_deploy.onnx_tools.graph import Graph, save
from internimage_deploy.runtime.engine.precision import convert

FOLDER = Path(__file__).parents[1] / "examples" / "toy_street"
MODELS = ("toy_street", "toy_street_mask2former")
sys.path.insert(0, str(FOLDER))

from scenes import CLASSES, FIRST_HELD_OUT, SIZE, scenes  # noqa: E402 (the example's folder is not a package)
from score import Score  # noqa: E402


def variants(checkpoint: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every variant, the plain export first."""
    plain, free, fixed, half = (folder / f"{name}.onnx" for name in ("plain", "free", "fixed", "half"))
    export(checkpoint, plain, size=SIZE, plain=True)
    yield "plain export", plain
    export(checkpoint, free)
    yield "export for any size", free
    export(checkpoint, fixed, size=SIZE)
    yield "export for one size", fixed
    graph = Graph(onnx.load(free), folder)
    convert(graph, "fp16")
    save(graph, half)
    yield "any size, float16", half


def segment(model: Path, images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Labels (N, H, W)."""
    with Segmenter.load(model, backend="onnxruntime") as segmenter:
        return np.stack([segmenter(image).labels for image in images])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="checkpoints of examples/toy_street, without .pth")
    parser.add_argument("--scenes", type=int, default=200, help="number of held-out scenes (default: 200)")
    arguments = parser.parse_args()
    made = scenes(range(FIRST_HELD_OUT, FIRST_HELD_OUT + arguments.scenes))
    images, truth = [scene.image for scene in made], np.stack([scene.labels for scene in made])
    rows = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            reference = None
            for name, path in variants(FOLDER / f"{model}.pth", Path(folder)):
                labels = segment(path, images)
                reference = labels if reference is None else reference
                score = Score(CLASSES)
                score.add(truth, labels)
                rows.append(
                    {
                        "model": model,
                        "variant": name,
                        "miou": round(score.mean_iou(), 5),
                        "labels_differ": round(float(np.mean(labels != reference)), 8),
                    }
                )
                print(rows[-1], flush=True)
                report.write("accuracy", rows, scenes=arguments.scenes)


if __name__ == "__main__":
    main()
