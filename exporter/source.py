# SPDX-License-Identifier: Apache-2.0
"""The input of an export: a segmentor with weights, and the metadata for its model card."""

from __future__ import annotations

from dataclasses import dataclass, field

from internimage_deploy.datasets.classes import fitted, lookup
from internimage_deploy.errors import UserError
from internimage_deploy.exporter.models import Segmentor, build_random
from internimage_deploy.exporter.presets import PRESETS, Preset


@dataclass(frozen=True)
class SourceModel:
    """A segmentor with weights and the metadata that the model card takes over; see `ModelCard` for its fields.

    `notes` says what was dropped, assumed or guessed while the model was read: one sentence each, for the user.
    """

    segmentor: Segmentor
    architecture: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    resize: tuple[int, int] | None = None
    source: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_preset(name: str) -> Preset:
    """The released model called `name`. Raises `UserError` if there is none."""
    if name not in PRESETS:
        raise UserError(f"no released model is called '{name}'; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def random_model(name: str, seed: int = 0) -> SourceModel:
    """The released model called `name` with random weights, for tests and timing.

    Raises:
        UserError: no released model has this name.
    """
    preset = find_preset(name)
    classes, palette = fitted(*(lookup(preset.dataset) or ((), ())), preset.config.head.num_classes)
    return SourceModel(
        segmentor=build_random(preset.config, seed),
        architecture=name,
        classes=classes,
        palette=palette,
        resize=preset.resize,
        source={"random": str(seed)},
        notes=("random weights: the labels mean nothing",),
    )
