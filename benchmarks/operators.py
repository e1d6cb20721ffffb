# SPDX-License-Identifier: Apache-2.0
"""Spatial operators at equal channels, from 14x14 to 128x128.  Writes results/operators.json and a plot in docs/.

    python benchmarks/operators.py [--quick] [--channels 64] [--threads 2]

The question that DCNv3's authors start from: what does it cost to let a pixel see its surroundings? 3x3 convolution,
depthwise 7x7, modulated deformable convolution (DCNv2), DCNv3, multi-head attention and windowed attention (7x7), all
in PyTorch with their projections, batch 1, float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import report
from internimage_deploy.exporter.models import DCNv3, dcnv3
from internimage_deploy.timing import measure
from report import Json

SIZES = (14, 28, 56, 96, 128)
HEAD = 16  # channels per head and per group
WINDOW = 7


class DCNv2(nn.Module):
    """Modulated deformable 3x3 convolution: sigmoid masks, one dense kernel, no groups."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.sampling = nn.Conv2d(channels, 27, 3, padding=1)
        self.weight = nn.Linear(9 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = self.sampling(x).permute(0, 2, 3, 1)
        offset, mask = parts[..., :18].reshape(n, h, w, 9, 2), parts[..., 18:].sigmoid()
        y, x_ = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        points = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).float()
        place = torch.stack((x_, y), -1)[None, :, :, None] + points + offset
        grid = (2 * place + 1) / torch.tensor([w, h]) - 1
        samples = F.grid_sample(x, grid.view(n, h, w * 9, 2), align_corners=False).view(n, c, h, w, 9)
        columns = (samples * mask[:, None]).permute(0, 2, 3, 1, 4).reshape(n, h, w, 9 * c)
        return self.weight(columns).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over all pixels, or over windows of 7x7."""

    def __init__(self, channels: int, window: int | None) -> None:
        super().__init__()
        self.heads, self.window = channels // HEAD, window
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1)
        if self.window is None:
            return self.attend(x.reshape(n, h * w, c)).view(n, h, w, c).permute(0, 3, 1, 2)
        s = self.window
        x = F.pad(x, (0, 0, 0, -w % s, 0, -h % s))
        rows, columns = x.shape[1] // s, x.shape[2] // s
        parts = x.view(n, rows, s, columns, s, c).transpose(2, 3).reshape(-1, s * s, c)
        y = self.attend(parts).view(n, rows, columns, s, s, c).transpose(2, 3).reshape(n, rows * s, columns * s, c)
        return y[:, :h, :w].permute(0, 3, 1, 2)

    def attend(self, x: Tensor) -> Tensor:
        b, length, c = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, length, c))


class ChannelsLast(nn.Module):
    """A layer that works on (N, H, W, C) behind (N, C, H, W)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def contestants(c: int) -> dict[str, tuple[nn.Module, Callable[[int], int]]]:
    """Name to module, and its multiply-adds for a number of pixels."""
    group = c // HEAD
    layer = DCNv3(
        c,
        group,
        dw_kernel_size=3,
        offset_scale=1.0,
        center_feature_scale=False,
        norm_layer="LN",
        act_layer="GELU",
    )
    layer.operator = dcnv3

    def windowed(p: int) -> int:
        side = math.ceil(math.sqrt(p) / WINDOW) * WINDOW
        return side * side * (4 * c * c + 2 * WINDOW * WINDOW * c)

    return {
        "3x3 convolution": (nn.Conv2d(c, c, 3, padding=1), lambda p: p * 9 * c * c),
        "depthwise 7x7": (nn.Conv2d(c, c, 7, padding=3, groups=c), lambda p: p * 49 * c),
        # Sampling is four multiply-adds per sample and channel, the mask one.
        "DCNv2": (DCNv2(c), lambda p: p * (9 * c * 27 + 9 * c * 5 + 9 * c * c)),
        "DCNv3": (ChannelsLast(layer), lambda p: p * (2 * c * c + 9 * c + 27 * group * c + 9 * c * 5)),
        "multi-head attention": (Attention(c, None), lambda p: p * 4 * c * c + 2 * p * p * c),
        "windowed attention 7x7": (Attention(c, WINDOW), windowed),
    }


def main() -> None:
    """Measure, write, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three sizes, three runs")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for size in SIZES[:3] if arguments.quick else SIZES:
        x = torch.randn(1, arguments.channels, size, size)
        modules = {name: (module.eval(), work) for name, (module, work) in contestants(arguments.channels).items()}
        with torch.inference_mode():
            calls = {name: (lambda module=module, x=x: module(x)) for name, (module, _) in modules.items()}
            assert all(call().shape == x.shape for call in calls.values())
            times = measure(calls, runs=3 if arguments.quick else 10, seconds=60)
            for name, (module, work) in modules.items():
                rows.append(
                    {
                        "operator": name,
                        "size": size,
                        "parameters": sum(p.numel() for p in module.parameters()),
                        "mmacs": round(work(size * size) / 1e6, 2),
                        "memory_mb": round(allocated_mb(calls[name]), 2),
                        **times[name].asdict(),
                    }
                )
    report.write("operators", rows, channels=arguments.channels, threads=arguments.threads)
    for row in rows:
        print(
            f"{row['size']:4} {row['operator']:24} {row['parameters']:7} parameters {row['mmacs']:9.1f} M MAC "
            f"{row['memory_mb']:8.1f} MB {row['median_ms']:9.2f} ms"
        )
    plot(rows, Path(__file__).parents[1] / "docs" / "operators.png", arguments.channels)


def allocated_mb(call: Callable[[], object]) -> float:
    """Bytes that one call allocates, freed ones included, in MiB."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in record.key_averages()) / 2**20


def plot(rows: list[dict[str, Json]], path: Path, channels: int) -> None:
    """Cost over image size: multiply-adds and time, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = list(dict.fromkeys(row["operator"] for row in rows))
    sizes = sorted({row["size"] for row in rows})
    for marker, name in zip("osD^vX", names, strict=True):
        own = sorted((row for row in rows if row["operator"] == name), key=lambda row: row["size"])
        for axis, key in zip(axes, ("mmacs", "median_ms"), strict=True):
            axis.plot([row["size"] for row in own], [row[key] for row in own], marker=marker, label=name)
    for axis, label in zip(axes, ("million multiply-adds", "milliseconds (median)"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="height = width of the map, pixels", ylabel=label)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(f"Cost of a spatial operator, {channels} channels, batch 1, float32, PyTorch on a CPU")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
