# SPDX-License-Identifier: Apache-2.0
"""Labelled street scenes, painted from a seed.

A scene is a street in perspective: road, pavements and verges as textured ground, buildings on both sides, and trees,
cars, people and poles before them, under one light. Colours overlap between classes (grey is asphalt, concrete, cloud
and car), so texture, shape and place must tell them apart. The same seed and size give the same scene.

    python examples/toy_street/scenes.py OUTDIR [--count N] [--first SEED]

writes `OUTDIR/images/SEED.png`, and its labels as an indexed PNG to `OUTDIR/labels/SEED.png`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from cars import vehicle
from numpy.typing import NDArray
from paint import NEAR_M, Array, Camera, Canvas, Light, Noise, jitter, mix, pick
from things import BUILDING, CAR, GRASS, LEAVES, ROAD, SIDEWALK, SKY, WALLS, building, foliage, person, pole, tree

CLASSES = ("sky", "building", "road", "sidewalk", "grass", "tree", "car", "person", "pole")
PALETTE = (
    (70, 130, 180),
    (70, 70, 70),
    (128, 64, 128),
    (244, 35, 232),
    (152, 251, 152),
    (107, 142, 35),
    (0, 0, 142),
    (220, 20, 60),
    (220, 220, 0),
)
SIZE = (192, 256)  # (height, width) in pixels
# Seeds below this one may be trained on; the held-out scenes begin here.
FIRST_HELD_OUT = 1_000_000

_OVERSAMPLING = 2
_FEW = 16  # scenes that are painted before further processes have started


class Scene(NamedTuple):
    """image: (H, W, 3) uint8 RGB; labels: (H, W) uint8, indices into CLASSES."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


class _Street(NamedTuple):
    """The street's plan: offsets from its middle line, in metres."""

    half_road: float
    walk: tuple[tuple[float, float], tuple[float, float]]  # per side: where the pavement begins and ends
    wall: tuple[float, float]  # per side: where the buildings begin
    shift: float  # of the middle line from the camera
    bend: float  # the middle line is at shift + bend * z**2
    crossing: tuple[float, float]  # a side street from .. to, far away when there is none
    stripes: float  # where a zebra crossing begins

    def middle(self, z: float) -> float:
        return self.shift + self.bend * min(z, 60.0) ** 2


def scene(seed: int, size: tuple[int, int] = SIZE) -> Scene:
    """The scene of a seed; `size` is (height, width) in pixels."""
    rng = np.random.default_rng(seed)
    height, width = size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING
    camera = Camera(
        focal=rng.uniform(0.75, 1.05) * width,
        centre=rng.uniform(0.36, 0.64) * width,
        horizon=rng.uniform(0.40, 0.54) * height,
        height_m=rng.uniform(1.9, 3.2),
    )
    light, zenith = _weather(rng)
    canvas = Canvas(
        image=np.zeros((height, width, 3), np.float32),
        labels=np.full((height, width), SKY, np.uint8),
        camera=camera,
        light=light,
        noise=Noise(rng),
    )
    street = _plan(rng)
    _sky(canvas, rng, zenith)
    _skyline(canvas, rng)
    _ground(canvas, rng, street)
    _buildings(canvas, rng, street, zenith)
    _furnish(canvas, rng, street)
    image = cv2.resize(canvas.image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    half = _OVERSAMPLING // 2
    labels = canvas.labels[half::_OVERSAMPLING, half::_OVERSAMPLING].copy()
    return Scene(_photograph(image, rng, light), labels)


def _weather(rng: np.random.Generator) -> tuple[Light, Array]:
    """The light, and the colour of the sky overhead."""
    kind = rng.random()
    if kind < 0.45:  # clear
        zenith, haze, strength = (0.25, 0.46, 0.76), (0.74, 0.83, 0.90), rng.uniform(0.6, 1.0)
    elif kind < 0.75:  # overcast
        zenith, haze, strength = (0.58, 0.61, 0.65), (0.76, 0.77, 0.78), rng.uniform(0.0, 0.25)
    elif kind < 0.9:  # low sun
        zenith, haze, strength = (0.40, 0.46, 0.62), (0.94, 0.74, 0.54), rng.uniform(0.6, 1.0)
    else:  # fog
        zenith, haze, strength = (0.70, 0.71, 0.72), (0.74, 0.74, 0.74), 0.0
    distance = rng.uniform(35, 60) if kind >= 0.9 else rng.uniform(70, 220)
    return Light(rng.uniform(-1, 1), strength, jitter(rng, haze, 0.03), distance), jitter(rng, zenith, 0.05)


def _plan(rng: np.random.Generator) -> _Street:
    half_road = rng.uniform(2.7, 4.6)
    walk, wall = [], []
    for _ in range(2):
        verge = rng.uniform(1.4, 2.8) if rng.random() < 0.45 else 0.0
        start = half_road + verge
        end = start + rng.uniform(2.2, 4.4)
        walk.append((start, end))
        wall.append(end + (rng.uniform(2.5, 6.0) if rng.random() < 0.5 else 0.0))
    begin = rng.uniform(12, 30) if rng.random() < 0.4 else 500.0
    stripes = begin - 4.5 if begin < 500 else (rng.uniform(6, 20) if rng.random() < 0.3 else 500.0)
    bend = rng.normal(0, 0.0018)
    shift = rng.uniform(-0.45, 0.45) * half_road
    return _Street(
        half_road, (walk[0], walk[1]), (wall[0], wall[1]), shift, bend, (begin, begin + rng.uniform(6, 9)), stripes
    )


def _sky(canvas: Canvas, rng: np.random.Generator, zenith: Array) -> None:
    camera, (height, width) = canvas.camera, canvas.labels.shape
    # Nothing in a sky is sharp: half the canvas's resolution is plenty.
    columns, rows = (2 * np.arange(n, dtype=np.float32) + 1 for n in (width // 2, height // 2))
    columns, rows = columns[None, :], rows[:, None]
    altitude = np.clip((camera.horizon - rows) / camera.horizon, 0, 1)
    base = mix(canvas.light.haze, zenith, np.sqrt(altitude) + 0 * columns)
    # Clouds lie in a plane overhead, so they flatten towards the horizon.
    far = 1 / (altitude + 0.12)
    texel = 60 / width
    shift = rng.uniform(0, 256)
    drift = (columns - camera.centre) * texel * far
    clouds: Array = canvas.noise.soft_at(drift + shift, far * 16 + 0 * columns) + 0.4 * canvas.noise.soft_at(
        drift * 3 + 40, far * 48 + 90 + 0 * columns
    )
    clouds = cv2.GaussianBlur(clouds, (0, 0), width / 256)
    cover = np.clip((clouds - rng.uniform(-0.5, 0.9)) * 1.6, 0, 1) * np.clip(altitude * 5, 0, 1)
    bright = mix((1.0, 1.0, 1.0), canvas.light.haze, 0.3 + 0.5 * (1 - canvas.light.strength))
    sky = mix(base, bright, cover * rng.uniform(0.4, 0.9))
    if canvas.light.strength > 0.5:
        sun = camera.centre + canvas.light.sun_side * width
        reach = ((columns - sun) ** 2 + (rows - camera.horizon * 0.4) ** 2) / width**2
        sky += (0.35 * np.exp(-4 * reach))[..., None] * np.asarray((1.0, 0.9, 0.7), np.float32)
    canvas.image[:] = cv2.resize(sky, (width, height), interpolation=cv2.INTER_LINEAR)


def _skyline(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paint the far end of the street: woods or blocks, pale with distance."""
    camera, width = canvas.camera, canvas.labels.shape[1]
    z = rng.uniform(90, 140)
    size = camera.scale(z)
    if rng.random() < 0.5:
        leaf = pick(rng, LEAVES, 0.04)
        top = camera.horizon - rng.uniform(4, 9) * size
        for x in np.arange(-10, width + 20, 6 * size):
            centre = (x + rng.normal(0, 2) * size, top + rng.normal(0, 1.5) * size)
            for y in np.arange(centre[1], camera.horizon + 6 * size, 5 * size):
                foliage(canvas, rng, (centre[0], y), (6 * size, 5 * size), leaf, z)
        return
    x = -20.0
    while x < width + 20:
        block, tall = rng.uniform(8, 20) * size, rng.uniform(6, 20) * size
        corners = np.asarray([(x, camera.horizon + 3), (x, camera.horizon - tall)], np.float32)
        corners = np.concatenate([corners, corners[::-1] + np.asarray((block, 0))]).astype(np.float32)
        canvas.polygon(corners, pick(rng, WALLS), BUILDING, z, grain=0.15)
        x += block


def _ground(canvas: Canvas, rng: np.random.Generator, street: _Street) -> None:
    """Road, pavements and grass: every pixel below the horizon is a point of the ground plane."""
    camera, light, noise = canvas.camera, canvas.light, canvas.noise
    height, width = canvas.labels.shape
    box = (slice(int(camera.horizon) + 1, height), slice(0, width))
    columns, rows = canvas.grid(box)
    z = camera.focal * camera.height_m / np.maximum(rows - camera.horizon, 0.5) + 0 * columns
    x = (columns - camera.centre) * z / camera.focal
    offset = x - street.shift - street.bend * np.minimum(z, 60) ** 2
    near = np.exp(-z / 14)
    coarse, fine = noise.soft_at(x * 14, z * 14), noise.white_at(x * 38, z * 38)

    grass = pick(rng, [(0.30, 0.40, 0.17), (0.40, 0.44, 0.22), (0.50, 0.46, 0.26)], 0.04)
    colour = grass * (1 + 0.28 * coarse + (0.12 + 0.35 * near) * fine)[..., None]
    labels = np.full(z.shape, GRASS, np.uint8)

    slab = rng.uniform(0.6, 1.3)
    paving = pick(rng, [(0.60, 0.58, 0.55), (0.52, 0.44, 0.40), (0.50, 0.50, 0.51), (0.68, 0.63, 0.54)])
    joints = (offset / slab % 1 < 0.05) | ((z / slab + 0.5 * (np.floor(offset / slab) % 2)) % 1 < 0.05)
    tone = noise.white_at(np.floor(offset / slab), np.floor(z / slab))
    paved = paving * (1 + 0.08 * coarse + 0.06 * fine * near + 0.07 * tone - 0.30 * joints * np.exp(-z / 10))[..., None]

    asphalt = pick(rng, [(0.36, 0.36, 0.38), (0.44, 0.43, 0.42), (0.28, 0.29, 0.31), (0.52, 0.51, 0.50)], 0.04)
    tracks = 0.06 * np.cos(offset * 2 * np.pi / (street.half_road / 2))
    tar = asphalt * (1 + 0.10 * coarse + (0.04 + 0.20 * near) * fine + tracks)[..., None]
    patch = noise.soft_at(offset * 3 + 70, z * 1.5) > 0.9
    tar[patch] *= rng.uniform(0.7, 0.9)
    marking = jitter(rng, (0.86, 0.86, 0.83), 0.04) if rng.random() < 0.7 else jitter(rng, (0.86, 0.70, 0.25), 0.04)
    dash = rng.choice([0.4, 0.5, 1.0])
    lines = (np.abs(offset) < 0.09) & (z / 5 % 1 < dash)
    lines |= (np.abs(np.abs(offset) - street.half_road + 0.35) < 0.07) & (rng.random() < 0.5)
    zebra = (z > street.stripes) & (z < street.stripes + 3.2) & (offset / 1.1 % 1 < 0.5)
    worn = noise.soft_at(x * 30, z * 30) < 1.0
    tar = np.where(((lines | zebra) & worn)[..., None], mix(tar, marking, 0.8), tar)

    for side, walk, wall in zip((-1, 1), street.walk, street.wall, strict=True):
        across = offset * side
        pavement = (across >= walk[0]) & (across < walk[1] + (0 if wall - walk[1] > 1 else 0.5))
        colour[pavement], labels[pavement] = paved[pavement], SIDEWALK
        kerb = (across >= street.half_road) & (across < street.half_road + 0.22)
        colour[kerb] = jitter(rng, (0.70, 0.69, 0.66), 0.03) * (1 + 0.06 * coarse[kerb])[:, None]
        labels[kerb] = SIDEWALK
    road = (np.abs(offset) < street.half_road) | ((z >= street.crossing[0]) & (z < street.crossing[1]))
    colour[road], labels[road] = tar[road], ROAD

    if light.strength > 0.4:  # a ragged shadow of what stands on the sunny side
        edge = street.half_road * rng.uniform(-0.3, 1.3)
        ragged = offset * np.sign(light.sun_side) + 1.1 * noise.soft_at(z * 5, z * 5 + 31) + 0.5 * coarse > edge
        colour[ragged] *= 1 - 0.42 * light.strength
    canvas.image[box] = light.fade(colour, z)
    canvas.labels[box] = labels


def _buildings(canvas: Canvas, rng: np.random.Generator, street: _Street, zenith: Array) -> None:
    for side, wall in zip((-1, 1), street.wall, strict=True):
        lots, z = [], rng.uniform(NEAR_M, 4)
        dense = rng.uniform(0.45, 1.0)
        low = rng.random() < 0.4
        while z < 75:
            length = rng.uniform(6, 15)
            clear = z > street.crossing[1] + 1 or z + length < street.crossing[0] - 1
            if clear and rng.random() < dense:
                tall = rng.uniform(4.5, 8) if low else rng.uniform(7, 17)
                lots.append((z, z + length, tall))
            z += length + (rng.uniform(1, 5) if rng.random() < 0.4 else 0.0)
        for start, end, tall in reversed(lots):
            middle = street.middle((start + end) / 2)
            at = middle + side * (wall + rng.uniform(0, 0.6))
            if at * side > 1.5:  # a bend may carry the line past the camera
                building(canvas, rng, at, start, end, tall, zenith)


def _furnish(canvas: Canvas, rng: np.random.Generator, street: _Street) -> None:
    """Trees, cars, people and poles, painted from far to near."""
    todo: list[tuple[float, float, str, float]] = []
    taken: list[tuple[float, float]] = []

    def side_pick() -> tuple[int, int]:
        index = int(rng.integers(2))
        return index, (-1, 1)[index]

    def free(x: float, z: float, gap_x: float, gap_z: float) -> bool:
        return all(abs(x - a) > gap_x or abs(z - b) > gap_z for a, b in taken)

    def near_first(low: float, high: float) -> float:
        return low * (high / low) ** rng.random()

    for index, side in ((0, -1), (1, 1)):
        walk, wall = street.walk[index], street.wall[index]
        parked = rng.random() < 0.45
        z = rng.uniform(4.5, 12)
        while parked and z < 40:
            if rng.random() < 0.6:
                x = side * (street.half_road - 1.05)
                todo.append((z, street.middle(z) + x, "car", 0.0 if rng.random() < 0.6 else np.pi))
                taken.append((x, z))
            z += rng.uniform(5.5, 9)
        if rng.random() < 0.75:
            z, gap = rng.uniform(5, 12), rng.uniform(6, 13)
            spot = wall - 0.8 if wall - walk[1] > 1.4 else walk[0] + 0.35
            if walk[0] - street.half_road > 0.9 and rng.random() < 0.7:
                spot = (street.half_road + walk[0]) / 2
            while z < 60:
                if rng.random() < 0.75 and not street.crossing[0] - 2 < z < street.crossing[1] + 2:
                    todo.append((z, street.middle(z) + side * spot, "tree", 0.0))
                z += gap * rng.uniform(0.7, 1.3)
    for _ in range(int(rng.integers(0, 4))):
        z = near_first(6.5, 40)
        x = rng.choice([-1, 1]) * street.half_road * rng.uniform(0.3, 0.5)
        if free(x, z, 2.0, 6.0):
            todo.append((z, street.middle(z) + x, "car", (0.0 if x > 0 else np.pi) + rng.normal(0, 0.06)))
            taken.append((x, z))
    if street.crossing[0] < 100 and rng.random() < 0.6:
        z = sum(street.crossing) / 2 + rng.choice([-1.6, 1.6])
        todo.append((z, rng.uniform(-9, 9), "car", rng.choice([-1, 1]) * np.pi / 2))
    for _ in range(int(rng.integers(2, 9))):
        z = near_first(4.0, 12)
        index, side = side_pick()
        if rng.random() < 0.3:
            x = rng.uniform(-1, 1) * street.half_road
        else:
            x = side * rng.uniform(street.walk[index][0] + 0.2, street.walk[index][1] - 0.1)
        if free(x, z, 1.4, 2.8):
            todo.append((z, street.middle(z) + x, "person", 0.0))
    for _ in range(int(rng.integers(2, 6))):
        z = near_first(4.5, 10)
        index, side = side_pick()
        todo.append((z, street.middle(z) + side * (street.half_road + rng.uniform(0.35, 0.7)), "pole", 0.0))
    for z, x, kind, heading in sorted(todo, reverse=True):
        if kind == "car":
            vehicle(canvas, rng, x, z, heading, CAR)
        else:
            {"tree": tree, "person": person, "pole": pole}[kind](canvas, rng, x, z)


def _photograph(image: Array, rng: np.random.Generator, light: Light) -> NDArray[np.uint8]:
    """Camera effects: exposure, white balance, contrast, vignette, blur and sensor noise."""
    height, width = image.shape[:2]
    image = np.clip(image, 0, 1.2)
    image = image * np.float32(rng.uniform(0.80, 1.20)) * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(0.85, 1.2))
    image = 0.5 + (image - 0.5) * np.float32(rng.uniform(0.85, 1.15))
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    image *= (1 - rng.uniform(0, 0.18) * (x * x + y * y))[..., None].astype(np.float32)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.75))
    grain = rng.uniform(0.006, 0.028)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(grain) * np.sqrt(np.clip(image, 0.05, 1))
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def scenes(seeds: Sequence[int], workers: int | None = None) -> list[Scene]:
    """The scenes of several seeds, painted by `workers` processes (None: one per core that this process may use)."""
    workers = workers or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads the caller has
    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
        return list(pool.map(scene, seeds, chunksize=8))


def save_coded(labels: NDArray[np.uint8], path: Path) -> None:
    """Write labels (H, W) as an indexed PNG: its pixels are the class ids, its colours PALETTE."""
    from PIL import Image

    coded = Image.fromarray(labels)
    coded.putpalette([channel for colour in PALETTE for channel in colour])
    coded.save(path)


def main() -> None:
    """Write scenes and their labels as PNG files."""
    from PIL import Image

    parser = argparse.ArgumentParser(description="Paint labelled street scenes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--first", type=int, default=FIRST_HELD_OUT, help="first seed")
    args = parser.parse_args()
    images, labels = args.folder / "images", args.folder / "labels"
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first, args.first + args.count)
    painted = map(scene, seeds) if len(seeds) <= _FEW else scenes(seeds)
    for seed, made in zip(seeds, painted, strict=True):
        Image.fromarray(made.image).save(images / f"{seed}.png")
        save_coded(made.labels, labels / f"{seed}.png")
    print(f"painted {args.count} scenes into {images}, their labels into {labels}")


if __name__ == "__main__":
    main()
