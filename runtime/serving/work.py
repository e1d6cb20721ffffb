# SPDX-License-Identifier: Apache-2.0
"""What a worker is asked to do, and doing it; the same in a worker process and in a Ray replica."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.card import ModelCard
from internimage_deploy.runtime.postprocess import Labels
from internimage_deploy.runtime.preprocess import Geometry
from internimage_deploy.runtime.serving.settings import ModelSettings

if TYPE_CHECKING:
    from internimage_deploy.runtime.segmenter import Segmenter

log = logging.getLogger("internimage_deploy.serving")

# The network's answer is labelled with the picture's sizes only, so the picture itself does not travel.
_NO_PICTURE = np.empty((0, 0, 3), np.uint8)
_WARM_UP_SIDE = 256


@dataclass(frozen=True)
class Work:
    """One picture for the network: (h, w, 3) uint8 RGB at network size, and the way back."""

    network: npt.NDArray[np.uint8]
    geometry: Geometry

    @property
    def key(self) -> tuple[int, int]:
        """Pictures of one key can run together."""
        return self.geometry.network


class CardOnly:
    """A `Backend` that knows its card and runs nothing: for the side that prepares pictures for others."""

    name = "card"

    def __init__(self, card: ModelCard) -> None:
        self.card = card

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        raise NotImplementedError("this side only prepares pictures")

    def close(self) -> None:
        """Nothing to free."""


def preparer(card: ModelCard, model: ModelSettings, max_pixels: int) -> Segmenter:
    """A `Segmenter` without a network, for `prepare` and `geometry`."""
    from internimage_deploy.runtime.segmenter import Segmenter

    return Segmenter(CardOnly(card), resize=model.resize, window=model.window, max_pixels=max_pixels)


def load(model: ModelSettings, batch: int) -> Segmenter:
    """The model, loaded and warm. Raises `UserError`."""
    from internimage_deploy.runtime.segmenter import Segmenter

    segmenter = Segmenter.load(
        model.path,
        backend=model.backend,
        threads=model.threads,
        resize=model.resize,
        window=model.window,
        batch=batch,
        trust_engine=model.trust_engine,
        cuda_graphs=model.cuda_graphs,
    )
    height, width = segmenter.card.network_size
    size = (height, width) if isinstance(height, int) and isinstance(width, int) else (_WARM_UP_SIDE, _WARM_UP_SIDE)
    segmenter(np.zeros((*size, 3), np.uint8))
    return segmenter


def run(segmenter: Segmenter, batch: Sequence[Work]) -> list[Labels]:
    """Labels (H, W) at each picture's own size; the pictures of `batch` have one network size."""
    from internimage_deploy.runtime.segmenter import Prepared

    group = [Prepared(_NO_PICTURE, work.network, work.geometry) for work in batch]
    answers = segmenter.forward(group)
    return [segmenter.finish(item, answer).labels for item, answer in zip(group, answers, strict=True)]


def run_each(segmenter: Segmenter, batch: Sequence[Work]) -> list[Labels | Exception]:
    """As `run`; if the batch fails as a whole, each picture runs alone, so that one cannot spoil the others."""
    try:
        return list(run(segmenter, batch))
    except Exception as error:
        if len(batch) == 1:
            if isinstance(error, UserError):
                return [error]
            if isinstance(error, MemoryError):
                return [UserError("not enough memory for a picture of this size")]
            log.exception("a picture of network size %s failed", batch[0].key)
            return [RuntimeError(f"{type(error).__name__}: {error}")]  # the original may not be fit to be sent
    return [run_each(segmenter, [work])[0] for work in batch]
