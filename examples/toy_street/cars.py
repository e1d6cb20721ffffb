# SPDX-License-Identifier: Apache-2.0
"""Cars and vans: boxes with bevelled ends, panes, wheels, lamps and plates, drawn face by face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from paint import NEAR_M, Array, Canvas, Colour, jitter, mix, pick

PAINTS = [
    (0.78, 0.78, 0.79), (0.12, 0.12, 0.14), (0.45, 0.46, 0.48), (0.62, 0.10, 0.10), (0.13, 0.24, 0.50),
    (0.90, 0.90, 0.88), (0.20, 0.34, 0.24), (0.70, 0.56, 0.20), (0.35, 0.45, 0.56), (0.42, 0.30, 0.22),
]  # fmt: skip

# The standing faces of a box by corner number (bit 0: right, bit 1: top, bit 2: far end), and their outward (x, z).
_FACES = (((0, 4, 6, 2), (-1, 0)), ((1, 5, 7, 3), (1, 0)), ((0, 1, 3, 2), (0, -1)), ((4, 5, 7, 6), (0, 1)))
_TOP = [2, 3, 7, 6]
_SIDES = (-1, 1)


@dataclass(frozen=True)
class _Body:
    """A vehicle in place. Its own frame: x to its right, y up, z ahead; heading 0 looks the way the camera does."""

    canvas: Canvas
    x: float
    z: float
    heading: float
    width: float
    length: float
    label: int

    def turn(self, points: Array) -> Array:
        """Own (x, z) pairs (n, 2) as world directions."""
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        return points @ np.asarray([[cos, -sin], [sin, cos]], np.float32)

    def place(self, points: Sequence[Sequence[float]] | Array) -> Array:
        """Own points (n, 3) in the world, kept before the camera."""
        p = np.asarray(points, np.float32)
        ground = self.turn(p[:, [0, 2]]) + np.asarray((self.x, self.z))
        return np.stack([ground[:, 0], p[:, 1], np.maximum(ground[:, 1], NEAR_M)], axis=1)

    def normal(self, outward: Sequence[float]) -> tuple[float, float]:
        nx, nz = self.turn(np.asarray([outward], np.float32))[0]
        return float(nx), float(nz)

    def seen(self, outward: Sequence[float], points: Array) -> bool:
        """Whether a face with that outward direction looks at the camera."""
        nx, nz = self.normal(outward)
        return bool(nx * points[:, 0].mean() + nz * points[:, 2].mean() < 0)

    def paint(self, points: Array, colour: Colour, grain: float = 0.0) -> None:
        self.canvas.polygon(self.canvas.camera.project(points), colour, self.label, self.z, grain)

    def box(self, heights: tuple[float, float], ends: Sequence[float], inset: float) -> Array:
        """The eight corners; `ends` are the rear and front below, then above; the top is narrower by `inset`."""
        corners = []
        for number in range(8):
            right, top, far = number & 1, number >> 1 & 1, number >> 2
            corners.append(((right - 0.5) * (self.width - 2 * inset * top), heights[top], ends[2 * top + far]))
        return self.place(corners)

    def shell(self, corners: Array, colour: Colour, panes: Colour | None = None) -> None:
        """Paint the faces of a box that are seen, each with a pane if asked."""
        base, light = np.asarray(colour), self.canvas.light
        for numbers, outward in _FACES:
            face = corners[list(numbers)]
            if not self.seen(outward, face):
                continue
            brightness = light.facing(*self.normal(outward))
            self.paint(face, base * brightness, grain=0.05)
            if panes is not None:
                middle = face.mean(axis=0)
                pane = middle + (face - middle) * np.asarray((0.86, 0.72, 0.86))
                self.paint(pane, np.asarray(panes) * (0.7 + 0.4 * brightness))
        if corners[2, 1] < self.canvas.camera.height_m:
            self.paint(corners[_TOP], base * light.facing(0, ny=1))

    def wheels(self) -> None:
        angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        for along in (-0.31 * self.length, 0.31 * self.length):
            for side in _SIDES:
                out = side * self.width / 2
                if self.seen((side, 0), self.place([(out, 0.3, along)])):
                    for radius, shade in ((0.34, 0.06), (0.2, 0.5), (0.07, 0.2)):
                        ring = [0 * angle + out, 0.34 + radius * np.sin(angle), along + radius * np.cos(angle)]
                        self.paint(self.place(np.stack(ring, axis=1)), (shade,) * 3)

    def tyres(self) -> None:
        """Paint the part of the wheels that is visible below the bumpers."""
        for end in (-0.5, 0.5):
            for side in _SIDES:
                inner, outer = side * 0.31 * self.width, side * 0.44 * self.width
                tyre = [(inner, 0, 0), (outer, 0, 0), (outer, 0.3, 0), (inner, 0.3, 0)]
                self.paint(self.place(np.add(tyre, (0, 0, end * self.length))), (0.06, 0.06, 0.06))

    def lamps_and_plates(self) -> None:
        for end, lamp in ((-1, (0.75, 0.08, 0.06)), (1, (0.95, 0.94, 0.85))):
            at = end * self.length / 2
            if not self.seen((0, end), self.place([(0, 0.7, at)])):
                continue
            for side in _SIDES:
                inner, outer = side * 0.30 * self.width, side * 0.46 * self.width
                self.paint(self.place([(inner, 0.6, at), (outer, 0.6, at), (outer, 0.76, at), (inner, 0.76, at)]), lamp)
            plate = [(-0.26, 0.48, at), (0.26, 0.48, at), (0.26, 0.6, at), (-0.26, 0.6, at)]
            self.paint(self.place(plate), (0.85, 0.84, 0.74))


def vehicle(canvas: Canvas, rng: np.random.Generator, x: float, z: float, heading: float, label: int) -> None:
    """A car or a van; heading 0 shows its rear, pi its front, pi/2 its side."""
    van = rng.random() < 0.2
    body = _Body(canvas, x, z, heading, rng.uniform(1.7, 1.9), rng.uniform(3.7, 4.6), label)
    waist, roof = (1.15, rng.uniform(1.8, 2.2)) if van else (rng.uniform(0.8, 0.95), rng.uniform(1.35, 1.55))
    cabin = (-0.98, 0.8, -0.94, 0.6) if van else (-0.9, 0.5, -0.6, 0.2)
    paint, glass = pick(rng, PAINTS), jitter(rng, (0.14, 0.17, 0.20), 0.04)
    glass = mix(glass, canvas.light.haze, rng.uniform(0.05, 0.4))
    half = body.length / 2

    cos, sin = abs(np.cos(heading)), abs(np.sin(heading))
    extent = (body.width / 2 * cos + half * sin, body.width / 2 * sin + half * cos)
    canvas.shadow(x, z, (extent[0] * 1.12, extent[1] * 1.05), 0.55)
    body.tyres()
    body.shell(body.box((0.18, 0.45), (-half, half, -half, half), 0.0), paint * 0.75)
    body.shell(body.box((0.42, waist), (-half, half, -half * 0.97, half * 0.96), 0.04), paint)
    body.wheels()
    body.shell(body.box((waist, roof), [half * end for end in cabin], 0.16), paint, glass)
    body.lamps_and_plates()
