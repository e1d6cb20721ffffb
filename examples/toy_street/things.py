# SPDX-License-Identifier: Apache-2.0
"""Objects along a street: buildings, trees, people, and poles with signs or lamps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from paint import NEAR_M, Array, Canvas, Colour, jitter, mix, pick

SKY, BUILDING, ROAD, SIDEWALK, GRASS, TREE, CAR, PERSON, POLE = range(9)

# The families overlap on purpose: grey is asphalt, concrete, car and cloud; green is leaf, paint and jacket.
WALLS = [
    (0.62, 0.36, 0.28), (0.72, 0.62, 0.50), (0.55, 0.55, 0.56), (0.80, 0.77, 0.70), (0.45, 0.47, 0.50),
    (0.76, 0.58, 0.42), (0.56, 0.64, 0.70), (0.50, 0.58, 0.46), (0.84, 0.80, 0.62), (0.42, 0.30, 0.27),
]  # fmt: skip
CLOTHES = [
    (0.14, 0.15, 0.20), (0.66, 0.14, 0.16), (0.20, 0.32, 0.56), (0.80, 0.78, 0.74), (0.36, 0.42, 0.28),
    (0.88, 0.66, 0.16), (0.42, 0.40, 0.40), (0.52, 0.36, 0.24), (0.30, 0.46, 0.46), (0.60, 0.40, 0.56),
]  # fmt: skip
SKINS = [(0.90, 0.74, 0.62), (0.76, 0.56, 0.42), (0.48, 0.32, 0.24), (0.30, 0.20, 0.16)]
LEAVES = [
    (0.24, 0.38, 0.14), (0.34, 0.46, 0.18), (0.16, 0.30, 0.16), (0.44, 0.46, 0.16), (0.62, 0.42, 0.14),
    (0.56, 0.28, 0.14), (0.30, 0.40, 0.28),
]  # fmt: skip


@dataclass(frozen=True)
class Facade:
    """Appearance of one building's walls; lengths in metres."""

    wall: Array
    trim: Array
    glass: Array  # (16, 16, 3): the panes, indexed by column and floor
    floor_m: float
    bay_m: float
    window_fraction: tuple[float, float]  # of a bay's width and of a floor's height
    masonry: float  # strength of the brick or panel joints
    course_m: float
    shop: bool

    def colours(self, canvas: Canvas, along: Array, up: Array, z: Array) -> Array:
        """Colours (n, 3) of n points of a wall, `along` metres along it and `up` metres high, seen from z metres."""
        near = np.exp(-z / 18)
        grain = (
            canvas.noise.soft_at(along * 9, up * 9) * 0.07 + canvas.noise.white_at(along * 31, up * 31) * 0.05 * near
        )
        row = np.floor(up / self.course_m)
        joint = (up / self.course_m - row < 0.16) | ((along / (3 * self.course_m) + 0.5 * (row % 2)) % 1 < 0.07)
        out = self.wall * (1 + grain - self.masonry * near * joint)[..., None]
        storey, bay = np.floor(up / self.floor_m), np.floor(along / self.bay_m)
        x, y = along / self.bay_m - bay - 0.5, up / self.floor_m - storey - 0.55
        shop = self.shop & (storey == 0)
        width, height = np.where(shop, 0.86, self.window_fraction[0]), np.where(shop, 0.66, self.window_fraction[1])
        frame = (np.abs(x) < width / 2 + 0.05) & (np.abs(y) < height / 2 + 0.05)
        pane = (np.abs(x) < width / 2) & (np.abs(y) < height / 2) & (np.abs(x) > 0.02)
        out = np.where(frame[..., None], self.trim, out)
        panes = self.glass[bay.astype(np.int64) % 16, storey.astype(np.int64) % 16]
        sheen = 1 + 0.25 * (y + 0.3 * x)[..., None]
        out = np.where(pane[..., None], panes * sheen, out)
        out = np.where(
            (up % self.floor_m < 0.22)[..., None] & (storey > 0)[..., None], mix(self.wall, self.trim, 0.5), out
        )
        return np.asarray(out, np.float32)


def facade(rng: np.random.Generator, sky: Colour) -> Facade:
    """A random facade whose panes mirror the colour `sky` now and then."""
    wall = pick(rng, WALLS)
    dark = rng.uniform(0.10, 0.30, (16, 16, 1)) * (0.9, 1.0, 1.1)
    mirrored = np.asarray(sky) * rng.uniform(0.6, 1.0, (16, 16, 1))
    lit = np.asarray((0.95, 0.80, 0.50)) * rng.uniform(0.7, 1.0, (16, 16, 1))
    kind = rng.random((16, 16, 1))
    mirror_fraction = rng.choice([0.1, 0.35, 0.9])
    glass = np.where(kind < mirror_fraction, mirrored, np.where(kind > 0.96, lit, dark))
    curtain_wall = rng.random() < 0.15
    return Facade(
        wall=wall,
        trim=pick(rng, [(0.86, 0.84, 0.80), (0.30, 0.28, 0.27), wall * 0.75]),
        glass=glass.astype(np.float32),
        floor_m=rng.uniform(2.7, 3.5),
        bay_m=rng.uniform(1.4, 1.9) if curtain_wall else rng.uniform(2.0, 3.6),
        window_fraction=(0.84, 0.80) if curtain_wall else (rng.uniform(0.35, 0.62), rng.uniform(0.42, 0.60)),
        masonry=(0.0, 0.12, 0.28)[rng.integers(3)],
        course_m=(0.22, 0.3, 0.9)[rng.integers(3)],
        shop=bool(rng.random() < 0.3),
    )


def building(
    canvas: Canvas, rng: np.random.Generator, wall_x: float, start: float, end: float, height: float, sky: Colour
) -> None:
    """A building whose street wall stands at `wall_x` from `start` to `end` metres ahead."""
    look, camera, side = facade(rng, sky), canvas.camera, 1.0 if wall_x > 0 else -1.0
    depth = rng.uniform(8, 14)
    back = wall_x + side * depth
    ridge = height + rng.uniform(1.5, 3.0) if height < 9 and rng.random() < 0.7 else height
    middle = wall_x + side * depth / 2

    def slab(corners: Sequence[Sequence[float]], brightness: float, street: bool) -> None:
        points = camera.project(corners)
        box = canvas.box(points)
        if box is None:
            return
        mask = canvas.mask(box, points)
        rows, columns = (index.astype(np.float32) + 0.5 for index in np.nonzero(mask))
        offset = columns + box[1].start - camera.centre
        if street:
            offset = np.where(np.abs(offset) < 1, np.float32(side), offset)
            along = z = np.clip(camera.focal * wall_x / offset, NEAR_M, 400)
        else:
            z = np.full_like(offset, start)
            along = offset * start / camera.focal
        up = camera.height_m - (rows + box[0].start - camera.horizon) * z / camera.focal
        canvas.image[box][mask] = canvas.light.fade(look.colours(canvas, along, up, z) * brightness, z)
        canvas.labels[box][mask] = BUILDING

    if ridge > height:
        tiles = pick(rng, [(0.50, 0.26, 0.20), (0.36, 0.34, 0.34), (0.44, 0.34, 0.26)]) * canvas.light.facing(
            -side, ny=1
        )
        roof = [(wall_x - side * 0.3, height, start), (wall_x - side * 0.3, height, end)]
        roof += [(middle, ridge, end), (middle, ridge, start)]
        canvas.polygon(camera.project(roof), tiles, BUILDING, (start + end) / 2, grain=0.12)
    slab([(wall_x, 0, start), (wall_x, height, start), (wall_x, height, end), (wall_x, 0, end)],
         canvas.light.facing(-side), street=True)  # fmt: skip
    gable = [
        (wall_x, 0, start),
        (wall_x, height, start),
        (middle, ridge, start),
        (back, height, start),
        (back, 0, start),
    ]
    slab(gable, canvas.light.facing(0, nz=-1), street=False)


def foliage(
    canvas: Canvas, rng: np.random.Generator, centre: Sequence[float], radii: Sequence[float], leaf: Colour, z: float
) -> None:
    """A ragged crown around a canvas point; radii in canvas pixels. Corners of a leaf mass stay see-through."""
    box = canvas.box(np.asarray([centre], np.float32), max(radii) * 1.35)
    if box is None:
        return
    columns, rows = canvas.grid(box)
    dx, dy = (columns - centre[0]) / radii[0], (rows - centre[1]) / radii[1]
    cell = 24 / max(radii)
    shift = (rng.uniform(0, 256), rng.uniform(0, 256))
    lumps = canvas.noise.soft_at(columns * cell + shift[0], rows * cell + shift[1])
    mask = dx * dx + dy * dy + 0.38 * lumps < 1.0
    texel_px = max(max(radii) / 42, 0.6)  # a visible bunch of leaves is three texels
    leaves = canvas.noise.dabs_at(columns / texel_px + shift[1], rows / texel_px + shift[0])
    lean = canvas.light.sun_side * canvas.light.strength
    light = 0.92 + 0.34 * lumps + 0.26 * leaves - 0.26 * dy + 0.14 * dx * lean
    tint = np.asarray(leaf, np.float32) * np.clip(light, 0.25, 1.7)[..., None]
    canvas.put(box, mask, tint, TREE, z)


def tree(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A broad-leaved tree, a fir or a bush."""
    size, leaf = canvas.camera.scale(z), pick(rng, LEAVES, 0.04)
    kind = rng.random()
    if kind < 0.2:
        radius = rng.uniform(0.5, 1.0)
        canvas.shadow(x, z, (radius * 1.2, 0.6), 0.4)
        foot = canvas.camera.project([(x, radius * 0.6, z)])[0]
        foliage(canvas, rng, foot, (radius * size * rng.uniform(1, 1.8), radius * size), leaf, z)
        return
    height = rng.uniform(4.0, 8.0)
    bark = jitter(rng, (0.32, 0.25, 0.20), 0.05)
    canvas.shadow(x, z, (1.3, 0.8), 0.35)
    foot, top = canvas.camera.project([(x, 0, z), (x + rng.normal(0, 0.15), height * 0.7, z)])
    width = rng.uniform(0.24, 0.42) * size
    canvas.limb(foot, top, (width * 1.2, width * 0.6), bark, TREE, z)
    if kind < 0.4:
        for level in range(4):
            fraction = 0.3 + 0.2 * level
            centre = foot + (top - foot) * fraction * 1.25
            radius = (1.9 - 1.4 * fraction) * height / 6 * size
            foliage(canvas, rng, centre, (radius, radius * 0.75), np.asarray(leaf) * 0.8, z)
        return
    crown = height * rng.uniform(0.24, 0.34) * size
    for _ in range(3):
        centre = top + rng.normal(0, 0.32, 2) * crown
        foliage(canvas, rng, centre, (crown * rng.uniform(0.75, 1.1), crown * rng.uniform(0.65, 0.95)), leaf, z)


def person(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A standing or walking person, sometimes in a skirt, with a bag or with striped clothes."""
    tall = rng.uniform(1.55, 1.9)
    unit = canvas.camera.scale(z) * tall
    foot = canvas.camera.project([(x, 0, z)])[0]
    top, legs, skin = pick(rng, CLOTHES), pick(rng, CLOTHES), pick(rng, SKINS, 0.03)
    hair = pick(rng, [(0.10, 0.08, 0.07), (0.36, 0.24, 0.14), (0.70, 0.56, 0.32), (0.5, 0.5, 0.5)], 0.04)
    stride, side = rng.uniform(0.0, 0.11), rng.choice([-1.0, 1.0])
    broad = rng.uniform(0.9, 1.25)
    canvas.shadow(x, z, (0.42, 0.3), 0.4)

    def at(u: float, v: float) -> Array:
        return np.asarray((foot[0] + u * unit, foot[1] - v * unit), np.float32)

    def stroke(a: tuple[float, float], b: tuple[float, float], w: tuple[float, float], colour: Colour) -> None:
        canvas.limb(at(*a), at(*b), (w[0] * unit, w[1] * unit), colour, PERSON, z)

    lit = canvas.light.facing(0.4 * canvas.light.sun_side)
    for s in (-1, 1):
        hip, ankle = (0.045 * s, 0.48), (0.04 * s + stride * s, 0.04)
        stroke(hip, ankle, (0.105 * broad, 0.065), legs * lit * (1.0 if s > 0 else 0.82))
        stroke(ankle, (ankle[0] + 0.03 * side, 0.022), (0.06, 0.045), (0.08, 0.07, 0.07))
    swing = stride * rng.uniform(0.4, 1.2)
    stroke((-0.1 * broad, 0.77), (-0.12 * broad - swing, 0.47), (0.075, 0.055), top * lit * 0.8)
    if rng.random() < 0.25:
        skirt = [at(u * broad, v) for u, v in ((-0.08, 0.56), (0.08, 0.56), (0.13, 0.27), (-0.13, 0.27))]
        canvas.polygon(np.stack(skirt), legs * lit, PERSON, z)
    body = (
        (-0.075, 0.50),
        (0.075, 0.50),
        (0.115, 0.70),
        (0.105, 0.80),
        (0.03, 0.84),
        (-0.03, 0.84),
        (-0.105, 0.80),
        (-0.115, 0.70),
    )
    canvas.polygon(np.stack([at(u * broad, v) for u, v in body]), top * lit, PERSON, z, grain=0.10)
    if rng.random() < 0.3:
        stripe = pick(rng, CLOTHES)
        for v in (0.56, 0.64, 0.72):
            stroke((-0.075 * broad, v), (0.075 * broad, v), (0.03, 0.03), stripe * lit)
    stroke((0.1 * broad, 0.77), (0.12 * broad + swing, 0.47), (0.075, 0.055), top * lit * 0.92)
    canvas.ellipse(at(0.12 * broad + swing, 0.45), (0.025 * unit, 0.03 * unit), skin, PERSON, z)
    if rng.random() < 0.35:
        canvas.ellipse(at(side * 0.13 * broad, 0.60), (0.06 * unit, 0.10 * unit), pick(rng, CLOTHES), PERSON, z)
    stroke((0, 0.82), (0, 0.88), (0.06, 0.06), skin * 0.85)
    canvas.ellipse(at(0, 0.935), (0.058 * unit, 0.07 * unit), hair, PERSON, z)
    if rng.random() < 0.65:
        canvas.ellipse(at(0.018 * side, 0.915), (0.042 * unit, 0.052 * unit), skin * lit, PERSON, z)


def pole(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A traffic sign, a street lamp or a traffic light; post and plate are one class."""
    size, side = canvas.camera.scale(z), -np.sign(x)
    kind = rng.random()
    metal = pick(rng, [(0.56, 0.57, 0.58), (0.22, 0.23, 0.24), (0.34, 0.40, 0.34)], 0.05)
    height = rng.uniform(5.0, 7.0) if kind < 0.35 else rng.uniform(2.3, 3.0)
    width = rng.uniform(0.20, 0.28) * size
    canvas.shadow(x, z, (0.3, 0.2), 0.35)
    foot, top = canvas.camera.project([(x, 0, z), (x, height, z)])
    canvas.limb(foot, top, (width * 1.15, width), metal, POLE, z)
    canvas.limb(foot - (width * 0.25, 0), top - (width * 0.25, 0), (width * 0.3,) * 2, metal * 1.25, POLE, z)
    if kind < 0.35:
        arm = top + np.asarray((side * 1.3, -0.25)) * size
        canvas.limb(top, arm, (width * 0.9, width * 0.8), metal, POLE, z)
        reach, bulb = np.asarray((0.3 * size, 0)), np.asarray((0.2 * size, 0))
        under = arm + np.asarray((0, 0.08 * size))
        canvas.limb(arm - reach, arm + reach, (0.26 * size,) * 2, metal * 0.9, POLE, z)
        canvas.limb(under - bulb, under + bulb, (0.1 * size,) * 2, (0.98, 0.95, 0.82), POLE, z)
    elif kind < 0.55:
        box = [top + np.asarray(c) * size for c in ((-0.2, -0.1), (0.2, -0.1), (0.2, 0.85), (-0.2, 0.85))]
        canvas.polygon(np.stack(box).astype(np.float32), (0.10, 0.11, 0.10), POLE, z)
        lit = int(rng.integers(3))
        for i, lamp in enumerate(((0.95, 0.14, 0.10), (0.98, 0.75, 0.15), (0.20, 0.85, 0.45))):
            colour = np.asarray(lamp) * (1.0 if i == lit else 0.28)
            canvas.ellipse(top + np.asarray((0, 0.1 + 0.28 * i)) * size, (0.11 * size,) * 2, colour, POLE, z)
    else:
        face = pick(rng, [(0.80, 0.10, 0.10), (0.12, 0.28, 0.66), (0.92, 0.92, 0.90), (0.96, 0.78, 0.12)], 0.04)
        rim = pick(rng, [(0.95, 0.95, 0.94), (0.78, 0.10, 0.10), (0.12, 0.12, 0.12)], 0.03)
        corners = int(rng.choice([3, 4, 8, 20]))
        angle = np.arange(corners) * 2 * np.pi / corners - np.pi / 2 + (np.pi / corners if corners in (4, 8) else 0)
        ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(0.42, 0.56) * size
        middle = top + np.asarray((0, 0.3 * size))
        canvas.polygon((middle + ring).astype(np.float32), rim, POLE, z)
        canvas.polygon((middle + ring * 0.78).astype(np.float32), face, POLE, z)
        bar = np.asarray((0.14 * size, 0))
        canvas.limb(middle - bar, middle + bar, (0.1 * size,) * 2, rim, POLE, z)
