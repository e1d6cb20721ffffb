# SPDX-License-Identifier: Apache-2.0
"""Segmenting image files on a Ray cluster: the same run as on one machine, a share of the images on each copy.

Each image's label map is written last, so its presence says that the image is done, and a run that was interrupted can
be run again for what is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime.cluster.connect import Cluster, connect
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.pipelines.files import Outcome, WriteFailure, Writer, segment_files
from internimage_deploy.runtime.pipelines.find import ImageFile
from internimage_deploy.runtime.pipelines.storage import last_line
from internimage_deploy.runtime.segmenter import Segmenter

_PER_CALL = 16  # images: enough to decode ahead of the network, few enough to lose little with a machine


def segment_on_cluster(
    model: Path,
    options: LoadOptions,
    images: Sequence[ImageFile],
    writer: Callable[[], Writer],
    done: Callable[[str, Outcome], None],
    *,
    cluster: Cluster,
    again: str = "--skip-existing",
) -> None:
    """Segment `images`, spread over copies of the model.

    Args:
        model: a file that every machine of the cluster can read.
        options: how it is loaded.
        images: what to segment; every machine must be able to read them.
        writer: makes what takes the network's outputs, on each machine: it must be able to open what that opens there.
        done: called for each image, by its name.
        cluster: which cluster, and how much of it.
        again: option that leaves out finished images when a run is repeated.

    Raises:
        UserError: no cluster, a model that cannot be loaded, or results that cannot be written.
    """
    try:
        import ray.data
    except ImportError as error:
        raise MissingDependency("ray[data]", "ray", "segmenting on a cluster") from error
    connect(cluster.address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_rich_progress_bars = False
    low, high = cluster.replicas
    rows = ray.data.from_items(
        [{"image": image} for image in images],
        override_num_blocks=min(len(images), max(4 * high, len(images) // 64)),
    ).map_batches(
        _Worker,
        fn_constructor_kwargs={"model": model, "options": options, "writer": writer},
        batch_size=max(options.batch, _PER_CALL),
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus,
    )
    try:
        for row in rows.iter_rows():
            outcome = Outcome(**json.loads(row["outcome"]))
            if outcome.fatal:
                raise UserError(outcome.error)
            done(str(row["name"]), outcome)
    except ray.exceptions.RayError as error:
        raise UserError(
            f"the run stopped: {last_line(error)}; run it again with {again} for the images that are left"
        ) from error
    finally:
        if cluster.address is None:
            ray.shutdown()


class _Worker:
    """On a machine of the cluster: the loaded model, and what takes its outputs."""

    def __init__(self, *, model: Path, options: LoadOptions, writer: Callable[[], Writer]) -> None:
        self._segmenter = Segmenter.from_options(model, options)
        self._writer = writer()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images: list[ImageFile] = list(batch["image"])
        outcomes: dict[ImageFile, Outcome] = {}
        try:
            segment_files(self._segmenter, images, self._writer, outcomes.__setitem__)
        except WriteFailure as failure:  # as a row: Ray would wrap an exception in remarks of its own
            stop = Outcome(str(failure.reason), fatal=True)
            outcomes.update({image: stop for image in images if image not in outcomes})
        return {
            "name": np.array([str(image) for image in images], object),
            "outcome": np.array([json.dumps(asdict(outcomes[image])) for image in images], object),
        }
