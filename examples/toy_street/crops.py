# SPDX-License-Identifier: Apache-2.0
"""Training data: painted scenes, and random crops of them."""

from __future__ import annotations

import numpy as np
import torch
from scenes import CLASSES, scenes
from torch import Tensor

CROP = (128, 160)  # (height, width): two fifths of a scene's pixels, so more than twice the steps in the same time
# Half of the crops are laid around a pixel of these, for they cover little of a scene.
SMALL_CLASSES = ("sidewalk", "grass", "person", "pole")


def paint(first: int, count: int, workers: int) -> tuple[Tensor, Tensor]:
    """Scenes from seed `first` on: images (N, H, W, 3) uint8 RGB and labels (N, H, W) uint8, in shared memory."""
    made = scenes(range(first, first + count), workers)
    images, labels = np.stack([s.image for s in made]), np.stack([s.labels for s in made])
    return torch.from_numpy(images).share_memory_(), torch.from_numpy(labels).share_memory_()


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
