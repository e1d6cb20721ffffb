# SPDX-License-Identifier: Apache-2.0
"""Optimisation profiles: the ranges of batch and picture size that an engine is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from internimage_deploy.card import ModelCard, TensorSpec
from internimage_deploy.errors import UserError

Size = tuple[int, int, int]  # batch, height, width

_SMALLEST = 64  # pixels; what a profile reaches down to unless told otherwise
_WITHOUT_RULE = (512, 1024)  # usual and largest side where the card has no resize rule


@dataclass(frozen=True)
class Profile:
    """Smallest, usual and largest input, each (batch, height, width) in pictures and pixels."""

    min: Size
    opt: Size
    max: Size

    def as_dict(self) -> dict[str, tuple[int, ...]]:
        """As the model card stores it."""
        return {"min": self.min, "opt": self.opt, "max": self.max}


def described(profile: Mapping[str, Sequence[int]]) -> str:
    """A card's profile in words: "min 1x64x64 opt 1x512x512 max 1x1024x1024"."""
    return " ".join(f"{kind} {'x'.join(map(str, profile[kind]))}" for kind in ("min", "opt", "max"))


def parse_size(text: str) -> Size:
    """`NxHxW` as numbers. Raises `ValueError` with what was expected."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip().lower())
    if match is None or "0" in (match[1], match[2], match[3]):
        raise ValueError(f"'{text}' is no size; expected NxHxW, such as 1x512x512")
    return int(match[1]), int(match[2]), int(match[3])


def plan(card: ModelCard, least: Sequence[Size], usual: Sequence[Size], most: Sequence[Size]) -> tuple[Profile, ...]:
    """The profiles to build `card`'s model with, from what was asked or, where nothing was, from the card.

    Several sizes of one kind make several profiles, in order; a kind that was left out is derived from the others.

    Raises:
        UserError: a size for a static model, sizes out of order, or of a kind the model does not take.
    """
    asked = (least, usual, most)
    fixed = _fixed(card)
    if all(isinstance(side, int) for side in fixed):
        if any(asked):
            size = "x".join(map(str, fixed))
            raise UserError(
                f"this model takes one size, {size}, so --min, --opt and --max have no effect; "
                "leave them out, or export with --dynamic"
            )
        return ()
    if not any(asked):
        return _defaults(card)
    counts = {len(sizes) for sizes in asked if sizes}
    if len(counts) > 1:
        raise UserError(
            f"got {len(least)} --min, {len(usual)} --opt and {len(most)} --max; "
            "give each as often as there are profiles, or leave it out"
        )
    (count,) = counts
    profiles = tuple(_complete(card, *(sizes[index] if sizes else None for sizes in asked)) for index in range(count))
    for profile in profiles:
        _check(card, profile)
    return profiles


def tensor_shape(spec: TensorSpec, size: Size) -> tuple[int, ...]:
    """The input's full shape for a batch and picture size."""
    batch, height, width = size
    return (batch, height, width, 3) if spec.dtype == "uint8" else (batch, 3, height, width)


def fitting(profiles: Sequence[Profile], size: Size) -> int | None:
    """Index of the profile to run `size` with: of those that hold it, the one whose usual size is nearest."""
    best: tuple[int, int] | None = None
    for index, profile in enumerate(profiles):
        if all(low <= side <= high for low, side, high in zip(profile.min, size, profile.max, strict=True)):
            distance = abs(_volume(profile.opt) - _volume(size))
            distance += sum(abs(a - b) for a, b in zip(profile.opt, size, strict=True))
            if best is None or distance < best[0]:
                best = (distance, index)
    return None if best is None else best[1]


def _volume(size: Size) -> int:
    return size[0] * size[1] * size[2]


def _fixed(card: ModelCard) -> tuple[int | str, int | str, int | str]:
    height, width = card.network_size
    return card.input.shape[0], height, width


def _defaults(card: ModelCard) -> tuple[Profile, ...]:
    """One profile for upright and one for wide pictures, as large as the card's resize rule makes them."""
    if card.resize is None:
        usual, most = _WITHOUT_RULE
        return (_within(card, (1, usual, usual), (1, most, most)),)
    divisor = card.size_divisor
    long, short = (_up(side, divisor) for side in card.resize)
    width = long if long <= 2 * short else min(long, _up(short * 4 // 3, divisor))
    wide = _within(card, (1, short, width), (1, short, long))
    if not card.is_dynamic or long == short:
        return (wide,)
    return wide, _within(card, (1, width, short), (1, long, short))


def _within(card: ModelCard, usual: Size, most: Size) -> Profile:
    smallest = _up(_SMALLEST, card.size_divisor)
    sizes = ((1, smallest, smallest), usual, most)
    return Profile(*(_with_fixed(card, size) for size in sizes))


def _with_fixed(card: ModelCard, size: Size) -> Size:
    batch, height, width = (
        fixed if isinstance(fixed, int) else side for fixed, side in zip(_fixed(card), size, strict=True)
    )
    return batch, height, width


def _complete(card: ModelCard, least: Size | None, usual: Size | None, most: Size | None) -> Profile:
    top = most or usual or least
    assert top is not None
    middle = usual or top
    smallest = _up(_SMALLEST, card.size_divisor)
    bottom = least or _with_fixed(card, (1, min(smallest, middle[1]), min(smallest, middle[2])))
    return Profile(bottom, middle, top)


def _check(card: ModelCard, profile: Profile) -> None:
    for kind, size in profile.as_dict().items():
        for name, side, fixed in zip(("batch", "height", "width"), size, _fixed(card), strict=True):
            if isinstance(fixed, int) and side != fixed:
                raise UserError(f"--{kind} has {name} {side}, but this model's is fixed to {fixed}")
            if name != "batch" and side % card.size_divisor:
                raise UserError(
                    f"--{kind} has {name} {side}, expected a multiple of {card.size_divisor}; "
                    f"the next one is {_up(side, card.size_divisor)}"
                )
    for name, low, usual, high in zip(("batch", "height", "width"), profile.min, profile.opt, profile.max, strict=True):
        if not low <= usual <= high:
            raise UserError(f"{name}: --min {low}, --opt {usual}, --max {high} are out of order")


def _up(side: int, divisor: int) -> int:
    return -(-side // divisor) * divisor
