# SPDX-License-Identifier: Apache-2.0
"""Labels drawn over an image, and the legend beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Color = tuple[int, int, int]

_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)


def blend(
    image: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8 | np.int32],
    palette: Sequence[Color],
    alpha: float,
    classes: Sequence[int] | None = None,
) -> npt.NDArray[np.uint8]:
    """The labels' colours over an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) class ids.
        palette: (R, G, B) by id.
        alpha: weight of the colours, 0 to 1.
        classes: ids that are coloured; elsewhere the image stays as it is. None for all.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    import cv2

    colors = np.take(np.asarray(palette, np.uint8), labels, axis=0)
    drawn = np.asarray(cv2.addWeighted(colors, alpha, image, 1 - alpha, 0), np.uint8)
    if classes is not None:
        shown = np.zeros(len(palette), bool)
        shown[list(classes)] = True
        drawn = np.where(shown[labels][:, :, None], drawn, image)
    return drawn


def with_legend(image: npt.NDArray[np.uint8], entries: Sequence[tuple[str, Color]]) -> npt.NDArray[np.uint8]:
    """The image with a column of (class, colour) beside it, in as many columns as its height asks for.

    Args:
        image: (H, W, 3) uint8 RGB.
        entries: from top to bottom.

    Returns:
        (H, W + legend, 3) uint8 RGB; H grows to one line where the image is lower.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not entries:
        return image
    size = int(np.clip(image.shape[0] / 28, 12, 28))
    font = ImageFont.load_default(size)
    line, swatch = round(1.5 * size), size
    rows = max((image.shape[0] - size) // line, 1)
    columns = [entries[start : start + rows] for start in range(0, len(entries), rows)]
    widths = [round(max(font.getlength(name) for name, _ in column)) + swatch + 2 * size for column in columns]
    height = max(image.shape[0], line + size)
    sheet = Image.new("RGB", (image.shape[1] + sum(widths) + size // 2, height), _BACKGROUND)
    sheet.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(sheet)
    left = image.shape[1] + size // 2
    for column, width in zip(columns, widths, strict=True):
        for row, (name, color) in enumerate(column):
            top = size // 2 + row * line
            draw.rectangle((left, top, left + swatch, top + swatch), fill=color, outline=_INK)
            draw.text((left + swatch + size // 2, top + swatch / 2), name, font=font, fill=_INK, anchor="lm")
        left += width
    return np.asarray(sheet, np.uint8)
