# SPDX-License-Identifier: Apache-2.0
"""Tools that paint the scenes: a pinhole camera, a canvas that keeps labels beside colours, and textures.

World coordinates are metres: x to the right, y up from the ground, z ahead. Colours are RGB floats, 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # of floats; NumPy's stubs widen np.floating in most operations
Vector = Sequence[float] | Array
Colour = Vector

_SHIFT = 4  # fractional bits of polygon corners
NEAR_M = 0.8  # nothing is drawn closer to the camera than this
TILE = 256  # side of the tileable noise textures


@dataclass(frozen=True)
class Camera:
    """A level pinhole camera above the road; lengths in canvas pixels but for `height_m`."""

    focal: float
    centre: float  # column of the vanishing point
    horizon: float  # its row
    height_m: float

    def project(self, points: Array | Sequence[Sequence[float]]) -> Array:
        """World points (n, 3) to canvas points (n, 2) as (column, row)."""
        p = np.asarray(points, np.float32)
        z = np.maximum(p[:, 2], 1e-3)
        return np.stack(
            [self.centre + self.focal * p[:, 0] / z, self.horizon - self.focal * (p[:, 1] - self.height_m) / z], axis=1
        )

    def scale(self, z: float) -> float:
        """Canvas pixels per metre at the distance z."""
        return self.focal / z


@dataclass
class Light:
    """The light of one scene: where the sun stands, and what the air does to distant colours."""

    sun_side: float  # -1 sun on the left .. 1 sun on the right
    strength: float  # 0 overcast .. 1 clear
    haze: Array  # colour that distance fades to
    haze_distance_m: float

    def facing(self, nx: float, nz: float = 0.0, ny: float = 0.0) -> float:
        """Brightness of a face with the outward normal (nx, ny, nz)."""
        lambert = 0.75 * nx * self.sun_side + 0.55 * ny - 0.25 * nz
        return 0.82 + 0.3 * self.strength * lambert

    def fade(self, colour: Array, z: float | Array) -> Array:
        """`colour` seen through z metres of air."""
        clear = np.exp(-np.asarray(z, np.float32) / self.haze_distance_m)
        clear = clear[..., None] if clear.ndim else clear
        return np.asarray(colour * clear + self.haze * (1 - clear), np.float32)


@dataclass
class Canvas:
    """An image and its labels, painted together from far to near."""

    image: Array  # (H, W, 3)
    labels: NDArray[np.uint8]  # (H, W)
    camera: Camera
    light: Light
    noise: Noise

    def box(self, points: Array, margin: float = 1.0) -> tuple[slice, slice] | None:
        """The part of the canvas around `points` (n, 2), or None when it lies outside."""
        height, width = self.labels.shape
        low = np.floor(points.min(axis=0) - margin)
        high = np.ceil(points.max(axis=0) + margin) + 1
        x0, y0 = int(max(low[0], 0)), int(max(low[1], 0))
        x1, y1 = int(min(high[0], width)), int(min(high[1], height))
        return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None

    def grid(self, box: tuple[slice, slice]) -> tuple[Array, Array]:
        """Pixel centres of a box: columns (1, w) and rows (h, 1)."""
        rows = np.arange(box[0].start, box[0].stop, dtype=np.float32)[:, None] + 0.5
        columns = np.arange(box[1].start, box[1].stop, dtype=np.float32)[None, :] + 0.5
        return columns, rows

    def mask(self, box: tuple[slice, slice], polygon: Array) -> NDArray[np.bool_]:
        """Mask of the pixels of a box that a polygon (n, 2) covers."""
        out = np.zeros((box[0].stop - box[0].start, box[1].stop - box[1].start), np.uint8)
        corners = np.clip(polygon - (box[1].start, box[0].start) - 0.5, -20000, 20000)
        cv2.fillPoly(out, [np.round(corners * (1 << _SHIFT)).astype(np.int32)], 1, shift=_SHIFT)
        return out.astype(bool)

    def put(self, box: tuple[slice, slice], mask: NDArray[np.bool_], colour: Array, label: int, z: float) -> None:
        """Paint the masked pixels of a box; `colour` is (3,) or (h, w, 3), before the haze."""
        colour = self.light.fade(np.asarray(colour, np.float32), z)
        self.image[box][mask] = colour if colour.ndim == 1 else colour[mask]
        self.labels[box][mask] = label

    def polygon(self, points: Array, colour: Colour, label: int, z: float, grain: float = 0.0) -> None:
        """Paint a flat polygon of canvas points (n, 2); `grain` is the strength of a soft texture on it."""
        box = self.box(points)
        if box is None:
            return
        tint: Array = np.asarray(colour, np.float32)
        if grain:
            columns, rows = self.grid(box)
            tint = tint * (1 + grain * self.noise.soft_at(columns * 2.3, rows * 2.3))[..., None]
        self.put(box, self.mask(box, points), tint, label, z)

    def ellipse(self, centre: Vector, radii: Sequence[float], colour: Colour, label: int, z: float) -> None:
        """Paint an upright ellipse; centre (column, row) and radii in canvas pixels."""
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False, dtype=np.float32)
        ring = np.stack([centre[0] + radii[0] * np.cos(angle), centre[1] + radii[1] * np.sin(angle)], axis=1)
        self.polygon(ring.astype(np.float32), colour, label, z)

    def limb(
        self,
        start: Vector,
        end: Vector,
        widths: Sequence[float],
        colour: Colour,
        label: int,
        z: float,
    ) -> None:
        """Paint a rounded stroke whose width runs from widths[0] to widths[1], in canvas pixels."""
        a, b = np.asarray(start, np.float32), np.asarray(end, np.float32)
        along = (b - a) / max(float(np.linalg.norm(b - a)), 1e-6)
        turn = np.arctan2(along[1], along[0])
        half = np.linspace(-np.pi / 2, np.pi / 2, 7, dtype=np.float32)

        def cap(point: Array, width: float, angles: Array) -> Array:
            return point + 0.5 * width * np.stack([np.cos(angles), np.sin(angles)], axis=1)

        outline = np.concatenate([cap(b, widths[1], half + turn), cap(a, widths[0], half + turn + np.pi)])
        self.polygon(outline.astype(np.float32), colour, label, z)

    def shadow(self, x: float, z: float, radii_m: tuple[float, float], depth: float) -> None:
        """Darken the ground below something, in world metres; labels stay."""
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False, dtype=np.float32)
        ring = np.stack(
            [x + radii_m[0] * np.cos(angle), 0 * angle, np.maximum(z + radii_m[1] * np.sin(angle), NEAR_M)], axis=1
        )
        points = self.camera.project(ring)
        box = self.box(points)
        if box is not None:
            self.image[box][self.mask(box, points)] *= 1 - depth


@dataclass
class Noise:
    """Tileable random textures of one scene, about -1..1: white, dabs (white, blurred) and soft (several octaves)."""

    rng: np.random.Generator
    white: Array = field(init=False)
    dabs: Array = field(init=False)
    soft: Array = field(init=False)

    def __post_init__(self) -> None:
        self.white = self.rng.uniform(-1, 1, (TILE, TILE)).astype(np.float32)
        wide = np.pad(self.white, 8, mode="wrap")
        self.dabs = 4 * cv2.GaussianBlur(wide, (0, 0), 1.3)[8:-8, 8:-8]
        self.soft = np.zeros((TILE, TILE), np.float32)
        for cells, weight in ((8, 1.0), (16, 0.6), (32, 0.4), (64, 0.3), (128, 0.2)):
            coarse = self.rng.standard_normal((cells, cells)).astype(np.float32)
            wrapped = np.pad(coarse, 2, mode="wrap")
            side = TILE // cells
            fine = cv2.resize(wrapped, None, fx=side, fy=side, interpolation=cv2.INTER_CUBIC)
            self.soft += weight * fine[2 * side : 2 * side + TILE, 2 * side : 2 * side + TILE]
        self.soft /= 2 * self.soft.std()

    def white_at(self, x: Array, y: Array) -> Array:
        """White texture at texel coordinates that broadcast against each other."""
        return self.white[_texel(y), _texel(x)]

    def dabs_at(self, x: Array, y: Array) -> Array:
        """Blurred white texture, about three texels to a dab, at texel coordinates that broadcast."""
        return self.dabs[_texel(y), _texel(x)]

    def soft_at(self, x: Array, y: Array) -> Array:
        """Soft texture at texel coordinates that broadcast against each other."""
        return self.soft[_texel(y), _texel(x)]


def _texel(value: Array) -> NDArray[np.int64]:
    return np.floor(np.clip(value, -1e6, 1e6)).astype(np.int64) & (TILE - 1)


def mix(a: Colour, b: Colour, weight: float | Array) -> Array:
    """`a` where the weight is 0, `b` where it is 1; an array of weights (h, w) gives (h, w, 3)."""
    first, second = np.asarray(a, np.float32), np.asarray(b, np.float32)
    amount = np.asarray(weight, np.float32)
    amount = amount[..., None] if amount.ndim else amount
    return np.asarray(first * (1 - amount) + second * amount, np.float32)


def jitter(rng: np.random.Generator, colour: Colour, amount: float = 0.06) -> Array:
    """A colour near the given one: brightness and each channel vary."""
    shift = rng.normal(0, amount) + rng.normal(0, amount / 2, 3)
    return np.clip(np.asarray(colour) + shift, 0.02, 0.98).astype(np.float32)


def pick(rng: np.random.Generator, colours: Sequence[Colour], amount: float = 0.06) -> Array:
    """One of several colours, jittered."""
    return jitter(rng, colours[int(rng.integers(len(colours)))], amount)
