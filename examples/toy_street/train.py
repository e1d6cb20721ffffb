# SPDX-License-Identifier: Apache-2.0
"""Train one of the demo's models, a small InternImage on painted street scenes, on a CPU.

    python examples/toy_street/train.py [--head upernet] [-o toy_street.pth]
    python examples/toy_street/train.py --head mask2former [-o toy_street_mask2former.pth]

paints the scenes, trains on crops of them with one process per core, scores the model on scenes it has not seen, and
writes a checkpoint in the format of the official ones, now and then on the way too. UPerHead is trained from scratch.
Mask2Former starts from the backbone of toy_street.pth, which knows these scenes already: that leaves its head to learn.
The same versions, seed and core count give about the same model. Needs PyTorch 2.9 or newer for its Muon optimiser;
Mask2Former needs SciPy too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from crops import Crops, paint
from mask_loss import mask_loss
from optimiser import Optimiser, Plan
from recipe import CONFIGS, checkpoint
from scenes import CLASSES, SIZE
from score import Score
from start import start
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD
from internimage_deploy.exporter.models import Mask2FormerConfig, Segmentor, build_with
from internimage_deploy.files import atomic_path

SAVED_EVERY = 400  # steps
FOLDER = Path(__file__).parent
OUTPUTS = {"upernet": FOLDER / "toy_street.pth", "mask2former": FOLDER / "toy_street_mask2former.pth"}
PLANS = {
    "upernet": Plan(steps=3200, batch=8, matrix_rate=1e-2, other_rate=3e-3, decay=0.02, seed=0),
    "mask2former": Plan(steps=1500, batch=8, matrix_rate=1e-2, other_rate=3e-3, decay=0.02, seed=0),
}
FIRST_VALIDATION = 500_000


def normalised(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 to the network's input (N, 3, H, W)."""
    x = (images.float() - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return x.permute(0, 3, 1, 2).contiguous()


def full_size_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Normalised images (N, 3, H, W) to (N, classes, H, W), upsampled as inference does it."""
    return F.interpolate(model(x), size=x.shape[2:], mode="bilinear", align_corners=False)


def pixel_loss(model: Segmentor, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus half a Dice loss; the latter weighs a small class as much as a large one.

    `x` are normalised images (N, 3, H, W), `labels` (N, H, W) int64.
    """
    log_probability = full_size_logits(model, x).log_softmax(dim=1)
    log_right = log_probability.gather(1, labels[:, None]).flatten()
    classes = log_probability.shape[1]
    right = log_right.new_zeros(classes).index_add(0, labels.flatten(), log_right.exp())
    both = log_probability.exp().sum(dim=(0, 2, 3)) + labels.flatten().bincount(minlength=classes)
    return -log_right.mean() + 0.5 * (1 - ((2 * right + 1) / (both + 1)).mean())


class Objective(nn.Module):
    """A model and its loss in one: images (N, H, W, 3) uint8 and labels (N, H, W) int64 to a scalar."""

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model
        self.loss = mask_loss if isinstance(model.config.head, Mask2FormerConfig) else pixel_loss

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.model, normalised(images), labels)


def work(
    rank: int, workers: int, meeting: str, head: str, plan: Plan, images: Tensor, labels: Tensor, output: Path
) -> None:
    """One training process: its part of every batch, gradients averaged with the others; the first one saves."""
    warnings.filterwarnings("ignore", message="Grad strides")  # a depthwise kernel's, and only a matter of speed
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    model = start(head).train()
    objective = DistributedDataParallel(Objective(model))
    optimiser = Optimiser(model, plan)
    crops = Crops(images, labels, torch.Generator().manual_seed(plan.seed * workers + rank))
    started, cpu, losses = time.perf_counter(), time.process_time(), []
    for step in range(1, plan.steps + 1):
        loss = objective(*crops.batch(plan.batch // workers))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        last = step == plan.steps
        if rank == 0 and (step % 100 == 0 or last):
            wall, used = time.perf_counter() - started, time.process_time() - cpu
            print(
                f"step {step:5}/{plan.steps}  loss {np.mean(losses):.3f}  {wall:4.0f} s, {used:.0f} s of CPU a process",
                flush=True,
            )
            losses.clear()
        if rank == 0 and (step % SAVED_EVERY == 0 or last):
            with atomic_path(output) as path:
                torch.save(checkpoint(model, step), path)
    dist.destroy_process_group()


def train(head: str, plan: Plan, images: Tensor, labels: Tensor, workers: int, output: Path) -> Segmentor:
    """A trained model in evaluation mode; its checkpoint is `output`."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        torch.multiprocessing.spawn(work, (workers, meeting, head, plan, images, labels, output), nprocs=workers)
    return build_with(CONFIGS[head], torch.load(output, weights_only=True)["state_dict"])


@torch.inference_mode()
def validate(model: Segmentor, images: Tensor, labels: Tensor) -> Score:
    """The score of a model on whole scenes."""
    score = Score(CLASSES)
    for x, y in zip(images.split(4), labels.split(4), strict=True):
        score.add(y.numpy(), full_size_logits(model, normalised(x)).argmax(dim=1).numpy())
    return score


def main() -> None:
    """Paint, train, save, validate."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="Train one of the demo's models on painted street scenes.")
    parser.add_argument("--head", choices=PLANS, default="upernet", help="decode head (default: upernet)")
    parser.add_argument("-o", "--output", type=Path, help="checkpoint to write (default: the one that ships)")
    parser.add_argument("--scenes", type=int, default=1400, help="scenes to train on (default: 1400)")
    parser.add_argument("--steps", type=int, help="training steps (default: depends on the head)")
    parser.add_argument("--workers", type=int, default=min(cores, 8), help="processes; must divide 8 (default: cores)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.head == "mask2former" and importlib.util.find_spec("scipy") is None:
        parser.error("--head mask2former needs SciPy: pip install scipy")
    plan = replace(PLANS[args.head], seed=args.seed)
    plan = replace(plan, steps=args.steps or plan.steps)
    output = args.output or OUTPUTS[args.head]
    if args.workers < 1 or plan.batch % args.workers:
        parser.error(f"--workers {args.workers}: expected 1, 2, 4 or 8, for a step takes {plan.batch} crops")

    started = time.perf_counter()
    print(f"painting {args.scenes} scenes of {SIZE[1]}x{SIZE[0]}", flush=True)
    images, labels = paint(0, args.scenes, cores)
    print(f"painted in {time.perf_counter() - started:.0f} s; training with {args.workers} processes", flush=True)
    model = train(args.head, plan, images, labels, args.workers, output)
    taken = time.perf_counter() - started
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{output}: {parameters / 1e6:.2f} M parameters, {output.stat().st_size / 1e6:.2f} MB, "
        f"painted and trained in {taken:.0f} s"
    )
    print(f"on 100 further scenes:\n{validate(model, *paint(FIRST_VALIDATION, 100, cores)).table()}")


if __name__ == "__main__":
    main()
