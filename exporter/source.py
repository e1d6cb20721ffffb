# SPDX-License-Identifier: Apache-2.0
"""The input of an export: a segmentor with weights, and the metadata for its model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from internimage_deploy.datasets.classes import Classes, Palette, fitted, lookup
from internimage_deploy.errors import UserError
from internimage_deploy.exporter.models import Segmentor, build_random
from internimage_deploy.exporter.presets import PRESETS, Preset
from internimage_deploy.window import Window


@dataclass(frozen=True)
class SourceModel:
    """A segmentor with weights and the metadata that the model card takes over; see `ModelCard` for its fields.

    `notes` says what was dropped, assumed or guessed while the model was read: one sentence each, for the user;
    `details` what few users need to know, such as the objects in a checkpoint that were not rebuilt.
    """

    segmentor: Segmentor
    architecture: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    resize: tuple[int, int] | None = None
    window: Window | None = None
    source: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class StatedLabels:
    """What the user states about the card, where a checkpoint lacks it; None leaves it to the checkpoint.

    Attributes:
        classes: names in the order of the ids.
        palette: RGB, one per class.
        resize: (long, short) in pixels, or "own" for the image's own size.
    """

    classes: Classes | None = None
    palette: Palette | None = None
    resize: tuple[int, int] | Literal["own"] | None = None

    def check(self, outputs: int) -> None:
        """Check that a head of `outputs` outputs can have these labels. Raises `UserError`."""
        table = lookup(outputs)
        # A data set's last class may be one that is not trained, such as Mapillary's "Unlabeled".
        names, colors = table if table is not None else ((), ())
        for option, stated, cut in (("--classes", self.classes, names), ("--palette", self.palette, colors)):
            if stated is not None and len(stated) > outputs and stated[:outputs] != cut:
                raise UserError(
                    f"{option}: got {len(stated)} entries, and the model has {outputs} outputs; expected one for "
                    "each, in the order of the ids"
                )


def find_preset(name: str) -> Preset:
    """The released model called `name`. Raises `UserError` if there is none."""
    if name not in PRESETS:
        raise UserError(f"no released model is called '{name}'; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def random_model(name: str, seed: int = 0, stated: StatedLabels = StatedLabels()) -> SourceModel:
    """The released model called `name` with random weights, for tests and timing.

    Raises:
        UserError: no released model has this name.
    """
    preset = find_preset(name)
    outputs = preset.config.head.num_classes
    stated.check(outputs)
    classes, palette = lookup(preset.dataset) or ((), ())
    classes, palette = fitted(stated.classes or classes, stated.palette or palette, outputs)
    return SourceModel(
        segmentor=build_random(preset.config, seed),
        architecture=name,
        classes=classes,
        palette=palette,
        resize=None if stated.resize == "own" else stated.resize or preset.resize,
        window=preset.window,
        source={"random": str(seed)},
        notes=("random weights: the labels mean nothing",),
    )
