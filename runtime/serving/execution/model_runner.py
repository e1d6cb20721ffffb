# SPDX-License-Identifier: Apache-2.0
"""Loading the model and running batches; the same in a worker process and in a Ray replica."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.gpu.device import DeviceError
from internimage_deploy.runtime.imaging.pipeline import NetworkImage, images_per_run
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.segmenter import Segmenter
from internimage_deploy.runtime.serving.settings import ModelSettings

log = logging.getLogger("internimage_deploy.serving")

_WARM_UP_SIDE = 256


def load(model: ModelSettings) -> Segmenter:
    """Load the model and run it once, so that the first image does not pay for what happens on first use.

    Raises:
        UserError: the model cannot be loaded, or its options do not fit it.
    """
    segmenter = Segmenter.from_options(model.path, model.options)
    height, width = segmenter.card.network_size
    size = (height, width) if isinstance(height, int) and isinstance(width, int) else (_WARM_UP_SIDE, _WARM_UP_SIDE)
    segmenter(np.zeros((*size, 3), np.uint8))
    return segmenter


def run(segmenter: Segmenter, images: Sequence[NetworkImage]) -> list[Labels]:
    """Labels (H, W) at each image's own size; the images have one network size."""
    labels: list[Labels] = []
    count = images_per_run(images[0], segmenter.batch) if images else 1
    for start in range(0, len(images), count):
        group = images[start : start + count]
        for image, output in zip(group, segmenter.forward(group), strict=True):
            labels.append(segmenter.pipeline.labels(output, image.geometry))
    return labels


def run_each(segmenter: Segmenter, images: Sequence[NetworkImage]) -> list[Labels | Exception]:
    """As `run`; if the batch fails as a whole, each image runs alone, so that one cannot spoil the others.

    Where the GPU cannot be used any more by this process, the process ends: whoever started it replaces it.
    """
    try:
        return list(run(segmenter, images))
    except Exception as error:
        if isinstance(error, DeviceError) and error.sticky:
            _end_process(error)
        if len(images) == 1:
            if isinstance(error, UserError):
                return [error]
            if isinstance(error, MemoryError):
                return [UserError("not enough memory for an image of this size")]
            log.exception("an image of network size %s failed", images[0].size)
            return [RuntimeError(f"{type(error).__name__}: {error}")]  # the original may not survive pickling
    return [run_each(segmenter, [image])[0] for image in images]


def _end_process(error: DeviceError) -> None:
    log.critical("this process ends, because the GPU takes no more calls from it: %s", error)
    logging.shutdown()
    os._exit(1)  # an orderly end would destroy the engine, and its destructors may hang on a dead CUDA context
