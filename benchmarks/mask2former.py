# SPDX-License-Identifier: Apache-2.0
"""Mask2Former's head alone on the CPU, interleaved: the plain export and ours.  Writes results/mask2former.json.

    python benchmarks/mask2former.py [--heads wide,narrow] [--size 512x512] [--threads 2]

In the place of the backbone stand pooling and a 1x1 convolution for each of its four maps, which cost next to nothing.
Weights are random; labels are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cpu import backend_call, plain_session
from torch import Tensor, nn

import report
from internimage_deploy.datasets.classes import generic
from internimage_deploy.exporter.export import export_model
from internimage_deploy.exporter.models import Segmentor, build_random
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.presets import PRESETS
from internimage_deploy.exporter.source import SourceModel
from internimage_deploy.onnx_tools.cost import multiply_adds
from internimage_deploy.onnx_tools.model_file import read_model
from internimage_deploy.timing import measure
from report import Json

HEADS = {
    "wide": "mask2former_internimage_h_896_80k_cocostuff2ade20k",
    "narrow": "mask2former_internimage_h_1024x1024_80k_mapillary2cityscapes",
}


class Maps(nn.Module):
    """Stands for a backbone: (N, 3, H, W) to four maps (N, channels * 2**i, H / 2**(i+2), W / 2**(i+2))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.ParameterList(
            nn.Parameter(torch.randn(channels << i, 3, 1, 1, generator=generator), requires_grad=False)
            for i in range(4)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.conv2d(F.avg_pool2d(x, 4 << i), weight) for i, weight in enumerate(self.mix)]


def head_alone(name: str) -> Segmentor:
    """The released model `name` with random weights and no backbone."""
    config = PRESETS[name].config
    least = replace(config.backbone, depths=(1, 1, 1, 1), level2_post_norm_block_ids=())  # it is thrown away
    segmentor = build_random(replace(config, backbone=least))
    segmentor.backbone = Maps(config.backbone.channels)
    return segmentor


def row(head: str, size: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Json]:
    """The plain export in ONNX Runtime, ours there, and ours as the runtime runs it."""
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        files, macs = {}, {}
        for kind in ("plain", "ours"):
            files[kind] = Path(folder) / f"{kind}.onnx"
            segmentor = head_alone(HEADS[head])
            model = SourceModel(segmentor, HEADS[head], *generic(segmentor.config.head.num_classes))
            without = ("stem-normalisation", *arguments.without)  # the stem is thrown away
            options = ExportOptions(size=size, batch=1, plain=kind == "plain", without=without)
            card = export_model(model, options, files[kind], check=None).card
            macs[kind] = sum(multiply_adds(read_model(files[kind]), card, size, Path(folder)).values())
            del segmentor, model
        calls: dict[str, Callable[[], np.ndarray]] = {
            "plain export, ONNX Runtime": plain_session(files["plain"], image, arguments.threads),
            "ours in plain ONNX Runtime": plain_session(files["ours"], image, arguments.threads),
            "ours, onnxruntime": backend_call(files["ours"], "onnxruntime", image, arguments.threads),
        }
        expected = calls["plain export, ONNX Runtime"]()
        differ = {key: float((call() != expected).mean()) for key, call in calls.items()}
        # A mask logit within rounding error of zero may fall on either side, and moves its query a little.
        if max(differ.values()) > 0.01:
            raise SystemExit(f"labels differ: {differ}")
        times = measure(calls, runs=arguments.runs, warmup=1, seconds=arguments.seconds)
    return {
        "head": head,
        "size": list(size),
        "multiply_adds_g": {kind: round(count / 1e9, 1) for kind, count in macs.items()},
        "times": {key: {**timing.asdict(), "labels_differ": differ[key]} for key, timing in times.items()},
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="wide,narrow")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=180, help="maximum time per head, in seconds")
    parser.add_argument("--without", action="append", default=[], help="rewrite to leave out of ours; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    height, width = map(int, arguments.size.split("x"))
    rows = []
    for head in arguments.heads.split(","):
        rows.append(row(head, (height, width), arguments))
        report.write("mask2former", rows, threads=arguments.threads)
        plain = rows[-1]["times"]["plain export, ONNX Runtime"]["median_ms"]
        print(f"== {head}, {arguments.size}: G multiply-adds {rows[-1]['multiply_adds_g']}")
        for key, timing in rows[-1]["times"].items():
            print(f"  {key:28} median {timing['median_ms']:8.0f} ms  x {timing['median_ms'] / plain:.3f}")


if __name__ == "__main__":
    main()
