# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is to do, and the checks before anything runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from internimage_deploy.datasets.classes import lookup
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.load import model_card
from internimage_deploy.runtime.backends.registry import choose, reads
from internimage_deploy.runtime.evaluation.truth import Pairs, differing_names, find_pairs
from internimage_deploy.runtime.imaging.label_map import check_label_map
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.verification import check_comparable

# Layouts whose table of classes has another name.
_CLASS_TABLES = {"mapillary-19": "cityscapes", "coco-stuff-10k": "coco-stuff", "pascal-context": "pascal-context-59"}


@dataclass(frozen=True)
class Task:
    """What is evaluated.

    Attributes:
        model: the model file.
        options: how it is loaded.
        pairs: images and label maps.
        classes: names of the classes that count.
        against: a second model file, or None.
        json: where the result goes as JSON, and beside it the counts of each image; None for nowhere.
        resume: go on with the counts of an earlier run.
    """

    model: Path
    options: LoadOptions
    pairs: Pairs
    classes: tuple[str, ...]
    against: Path | None = None
    json: Path | None = None
    resume: bool = False

    @property
    def models(self) -> list[Path]:
        """The model, and the second one if there is one."""
        return [self.model] if self.against is None else [self.model, self.against]

    @property
    def load_options(self) -> list[LoadOptions]:
        """How each model is loaded."""
        if self.against is None:
            return [self.options]
        return [self.options, dataclasses.replace(self.options, backend=_second_backend(self.options, self.against))]


def plan(
    model: Path,
    images: str,
    labels: str,
    options: LoadOptions,
    *,
    dataset: str | None = None,
    split: Path | None = None,
    against: Path | None = None,
    ignore_unknown: bool = False,
    skip_unlabeled: bool = False,
    json: Path | None = None,
    resume: bool = False,
) -> Task:
    """Find what there is to evaluate, and what is wrong with it before anything runs; arguments as in `evaluate`.

    Raises:
        UserError: a file or folder is missing or unfit.
    """
    card = model_card(model)
    choose(model, options.backend)
    if against is not None:
        other = model_card(against)
        choose(against, _second_backend(options, against))
        check_comparable(card, other)
    if resume and json is None:
        raise UserError("--resume goes on with the counts beside the JSON result; name that with --json")
    pairs = find_pairs(
        images,
        labels,
        len(card.classes),
        dataset=dataset,
        split=split,
        ignore_unknown=ignore_unknown,
        skip_unlabeled=skip_unlabeled,
    )
    # What is wrong with one label map is often wrong with all: the first is looked at before a network runs.
    storage, path = pairs.truth.folder.open(), pairs.truth.paths[pairs.images[0].stem]
    check_label_map(storage.read(path), f"{pairs.truth.folder}/{path}")
    table = lookup(_CLASS_TABLES.get(pairs.layout.name, pairs.layout.name))
    if table is not None and (note := differing_names(card.classes, table[0])):
        pairs.notes.append(note)
    return Task(model, options, pairs, card.classes[: pairs.truth.classes], against, json, resume)


def _second_backend(options: LoadOptions, against: Path) -> str:
    """The backend of the first model where it reads the second one's file, else what that file is for."""
    return options.backend if reads(options.backend, against) else "auto"
