# SPDX-License-Identifier: Apache-2.0
"""Optimisation profiles: the ranges of batch size and image size that an engine is built for."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from internimage_deploy.card import ModelCard, TensorSpec
from internimage_deploy.errors import UserError

InputSize = tuple[int, int, int]  # batch, height and width in pixels

_SMALLEST = 64  # smallest side of a default profile, in pixels
_WITHOUT_RULE = (512, 1024)  # typical and largest side where the card has no resize rule, in pixels


@dataclass(frozen=True)
class Profile:
    """Smallest, typical and largest input, each (batch, height, width)."""

    min: InputSize
    opt: InputSize
    max: InputSize

    def as_dict(self) -> dict[str, tuple[int, ...]]:
        """The profile as the model card stores it."""
        return {"min": self.min, "opt": self.opt, "max": self.max}


def described(profile: Mapping[str, Sequence[int]]) -> str:
    """A card's profile as text: "min 1x64x64 opt 1x512x512 max 1x1024x1024"."""
    return " ".join(f"{bound} {'x'.join(map(str, profile[bound]))}" for bound in ("min", "opt", "max"))


def parse_size(text: str) -> InputSize:
    """The numbers of "NxHxW". Raises `ValueError` with what was expected."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip().lower())
    if match is None or "0" in (match[1], match[2], match[3]):
        raise ValueError(f"'{text}' is not a size; expected NxHxW, such as 1x512x512")
    return int(match[1]), int(match[2]), int(match[3])


def choose_profiles(
    card: ModelCard, min: Sequence[InputSize], opt: Sequence[InputSize], max: Sequence[InputSize]
) -> tuple[Profile, ...]:
    """The profiles to build `card`'s model with: the given sizes, or where there are none the card's defaults.

    Several sizes per bound make several profiles, in order. A missing `min` is the smallest useful input, a missing
    `opt` is `max`, and a missing `max` is `opt`. `min` or `opt` alone says nothing about the largest images, so it
    replaces that bound of the card's default profiles.

    Raises:
        UserError: a size for a model of fixed size, sizes out of order, or sizes that the model does not take.
    """
    bounds = (min, opt, max)
    fixed = _fixed(card)
    if all(isinstance(side, int) for side in fixed):
        if any(bounds):
            size = "x".join(map(str, fixed))
            raise UserError(
                f"this model takes one size, {size}, so --min, --opt and --max have no effect; "
                "leave them out, or export with --dynamic"
            )
        return ()
    if not any(bounds):
        return _defaults(card)
    counts = {len(sizes) for sizes in bounds if sizes}
    if len(counts) > 1:
        raise UserError(
            f"got {len(min)} --min, {len(opt)} --opt and {len(max)} --max; "
            "give each one once per profile, or leave it out"
        )
    (count,) = counts
    if max or (min and opt):
        profiles = tuple(
            _complete(card, *(sizes[index] if sizes else None for sizes in bounds)) for index in range(count)
        )
    elif count == 1:
        profiles = _defaults_with(card, "min", min[0]) if min else _defaults_with(card, "opt", opt[0])
    else:
        raise UserError(f"got {count} times --{'min' if min else 'opt'} alone; name --max as often, once per profile")
    for profile in profiles:
        _check(card, profile)
    return profiles


def tensor_shape(spec: TensorSpec, size: InputSize) -> tuple[int, ...]:
    """The input's full shape for a batch and image size."""
    batch, height, width = size
    return (batch, height, width, 3) if spec.dtype == "uint8" else (batch, 3, height, width)


def best_profile(profiles: Sequence[Profile], size: InputSize) -> int | None:
    """Index of the profile to run `size` with: of those that include it, the one whose `opt` is nearest."""
    best: tuple[int, int] | None = None
    for index, profile in enumerate(profiles):
        if all(low <= side <= high for low, side, high in zip(profile.min, size, profile.max, strict=True)):
            distance = abs(_volume(profile.opt) - _volume(size))
            distance += sum(abs(a - b) for a, b in zip(profile.opt, size, strict=True))
            if best is None or distance < best[0]:
                best = (distance, index)
    return None if best is None else best[1]


def batch_range(card: ModelCard, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest and largest batch that the model takes at `size` (height, width).

    An engine has them from the profile that includes the size and takes the smallest batch; a size that no profile
    includes gives (1, 1), and running it an error.
    """
    if card.batch is not None:
        return card.batch, card.batch
    if card.engine is None or not card.engine.profiles:
        return 1, sys.maxsize
    ranges = [
        (profile["min"][0], profile["max"][0])
        for profile in card.engine.profiles
        if all(
            low <= side <= high for low, side, high in zip(profile["min"][1:], size, profile["max"][1:], strict=True)
        )
    ]
    return min(ranges, default=(1, 1))


def _volume(size: InputSize) -> int:
    return size[0] * size[1] * size[2]


def _fixed(card: ModelCard) -> tuple[int | str, int | str, int | str]:
    height, width = card.network_size
    return card.input.shape[0], height, width


def _defaults(card: ModelCard) -> tuple[Profile, ...]:
    """One profile for the crops of the card's window; else one for wide and one for upright images, as large as the
    card's resize rule makes them.
    """
    if card.window is not None:  # images may be smaller than a crop
        height, width = card.window.crop
        low = _up(_SMALLEST, card.size_divisor)
        sizes = ((1, min(low, height), min(low, width)), (1, height, width), (1, height, width))
        return (Profile(*(_with_fixed(card, size) for size in sizes)),)
    if card.resize is None:
        typical, largest = _WITHOUT_RULE
        return (_within(card, (1, typical, typical), (1, largest, largest)),)
    divisor = card.size_divisor
    long, short = (_up(side, divisor) for side in card.resize)
    width = long if long <= 2 * short else min(long, _up(short * 4 // 3, divisor))
    wide = _within(card, (1, short, width), (1, short, long))
    if not card.is_dynamic or long == short:
        return (wide,)
    return wide, _within(card, (1, width, short), (1, long, short))


def _within(card: ModelCard, opt: InputSize, max: InputSize) -> Profile:
    smallest = _up(_SMALLEST, card.size_divisor)
    sizes = ((1, smallest, smallest), opt, max)
    return Profile(*(_with_fixed(card, size) for size in sizes))


def _with_fixed(card: ModelCard, size: InputSize) -> InputSize:
    batch, height, width = (
        fixed if isinstance(fixed, int) else side for fixed, side in zip(_fixed(card), size, strict=True)
    )
    return batch, height, width


def profile_note(
    profiles: Sequence[Profile], min: Sequence[InputSize], opt: Sequence[InputSize], max: Sequence[InputSize]
) -> str:
    """What was added to sizes that were given in part, as a sentence; empty where they were all given, or none."""
    bounds = {"min": min, "opt": opt, "max": max}
    missing = [bound for bound, sizes in bounds.items() if not sizes]
    if not profiles or len(missing) in (0, len(bounds)):
        return ""
    shown = "; ".join(described(profile.as_dict()) for profile in profiles)
    source = "the model card" if len(missing) == 2 and not max else "the other sizes"
    return f"{' and '.join(f'--{bound}' for bound in missing)} left out and taken from {source}; profiles: {shown}"


def _defaults_with(card: ModelCard, bound: Literal["min", "opt"], size: InputSize) -> tuple[Profile, ...]:
    """The card's default profiles with another `min`, or another `opt`, where they include it. Raises `UserError`."""
    defaults = _defaults(card)
    changed = tuple(dataclasses.replace(profile, **{bound: size}) for profile in defaults)
    if not any(map(_ordered, changed)):
        shown = " and ".join(described(profile.as_dict()) for profile in defaults)
        raise UserError(
            f"--{bound} {'x'.join(map(str, size))} does not fit into this model's default profiles ({shown}); "
            "name --max too"
        )
    return tuple(new if _ordered(new) else old for new, old in zip(changed, defaults, strict=True))


def _ordered(profile: Profile) -> bool:
    return all(low <= opt <= high for low, opt, high in zip(profile.min, profile.opt, profile.max, strict=True))


def _complete(card: ModelCard, low: InputSize | None, opt: InputSize | None, high: InputSize | None) -> Profile:
    high = high or opt
    assert high is not None
    opt = opt or high
    smallest = _up(_SMALLEST, card.size_divisor)
    low = low or _with_fixed(card, (1, min(smallest, opt[1]), min(smallest, opt[2])))
    return Profile(low, opt, high)


def _check(card: ModelCard, profile: Profile) -> None:
    for bound, size in profile.as_dict().items():
        for name, side, fixed in zip(("batch", "height", "width"), size, _fixed(card), strict=True):
            if isinstance(fixed, int) and side != fixed:
                raise UserError(f"--{bound} has {name} {side}, but this model's is fixed to {fixed}")
            if name != "batch" and side % card.size_divisor:
                raise UserError(
                    f"--{bound} has {name} {side}, expected a multiple of {card.size_divisor}; "
                    f"the next one is {_up(side, card.size_divisor)}"
                )
    for name, low, opt, high in zip(("batch", "height", "width"), profile.min, profile.opt, profile.max, strict=True):
        if not low <= opt <= high:
            raise UserError(f"{name}: --min {low}, --opt {opt}, --max {high} are out of order")


def _up(side: int, divisor: int) -> int:
    return -(-side // divisor) * divisor
