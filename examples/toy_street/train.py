# SPDX-License-Identifier: Apache-2.0
"""Train the demo's model: a small InternImage with UPerHead on painted street scenes, on a CPU.

    python examples/toy_street/train.py [-o toy_street.pth]

paints the scenes, trains on crops of them with one process per core, scores the model on scenes it has not seen, and
writes a checkpoint in the format of the official ones. The same versions, seed and core count give about the same
model. Needs PyTorch 2.9 or newer for its Muon optimiser.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from recipe import CONFIG, checkpoint
from scenes import CLASSES, SIZE, scenes
from score import Score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD
from internimage_deploy.exporter.models import DCNv3, Segmentor
from internimage_deploy.files import atomic_path

FIRST_VALIDATION = 500_000
CROP = (128, 160)  # (height, width): two fifths of a scene's pixels, so more than twice the steps in the same time
# Half of the crops are laid around a pixel of these, for they cover little of a scene.
SMALL_CLASSES = ("sidewalk", "grass", "person", "pole")


@dataclass(frozen=True)
class Plan:
    """Training settings: steps in all, crops per step over all processes, peak learning rates, weight decay."""

    steps: int
    batch: int
    matrix_rate: float
    other_rate: float
    decay: float
    seed: int


def paint(first: int, count: int, workers: int) -> tuple[Tensor, Tensor]:
    """Scenes from seed `first` on: images (N, H, W, 3) uint8 RGB and labels (N, H, W) uint8, in shared memory."""
    made = scenes(range(first, first + count), workers)
    images, labels = np.stack([s.image for s in made]), np.stack([s.labels for s in made])
    return torch.from_numpy(images).share_memory_(), torch.from_numpy(labels).share_memory_()


def initialise(model: Segmentor) -> None:
    """The official initial weights: DCNv3 starts as an even 3x3 average over an unmoved grid."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, DCNv3):
            nn.init.zeros_(module.offset.weight)
            nn.init.zeros_(module.mask.weight)


class Crops:
    """An endless stream of random crops, mirrored half of the time."""

    def __init__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        self.images, self.labels, self.generator = images, labels, generator
        self.small = torch.tensor([name in SMALL_CLASSES for name in CLASSES])
        self.order: list[int] = []

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Images (count, h, w, 3) uint8 and labels (count, h, w) int64."""
        pairs = [self._crop() for _ in range(count)]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs]).long()

    def _crop(self) -> tuple[Tensor, Tensor]:
        if not self.order:
            self.order = torch.randperm(len(self.images), generator=self.generator).tolist()
        index = self.order.pop()
        image, labels = self.images[index], self.labels[index]
        room = [have - want for have, want in zip(labels.shape, CROP, strict=True)]
        corner = [self._below(space + 1) for space in room]
        if self._below(2):
            pixels = self.small[labels.long()].nonzero()
            if len(pixels):
                pixel = pixels[self._below(len(pixels))].tolist()
                corner = [
                    min(max(at - self._below(side), 0), space)
                    for at, side, space in zip(pixel, CROP, room, strict=True)
                ]
        rows, columns = (slice(start, start + side) for start, side in zip(corner, CROP, strict=True))
        image, labels = image[rows, columns], labels[rows, columns]
        return (image.flip(1), labels.flip(1)) if self._below(2) else (image, labels)

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))


def full_size_logits(model: nn.Module, images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 to (N, classes, H, W), upsampled as inference does it."""
    x = (images.float() - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    logits = model(x.permute(0, 3, 1, 2).contiguous())
    return F.interpolate(logits, size=images.shape[1:3], mode="bilinear", align_corners=False)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus half a Dice loss; the latter weighs a small class as much as a large one."""
    log_probability = logits.log_softmax(dim=1)
    log_right = log_probability.gather(1, labels[:, None]).flatten()
    classes = logits.shape[1]
    right = log_right.new_zeros(classes).index_add(0, labels.flatten(), log_right.exp())
    both = log_probability.exp().sum(dim=(0, 2, 3)) + labels.flatten().bincount(minlength=classes)
    return -log_right.mean() + 0.5 * (1 - ((2 * right + 1) / (both + 1)).mean())


class Optimiser:
    """Muon for matrices and dense kernels, AdamW for the other tensors; warm-up, then a cosine down to zero.

    On a budget of a few thousand steps Muon is what makes the difference. It knows matrices only, so kernels
    (out, in, h, w) are shown to it as views (out, in*h*w). Offsets and masks start at zero and stay with AdamW, as do
    the first and the last layer, as Muon's authors advise.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        apart = ("offset", "mask", "conv_seg", "patch_embed.conv1")
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            dense = parameter.ndim >= 2 and parameter.shape[1] > 1 and not any(part in name for part in apart)
            (matrices if dense else others).append(parameter)
        self.views = [(p, nn.Parameter(p.data.view(len(p), -1))) for p in matrices]
        decayed = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": plan.decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                [view for _, view in self.views],
                lr=plan.matrix_rate,
                weight_decay=plan.decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(decayed, lr=plan.other_rate, betas=(0.9, 0.99)),
        ]
        warm = max(plan.steps // 20, 1)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                part, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / plan.steps))
            )
            for part in self.parts
        ]

    def step(self) -> None:
        for parameter, view in self.views:
            assert parameter.grad is not None
            view.grad = parameter.grad.view(view.shape)
        for part in self.parts:
            part.step()
        for schedule in self.schedules:
            schedule.step()


def work(rank: int, workers: int, meeting: str, plan: Plan, images: Tensor, labels: Tensor, target: str) -> None:
    """One training process: its part of every batch, gradients averaged with the others; the first one saves."""
    warnings.filterwarnings("ignore", message="Grad strides")  # a depthwise kernel's, and only a matter of speed
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    model = Segmentor(CONFIG)
    initialise(model)
    model.train()
    parallel = DistributedDataParallel(model)
    optimiser = Optimiser(model, plan)
    crops = Crops(images, labels, torch.Generator().manual_seed(plan.seed * workers + rank))
    started, cpu, losses = time.perf_counter(), time.process_time(), []
    for step in range(1, plan.steps + 1):
        loss = loss_of(full_size_logits(parallel, (batch := crops.batch(plan.batch // workers))[0]), batch[1])
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if rank == 0 and (step % 100 == 0 or step == plan.steps):
            wall, used = time.perf_counter() - started, time.process_time() - cpu
            print(
                f"step {step:5}/{plan.steps}  loss {np.mean(losses):.3f}  {wall:4.0f} s, {used:.0f} s of CPU a process",
                flush=True,
            )
            losses.clear()
    if rank == 0:
        torch.save(model.state_dict(), target)
    dist.destroy_process_group()


def train(plan: Plan, images: Tensor, labels: Tensor, workers: int) -> Segmentor:
    """A trained model in evaluation mode."""
    with tempfile.TemporaryDirectory() as folder:
        meeting, target = str(Path(folder) / "meeting"), str(Path(folder) / "weights.pth")
        torch.multiprocessing.spawn(work, (workers, meeting, plan, images, labels, target), nprocs=workers)
        model = Segmentor(CONFIG)
        model.load_state_dict(torch.load(target, weights_only=True))
    return model.eval()


@torch.inference_mode()
def validate(model: Segmentor, images: Tensor, labels: Tensor) -> Score:
    """The score of a model on whole scenes."""
    score = Score(CLASSES)
    for x, y in zip(images.split(4), labels.split(4), strict=True):
        score.add(y.numpy(), full_size_logits(model, x).argmax(dim=1).numpy())
    return score


def main() -> None:
    """Paint, train, validate, save."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="Train the demo's model on painted street scenes.")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("toy_street.pth"))
    parser.add_argument("--scenes", type=int, default=1400, help="scenes to train on (default: 1400)")
    parser.add_argument("--steps", type=int, default=3200, help="training steps (default: 3200)")
    parser.add_argument("--workers", type=int, default=min(cores, 8), help="processes; must divide 8 (default: cores)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    plan = Plan(args.steps, batch=8, matrix_rate=1e-2, other_rate=3e-3, decay=0.02, seed=args.seed)
    if args.workers < 1 or plan.batch % args.workers:
        parser.error(f"--workers {args.workers}: expected 1, 2, 4 or 8, for a step takes {plan.batch} crops")

    started = time.perf_counter()
    print(f"painting {args.scenes} scenes of {SIZE[1]}x{SIZE[0]}", flush=True)
    images, labels = paint(0, args.scenes, cores)
    print(f"painted in {time.perf_counter() - started:.0f} s; training with {args.workers} processes", flush=True)
    model = train(plan, images, labels, args.workers)
    taken = time.perf_counter() - started
    with atomic_path(args.output) as path:
        torch.save(checkpoint(model, args.steps), path)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.output}: {parameters / 1e6:.2f} M parameters, {args.output.stat().st_size / 1e6:.2f} MB, "
        f"painted and trained in {taken:.0f} s"
    )
    print(f"on 100 further scenes:\n{validate(model, *paint(FIRST_VALIDATION, 100, cores)).table()}")


if __name__ == "__main__":
    main()
