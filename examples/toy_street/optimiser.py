# SPDX-License-Identifier: Apache-2.0
"""The optimisers and schedules of a training of a few minutes. Needs PyTorch 2.9 or newer for its Muon optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Plan:
    """Training settings: steps in all, crops per step over all processes, peak learning rates, weight decay."""

    steps: int
    batch: int
    matrix_rate: float
    other_rate: float
    decay: float
    seed: int


class Optimiser:
    """Muon for matrices and dense kernels, AdamW for the other tensors; warm-up, then a cosine down to zero.

    On a budget of a few thousand steps Muon is what makes the difference. It knows matrices only, so kernels
    (out, in, h, w) are shown to it as views (out, in*h*w). Offsets and masks start at zero and stay with AdamW, as do
    embeddings, the first and the last layers, as Muon's authors advise.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        apart = (
            *("offset", "mask", "attention_weights"),
            *("query_feat", "query_embed", "level_embed", "level_encoding"),
            *("patch_embed.conv1", "conv_seg", "cls_embed"),
        )
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
