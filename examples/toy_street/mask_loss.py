# SPDX-License-Identifier: Apache-2.0
"""Mask2Former's training loss for semantic segmentation: each class in an image is one segment, matched to a query.

Source: Mask2Former, https://arxiv.org/abs/2112.01527; its random sampling of points is left out, for images this small
do not need it. The matching needs SciPy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from internimage_deploy.exporter.models import Segmentor

# Weights of the terms, in the loss as in the matching.
_CLASS, _CROSS_ENTROPY, _DICE = 2.0, 5.0, 5.0
_NO_OBJECT = 0.1  # how much a query without a segment counts in the class term
_STRIDE = 4  # of the masks


def mask_loss(model: Segmentor, x: Tensor, labels: Tensor) -> Tensor:
    """The loss, a mean over the predictions before and after each decoder layer.

    Args:
        model: a segmentor with Mask2Former's head.
        x: (N, 3, H, W) normalised images.
        labels: (N, H, W) int64 class ids.
    """
    classes = model.config.head.num_classes
    # Masks are coarser than labels: what they shall say is the fraction of a cell that a class covers.
    truth = F.avg_pool2d(F.one_hot(labels, classes).permute(0, 3, 1, 2).float(), _STRIDE).flatten(2)
    predictions = model.decode_head.predict_each(model.backbone(x))
    return torch.stack([_loss(logits, masks.flatten(2), truth) for logits, masks in predictions]).mean()


def _loss(logits: Tensor, masks: Tensor, truth: Tensor) -> Tensor:
    """Loss of one prediction: class logits (N, Q, K + 1), mask logits (N, Q, T), true fractions (N, K, T)."""
    no_object = logits.shape[2] - 1
    cross_entropy, dice = pairwise(masks, truth)
    mask_terms = _CROSS_ENTROPY * cross_entropy + _DICE * dice
    cost = mask_terms.detach() - _CLASS * logits.detach().softmax(2)[..., :no_object]
    matched = match(cost, truth.amax(2) > 0)
    image, query, segment = matched
    target = torch.full(logits.shape[:2], no_object)
    target[image, query] = segment
    weight = torch.ones(no_object + 1)
    weight[no_object] = _NO_OBJECT
    return _CLASS * F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight) + mask_terms[matched].mean()


def pairwise(masks: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice loss of every mask (N, Q, T), as logits, with every segment (N, K, T): (N, Q, K) each."""
    right, wrong = F.softplus(-masks), F.softplus(masks)
    segments = truth.transpose(1, 2)
    cross_entropy = (right @ segments + wrong @ (1 - segments)) / masks.shape[2]
    probability = masks.sigmoid()
    both = probability.sum(2)[:, :, None] + truth.sum(2)[:, None]
    return cross_entropy, 1 - (2 * probability @ segments + 1) / (both + 1)


def match(cost: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest assignment of one query to each segment that is present.

    Args:
        cost: (N, Q, K) of each query for each segment.
        present: (N, K) booleans.

    Returns:
        Indices of image, query and segment, as long as there are segments.
    """
    from scipy.optimize import linear_sum_assignment  # here, so that the rest needs no SciPy

    triples = []
    for image, (prices, here) in enumerate(zip(cost, present, strict=True)):
        segments = here.nonzero()[:, 0]
        queries, columns = linear_sum_assignment(prices[:, segments].numpy())
        triples.append(
            (torch.full((len(queries),), image), torch.from_numpy(queries), segments[torch.from_numpy(columns)])
        )
    image, query, segment = (torch.cat(part) for part in zip(*triples, strict=True))
    return image, query, segment
