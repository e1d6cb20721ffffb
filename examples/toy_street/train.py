# SPDX-License-Identifier: Apache-2.0
"""Train the demo's model: a small InternImage with UPerHead on painted street scenes, on a CPU.

    python examples/toy_street/train.py [-o toy_street.pth]

paints the scenes, trains, scores the model on scenes it has not seen, and writes a checkpoint in the format of the
official ones. The same versions, seeds and thread count give about the same model.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scenes import CLASSES, PALETTE, SIZE, scene
from score import Score
from torch import Tensor, nn

from internimage_deploy.exporter.models import BackboneConfig, DCNv3, HeadConfig, Segmentor, SegmentorConfig
from internimage_deploy.files import atomic_path
from internimage_deploy.runtime.card import IMAGENET_MEAN, IMAGENET_STD

CONFIG = SegmentorConfig(
    BackboneConfig(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), layer_scale=True),
    HeadConfig("UPerHead", channels=40, num_classes=len(CLASSES)),
)
FIRST_VALIDATION = 500_000

# The training config as the official tools would store it: whoever reads the checkpoint learns from it what the
# weights cannot tell.
META_CONFIG = f"""\
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='InternImage',
        core_op='DCNv3',
        channels={CONFIG.backbone.channels},
        depths={list(CONFIG.backbone.depths)},
        groups={list(CONFIG.backbone.groups)},
        mlp_ratio={CONFIG.backbone.mlp_ratio},
        norm_layer='LN',
        layer_scale=1.0,
        offset_scale={CONFIG.backbone.offset_scale},
        post_norm=False,
        out_indices=(0, 1, 2, 3)),
    decode_head=dict(
        type='UPerHead',
        in_channels={[CONFIG.backbone.channels * 2**i for i in range(4)]},
        in_index=[0, 1, 2, 3],
        pool_scales={CONFIG.head.pool_scales},
        channels={CONFIG.head.channels},
        num_classes={CONFIG.head.num_classes},
        norm_cfg=dict(type='BN', requires_grad=True),
        align_corners=False),
    test_cfg=dict(mode='whole'))
img_norm_cfg = dict(mean={list(IMAGENET_MEAN)}, std={list(IMAGENET_STD)}, to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=({SIZE[1]}, {SIZE[0]}),
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='ResizeToMultiple', size_divisor=32),
            dict(type='RandomFlip'),
            dict(type='Normalize', **img_norm_cfg),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ])
]
"""


def paint(seeds: range, workers: int) -> tuple[Tensor, Tensor]:
    """Scenes of `seeds`: images (N, H, W, 3) uint8 RGB and labels (N, H, W) uint8."""
    with ProcessPoolExecutor(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        made = list(pool.map(scene, seeds, chunksize=16))
    return torch.from_numpy(np.stack([s.image for s in made])), torch.from_numpy(np.stack([s.labels for s in made]))


def initialise(model: Segmentor) -> None:
    """The official initial weights: DCNv3 starts as an even 3x3 average of an unmoved grid."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, DCNv3):
            nn.init.zeros_(module.offset.weight)
            nn.init.zeros_(module.mask.weight)


def normalise(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32."""
    x = (images.float() - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return x.permute(0, 3, 1, 2).contiguous()


def logits_at_full_size(model: Segmentor, images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 to (N, classes, H, W), upsampled as inference does it."""
    return F.interpolate(model(normalise(images)), size=images.shape[1:3], mode="bilinear", align_corners=False)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus half a Dice loss; the latter weighs a small class as much as a large one."""
    log_share = logits.log_softmax(dim=1)
    log_right = log_share.gather(1, labels[:, None]).flatten()
    classes = logits.shape[1]
    right = log_right.new_zeros(classes).index_add(0, labels.flatten(), log_right.exp())
    both = log_share.exp().sum(dim=(0, 2, 3)) + labels.flatten().bincount(minlength=classes)
    return -log_right.mean() + 0.5 * (1 - ((2 * right + 1) / (both + 1)).mean())


def groups_for_decay(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels only."""
    wide = [p for p in model.parameters() if p.ndim >= 2]
    flat = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": wide, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}]


def train(model: Segmentor, images: Tensor, labels: Tensor, *, epochs: int, batch: int, rate: float) -> None:
    """AdamW with warm-up and a cosine down to zero; scenes are mirrored at random."""
    steps_each = len(images) // batch
    total = steps_each * epochs
    optimiser = torch.optim.AdamW(groups_for_decay(model, 0.02), lr=rate)
    warm = max(total // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / total))
    )
    model.train()
    started, cpu = time.perf_counter(), time.process_time()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images))
        losses = 0.0
        for start in range(0, steps_each * batch, batch):
            chosen = order[start : start + batch]
            x, y = images[chosen], labels[chosen].long()
            if torch.rand(()) < 0.5:
                x, y = x.flip(2), y.flip(2)
            loss = loss_of(logits_at_full_size(model, x), y)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses += float(loss.detach())
        wall, used = time.perf_counter() - started, time.process_time() - cpu
        print(
            f"epoch {epoch:2}/{epochs}  loss {losses / steps_each:.4f}  {wall:4.0f} s  ({used:.0f} s of CPU)",
            flush=True,
        )
    model.eval()


@torch.inference_mode()
def validate(model: Segmentor, images: Tensor, labels: Tensor) -> Score:
    """The score of a model on scenes, batch by batch."""
    score = Score(CLASSES)
    for x, y in zip(images.split(8), labels.split(8), strict=True):
        score.add(y.numpy(), logits_at_full_size(model, x).argmax(dim=1).numpy())
    return score


def checkpoint(model: Segmentor, epochs: int, steps: int) -> dict[str, object]:
    """What mmsegmentation would have saved."""
    meta = {
        "mmseg_version": "0.27.0",
        "config": META_CONFIG,
        "CLASSES": CLASSES,
        "PALETTE": [list(colour) for colour in PALETTE],
        "epoch": epochs,
        "iter": steps,
    }
    return {"meta": meta, "state_dict": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}}


def main() -> None:
    """Paint, train, validate, save."""
    parser = argparse.ArgumentParser(description="Train the demo's model on painted street scenes.")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("toy_street.pth"))
    parser.add_argument("--scenes", type=int, default=1600, help="scenes to train on")
    parser.add_argument("--epochs", type=int, default=8, help="times each scene is seen")
    parser.add_argument("--batch", type=int, default=8, help="scenes per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    print(f"painting {args.scenes} scenes of {SIZE[1]}x{SIZE[0]}", flush=True)
    images, labels = paint(range(args.scenes), args.threads)
    print(f"painted in {time.perf_counter() - started:.0f} s; training on {args.threads} threads", flush=True)
    model = Segmentor(CONFIG)
    initialise(model)
    train(model, images, labels, epochs=args.epochs, batch=args.batch, rate=args.rate)
    score = validate(model, *paint(range(FIRST_VALIDATION, FIRST_VALIDATION + 100), args.threads))
    print(f"validation on 100 further scenes:\n{score.table()}")
    with atomic_path(args.output) as path:
        torch.save(checkpoint(model, args.epochs, args.epochs * (args.scenes // args.batch)), path)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.output}: {parameters / 1e6:.2f} M parameters, {args.output.stat().st_size / 1e6:.2f} MB, "
        f"{time.perf_counter() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
