"""A fruit's surface: the shape of its body, and the textures of skins, wall and table.

Around a fruit the unit is its radius, x to the right, y up and z towards the camera.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import numpy as np

Array = np.ndarray[Any, Any]
N = TypeVar("N", float, Array)

_TEXTURE_SIZE = 512  # a power of two, so that coordinates wrap with a bit mask

# Small mathematics


@overload
def mix(a: N, b: N, t: float) -> N: ...
@overload
def mix(a: float | Array, b: float | Array, t: Array) -> Array: ...
def mix(a: float | Array, b: float | Array, t: float | Array) -> float | Array:
    return a + (b - a) * t


def dot(a: Array, b: Array) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(v: Array) -> Array:
    return v / np.sqrt(dot(v, v))


def fivefold(cosine: Array) -> Array:
    """cos(5 a) from cos(a), which spares an arc tangent and a cosine per point."""
    square = cosine * cosine
    return cosine * (5.0 + square * (16.0 * square - 20.0))


# Textures: one tile of six channels made once per process, with ever coarser copies in which fine detail fades

APPLE_SKIN, ORANGE_SKIN, CLOUDS_AND_GRAIN, GRAIN = (
    slice(0, 3),
    slice(2, 6),
    slice(1, 3),
    slice(1, 2),
)


@functools.cache
def textures() -> tuple[Array, ...]:
    """Speckles, grain, clouds, pores and slopes of pores to the right and up, at sizes 512, 256, ... 1."""
    chain = [np.stack([_speckles(), _noise(7.0, 120.0, 1.15), _noise(1.0, 24.0, 1.7), *_pores()])]
    while chain[-1].shape[1] > 1:
        chain.append(halve(chain[-1]))
    return tuple(np.ascontiguousarray(tile.reshape(len(tile), -1), np.float32) for tile in chain)


def halve(image: Array) -> Array:
    quads = image[:, ::2, ::2] + image[:, 1::2, ::2] + image[:, ::2, 1::2] + image[:, 1::2, 1::2]
    return quads * np.float32(0.25)


def _noise(low: float, high: float, fall: float) -> Array:
    """Noise of unit variance with `low` to `high` waves per tile, weaker by the power `fall` of their number."""
    white = np.fft.rfft2(np.random.default_rng(11).standard_normal((_TEXTURE_SIZE, _TEXTURE_SIZE)))
    waves = np.hypot(np.fft.fftfreq(_TEXTURE_SIZE)[:, None], np.fft.rfftfreq(_TEXTURE_SIZE)) * _TEXTURE_SIZE
    gain = np.where((waves >= low) & (waves <= high), np.maximum(waves, 1.0) ** -fall, 0.0)
    layer = np.fft.irfft2(white * gain)
    return layer / layer.std()


def _cells(count: int, seed: int) -> tuple[Array, Array]:
    """Distance, in cells, to the nearest of count * count scattered points, and that point's own number."""
    rng = np.random.default_rng(seed)
    points, numbers = rng.uniform(0.12, 0.88, (2, count, count)), rng.random((count, count))
    place = (np.arange(_TEXTURE_SIZE) + 0.5) * (count / _TEXTURE_SIZE)
    cell = place.astype(int)
    nearest = np.full((_TEXTURE_SIZE, _TEXTURE_SIZE), np.inf)
    number = np.zeros_like(nearest)
    for down, right in itertools.product((-1, 0, 1), repeat=2):
        at = np.ix_((cell + down) % count, (cell + right) % count)
        dy, dx = (cell + down - place)[:, None] + points[0][at], (cell + right - place) + points[1][at]
        square = dy * dy + dx * dx
        number = np.where(square < nearest, numbers[at], number)
        nearest = np.minimum(square, nearest)
    return np.sqrt(nearest), number


def _pores() -> tuple[Array, ...]:
    distance, number = _cells(46, 5)
    pit = np.exp(-((distance / (0.24 + 0.14 * number)) ** 2))
    height = -0.8 * pit - 0.7 * np.exp(-((_cells(13, 6)[0] / 0.42) ** 2))
    return pit, np.roll(height, -1, 1) - np.roll(height, 1, 1), np.roll(height, 1, 0) - np.roll(height, -1, 0)


def _speckles() -> Array:
    """Dots of many sizes, as the lenticels of an apple."""
    distance, number = _cells(30, 8)
    return np.clip((0.06 + 0.16 * number**2 - distance) * 9.0 + 0.5, 0.0, 1.0) * (number > 0.25)


def sample_texture(channels: slice, s: Array, t: Array, spacing: float) -> Array:
    """The textures' `channels` (channels, points) at `s`, `t` in tiles, for samples `spacing` tiles apart."""
    chain = textures()
    level = round(math.log2(max(spacing * _TEXTURE_SIZE, 1.0)))
    tile = chain[min(level, len(chain) - 1)][channels]
    size = math.isqrt(tile.shape[1])
    x, y = s * size - 0.5, t * size - 0.5
    left, top = np.floor(x), np.floor(y)
    column, row = left.astype(np.intp), top.astype(np.intp)
    columns = column & (size - 1), (column + 1) & (size - 1)
    rows = (row & (size - 1)) * size, ((row + 1) & (size - 1)) * size
    a, b, c, d = (tile.take(down + across, axis=1) for down in rows for across in columns)
    right = x - left
    return mix(mix(a, b, right), mix(c, d, right), y - top)


# The fruit's shape: a surface around an axis, found along every sample's line of sight


class Body:
    """A fruit's surface, with every silhouette of one area and centroid.

    Its own unit is free: `scale` of it make one fruit radius, and the silhouette's centroid lies at `centre`.
    Points are given to its methods as their squared distance from the origin and their places along the axis
    and along the side that the ribs start from.
    """

    def __init__(self, style: str, look: Mapping[str, float]):
        if style == "apple":
            tilt, roll = mix(0.26, 0.55, look["tilt"]), mix(-0.26, 0.26, look["roll"])
            self.height, self.taper = mix(0.98, 1.14, look["height"]), mix(0.08, 0.22, look["taper"])
            self.dip, self.dip_sharpness, self.hollow = mix(0.27, 0.42, look["dip"]), 9.0, 0.16
            self.ribs, self.lean = mix(0.012, 0.047, look["ribs"]), 0.05 * look["lean"]
        else:
            tilt, roll = mix(0.5, 1.1, look["tilt"]), mix(-0.7, 0.7, look["roll"])
            self.height, self.taper = mix(0.91, 0.99, look["height"]), 0.0
            self.dip, self.dip_sharpness, self.hollow = 0.06, 22.0, 0.03
            self.ribs, self.lean = 0.0, 0.025 * look["lean"]
        self._turn(tilt, roll, math.tau * look["turn"])
        self._measure()

    def _turn(self, tilt: float, roll: float, turn: float) -> None:
        """Nod the axis towards the camera by `tilt`, lean it by `roll`, and spin the ribs about it."""
        lean, upright = math.sin(roll), math.cos(roll)
        self.side = np.array([upright, -lean, 0.0], np.float32)
        self.axis = np.array([lean * math.cos(tilt), upright * math.cos(tilt), math.sin(tilt)], np.float32)
        self.front = np.cross(self.side, self.axis)
        self.rib_side = self.side * math.cos(turn) + self.front * math.sin(turn)

    def _measure(self) -> None:
        places = np.linspace(-1.26, 1.26, 37, dtype=np.float32)
        x, y = (grid.ravel() for grid in np.meshgrid(places, places))
        spacing = float(places[1] - places[0])
        _, cover = self.trace(x, y, spacing)
        total = float(cover.sum())
        self.centre = float((cover * x).sum()) / total, float((cover * y).sum()) / total
        self.scale = math.sqrt(total / math.pi) * spacing

    def pole(self) -> list[float]:
        """The bottom of the dip, in fruit radii around the silhouette's centroid."""
        tip = self.axis * (self.height * (1.0 - self.dip))
        return [(float(at) - origin) / self.scale for at, origin in zip(tip, (*self.centre, 0.0), strict=True)]

    def parts(self, square: Array, along: Array, aside: Array) -> tuple[Array, ...]:
        """Distance of points from the centre, of the surface below them, cosine to the axis, cosine about it."""
        lateral = np.sqrt(np.maximum(square - along * along, 1e-6))
        lobe = aside / lateral
        along = along * (1.0 / self.height)
        width = lateral * (1.0 - self.taper * along) if self.taper else lateral
        distance = np.sqrt(width * width + along * along)
        cosine = along / distance
        surface = 1.0 - self.dip * np.exp((cosine - 1.0) * self.dip_sharpness)
        surface -= self.hollow * np.exp((cosine + 1.0) * -7.0)
        bulge = self.lean * lobe * cosine
        if self.ribs:
            bulge += fivefold(lobe) * (0.9 * self.ribs - (0.7 * self.ribs) * cosine)
        return distance, surface + bulge * width, cosine, lobe

    def gap(self, square: Array, along: Array, aside: Array) -> Array:
        """A length that is never above the true distance to the surface, and negative inside."""
        distance, surface, _, _ = self.parts(square, along, aside)
        return (distance - surface) * 0.85

    def trace(self, x: Array, y: Array, spacing: float) -> tuple[Array, Array]:
        """Depth where lines of sight through `x`, `y` meet the surface, and how much of each sample it covers.

        Depth grows towards the camera; `spacing` lies between two samples, all in the body's own unit.
        """
        square, (along, aside) = x * x + y * y, (v[0] * x + v[1] * y for v in (self.axis, self.rib_side))
        z, nearest = self._march(np.sqrt(np.maximum(1.6 - square, 0.0)), square, along, aside, steps=5)
        # Few lines skim a shoulder on their way into the dip; only they need many steps.
        left = np.flatnonzero((nearest > 0.03 * spacing) & (z > -1.2))
        start = (values.take(left) for values in (z, square, along, aside))
        z[left], further = self._march(*start, steps=10)
        nearest[left] = np.minimum(nearest.take(left), further)
        return z, np.clip(1.0 - nearest * (2.0 / spacing), 0.0, 1.0)

    def _march(self, z: Array, square: Array, along: Array, aside: Array, *, steps: int) -> tuple[Array, Array]:
        axis_z, side_z = self.axis[2], self.rib_side[2]
        gap = nearest = step = self.gap(square + z * z, along + axis_z * z, aside + side_z * z)
        for _ in range(steps):
            z = np.maximum(z - step, -1.5)
            after = self.gap(square + z * z, along + axis_z * z, aside + side_z * z)
            nearest = np.minimum(nearest, after)
            # The gap shrinks more slowly than the step at grazing incidence: the secant tells by how much,
            # but may not be trusted over the hollow of the dip, where it would leap through the far rim.
            step = np.minimum(after * np.clip(step / (gap - after + 1e-9), 1.0, 4.0), after + 0.05)
            gap = after
        return z, nearest

    def surface(self, point: Array) -> tuple[Array, Array, Array]:
        """Normals (3, points) at `point` (3, points), cosines to the axis, and cosines about it."""
        at = dot(point, point), dot(self.axis, point), dot(self.rib_side, point)
        distance, surface, cosine, lobe = self.parts(*at)
        # One small step along each of the three axes, all at once.
        offset, axis, side = 2e-3, self.axis[:, None], self.rib_side[:, None]
        moved = at[0] + point * (2.0 * offset), at[1] + offset * axis, at[2] + offset * side
        return unit(self.gap(*moved) - (distance - surface) * 0.85), cosine, lobe
