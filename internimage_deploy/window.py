# SPDX-License-Identifier: Apache-2.0
"""The sliding window: the size of the crops that a model is run on, and the step between them."""

from __future__ import annotations

from dataclasses import dataclass

from internimage_deploy.errors import UserError


@dataclass(frozen=True)
class Window:
    """A sliding window: (height, width) of the crop and of the step, in pixels at network scale.

    Raises:
        UserError: values of another form, or a stride that would leave pixels between the crops.
    """

    crop: tuple[int, int]
    stride: tuple[int, int]

    def __post_init__(self) -> None:
        for name, value in (("crop", self.crop), ("stride", self.stride)):
            if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)):
                raise UserError(f"{name} is {value!r}, expected (height, width) in pixels such as (512, 512)")
        for crop, stride in zip(self.crop, self.stride, strict=True):
            if not 0 < stride <= crop:
                raise UserError(
                    f"window {self.crop} with stride {self.stride}: expected strides from 1 to the crop's size"
                )

    def scaled_to(self, crop: tuple[int, int]) -> Window:
        """The window with another `crop` and the stride in proportion, rounded to pixels, at least 1."""
        height, width = (
            max(round(stride * new / old), 1) for stride, new, old in zip(self.stride, crop, self.crop, strict=True)
        )
        return Window(crop, (height, width))


def default_stride(crop: tuple[int, int]) -> tuple[int, int]:
    """Two thirds of the crop, rounded down: the usual overlap."""
    return max(crop[0] * 2 // 3, 1), max(crop[1] * 2 // 3, 1)
