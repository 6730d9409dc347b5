"""Unpaired apples and oranges, drawn at any resolution, with the factors that made each picture kept.

A picture has a style (apple or orange), content (where the fruit lies, how large it is, how it is lit, what
is behind it) and a look (skin, stem, leaf: what only its style can say). Content has one distribution for
both styles, so a translation is right when it changes the style and leaves the content as it was.

Lengths: pictures are 1 wide and 1 high, x to the right and y down. Around a fruit the unit is its radius,
x to the right, y up and z towards the camera. Colours are linear light, channels first, until the very end.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

STYLES = ("apple", "orange")
_BACKGROUND_FACTORS = ("background_warmth", "background_brightness", "horizon")
CONTENT_FACTORS = ("x", "y", "size", "light_x", "light_strength", *_BACKGROUND_FACTORS)
_SHARED_LOOK = (
    "height",
    "tilt",
    "roll",
    "turn",
    "lean",
    "gloss",
    "leaf",
    "leaf_angle",
    "texture_x",
    "texture_y",
)
_APPLE_LOOK = (
    "blush",
    "blush_side",
    "ground",
    "redness",
    "streaks",
    "speckles",
    "russet",
    "taper",
    "dip",
    "ribs",
)
# The factors of each style's own; a fruit has a leaf when its "leaf" is above _LEAFLESS.
LOOK_FACTORS = {
    "apple": (*_SHARED_LOOK, *_APPLE_LOOK, "stem_length", "stem_bend"),
    "orange": (*_SHARED_LOOK, "hue", "mottling", "pores", "greening", "calyx"),
}
MIN_RESOLUTION, MAX_RESOLUTION = 32, 1024

_SAMPLES = 2  # per pixel and axis, on the fruit
_TEXTURE_SIZE = 512  # a power of two, so that coordinates wrap with a bit mask
_TEXTURE_TILE = 2.0  # fruit radii that one texture tile covers
_LEAFLESS = 0.55
_CHUNK = 1 << 15  # points shaded at a time, so that their arrays stay in cache


@dataclass(frozen=True)
class FruitFactors:
    """Everything that decides a picture; all factors lie in [0, 1].

    `content` holds exactly `CONTENT_FACTORS`, `look` exactly `LOOK_FACTORS[style]`. For the same scene with
    the other fruit, build a new one from this `content` and another fruit's `style` and `look`.
    Raises ValueError for an unknown style, a missing or unknown factor, or a value outside [0, 1].
    """

    style: str
    content: dict[str, float]
    look: dict[str, float]

    def __post_init__(self) -> None:
        _check_style(self.style)
        _check_unit_factors("content", self.content, CONTENT_FACTORS)
        _check_unit_factors(f"{self.style} look", self.look, LOOK_FACTORS[self.style])

    def as_json(self) -> dict[str, Any]:
        """A JSON-serialisable copy, from which `from_json` builds an equal object."""
        return {"style": self.style, "content": dict(self.content), "look": dict(self.look)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FruitFactors:
        """The factors that `as_json` wrote; ValueError if keys are missing or values are out of range."""
        missing = [key for key in ("style", "content", "look") if key not in data]
        if missing:
            raise ValueError(f"fruit factors lack {', '.join(missing)}")
        return cls(data["style"], dict(data["content"]), dict(data["look"]))


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: expected one of {', '.join(STYLES)}")


def _check_unit_factors(what: str, factors: Mapping[str, float], names: tuple[str, ...]) -> None:
    if set(factors) != set(names):
        raise ValueError(f"{what} factors must be exactly {', '.join(names)}; got {', '.join(factors)}")
    for name, value in factors.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{what} factor {name} must lie in [0, 1]; got {value}")


def sample_factors(style: str, seed: int, index: int) -> FruitFactors:
    """Independent uniform factors for picture `index` (>= 0) of the stream `(style, seed)` (seed >= 0).

    A pure function: equal arguments give equal factors, different ones give independent streams.
    Raises ValueError for an unknown style or a negative seed or index.
    """
    _check_style(style)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative; got seed {seed} and index {index}")
    draw = np.random.default_rng((STYLES.index(style), seed, index)).random
    content = {name: float(draw()) for name in CONTENT_FACTORS}
    return FruitFactors(style, content, {name: float(draw()) for name in LOOK_FACTORS[style]})


def fruit(style: str, seed: int, index: int, resolution: int) -> tuple[np.ndarray, FruitFactors]:
    """Picture `index` of the stream `(style, seed)`, as `render` gives it, and its factors."""
    factors = sample_factors(style, seed, index)
    return render(factors, resolution), factors


def placement(content: Mapping[str, float]) -> tuple[float, float, float]:
    """Centre x and y (down) of the fruit's silhouette and the radius of a disc of equal area.

    In fractions of the picture's width; each depends on one factor alone and linearly, in either style.
    """
    x = _mix(0.38, 0.62, content["x"])
    y = _mix(0.46, 0.62, content["y"])
    return x, y, _mix(0.20, 0.34, content["size"])


def render(factors: FruitFactors, resolution: int) -> np.ndarray:
    """Draw the factors: uint8 sRGB of shape (resolution, resolution, 3), the same bytes every time.

    Any whole resolution from 32 to 1024 shows the same picture, only sharper; otherwise ValueError.
    """
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION or int(resolution) != resolution:
        raise ValueError(f"resolution must be a whole number from 32 to 1024; got {resolution}")
    light = _Light.of(factors.content)
    picture = _paint_scene(factors.content, light, int(resolution))
    _paint_fruit(picture, factors, light)
    return _encode(picture)


def _encode(picture: np.ndarray) -> np.ndarray:
    # An exponential shoulder keeps highlights from clipping to flat white patches.
    exposed = 1.0 - np.exp(-1.25 * picture)
    srgb = np.power(np.clip(exposed, 0.0, 1.0), np.float32(1 / 2.2))
    return np.ascontiguousarray((srgb * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0))


# Small mathematics


def _mix(a, b, t):
    return a + (b - a) * t


def _smooth(low: float, high: float, value):
    t = np.clip((value - low) * (1.0 / (high - low)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt(_dot(v, v))


def _linear(red: int, green: int, blue: int) -> np.ndarray:
    """A column of linear light from an sRGB colour, so that it multiplies rows of pixels."""
    return (np.array([[red], [green], [blue]], np.float32) / 255.0) ** 2.2


def _fivefold(cosine: np.ndarray) -> np.ndarray:
    """cos(5 a) from cos(a), which spares an arc tangent and a cosine per point."""
    square = cosine * cosine
    return cosine * (5.0 + square * (16.0 * square - 20.0))


# Textures: one tile of six channels made once per process, with ever coarser copies in which fine detail fades

_SKIN_OF_APPLE, _SKIN_OF_ORANGE, _CLOUDS_AND_GRAIN, _GRAIN = (
    slice(0, 3),
    slice(2, 6),
    slice(1, 3),
    slice(1, 2),
)


@functools.cache
def _textures() -> tuple[np.ndarray, ...]:
    """Speckles, grain, clouds, pores and slopes of pores to the right and up, at sizes 512, 256, ... 1."""
    chain = [np.stack([_speckles(), _noise(7.0, 120.0, 1.15), _noise(1.0, 24.0, 1.7), *_pores()])]
    while chain[-1].shape[1] > 1:
        chain.append(_halve(chain[-1]))
    return tuple(np.ascontiguousarray(tile.reshape(len(tile), -1), np.float32) for tile in chain)


def _halve(image: np.ndarray) -> np.ndarray:
    quads = image[:, ::2, ::2] + image[:, 1::2, ::2] + image[:, ::2, 1::2] + image[:, 1::2, 1::2]
    return quads * np.float32(0.25)


def _noise(low: float, high: float, fall: float) -> np.ndarray:
    """Noise of unit variance with `low` to `high` waves per tile, weaker by the power `fall` of their number."""
    white = np.fft.rfft2(np.random.default_rng(11).standard_normal((_TEXTURE_SIZE, _TEXTURE_SIZE)))
    waves = np.hypot(np.fft.fftfreq(_TEXTURE_SIZE)[:, None], np.fft.rfftfreq(_TEXTURE_SIZE)) * _TEXTURE_SIZE
    gain = np.where((waves >= low) & (waves <= high), np.maximum(waves, 1.0) ** -fall, 0.0)
    layer = np.fft.irfft2(white * gain)
    return layer / layer.std()


def _cells(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
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


def _pores() -> tuple[np.ndarray, ...]:
    distance, number = _cells(46, 5)
    pit = np.exp(-((distance / (0.24 + 0.14 * number)) ** 2))
    height = -0.8 * pit - 0.7 * np.exp(-((_cells(13, 6)[0] / 0.42) ** 2))
    return pit, np.roll(height, -1, 1) - np.roll(height, 1, 1), np.roll(height, 1, 0) - np.roll(height, -1, 0)


def _speckles() -> np.ndarray:
    """Dots of many sizes, as the lenticels of an apple."""
    distance, number = _cells(30, 8)
    return np.clip((0.06 + 0.16 * number**2 - distance) * 9.0 + 0.5, 0.0, 1.0) * (number > 0.25)


def _sample(channels: slice, s: np.ndarray, t: np.ndarray, spacing: float) -> np.ndarray:
    """The textures' `channels` (channels, points) at `s`, `t` in tiles, for samples `spacing` tiles apart."""
    chain = _textures()
    level = round(math.log2(max(spacing * _TEXTURE_SIZE, 1.0)))
    tile = chain[min(level, len(chain) - 1)][channels]
    size = math.isqrt(tile.shape[1])
    x, y = s * size - 0.5, t * size - 0.5
    left, top = np.floor(x), np.floor(y)
    column, row = left.astype(np.intp), top.astype(np.intp)
    columns = column & (size - 1), (column + 1) & (size - 1)
    rows = (row & (size - 1)) * size, ((row + 1) & (size - 1)) * size
    corners = [tile.take(down + across, axis=1) for down in rows for across in columns]
    right = x - left
    return _mix(_mix(*corners[:2], right), _mix(*corners[2:], right), y - top)


# The scene: light, wall and table, which depend on content alone


@dataclass(frozen=True)
class _Light:
    """A soft lamp before the scene, halfway between it and the camera, and the light the table throws back."""

    direction: np.ndarray
    half: np.ndarray
    key: float
    tone: np.ndarray

    @classmethod
    def of(cls, content: Mapping[str, float]) -> _Light:
        direction = _unit(np.array([_mix(-1.15, 1.15, content["light_x"]), 0.85, 0.75], np.float32))
        half = _unit(direction + np.array([0.0, 0.0, 1.0], np.float32))
        # Equal steps of the factor are equal ratios of light, as the eye counts them.
        brightness = 0.055 * (0.52 / 0.055) ** content["background_brightness"]
        cool, warm = np.array([[0.74], [0.98], [1.32]]), np.array([[1.28], [0.97], [0.62]])
        tone = (brightness * _mix(cool, warm, content["background_warmth"])).astype(np.float32)
        return cls(direction, half, _mix(0.5, 1.75, content["light_strength"]), tone)


def _paint_scene(content: Mapping[str, float], light: _Light, resolution: int) -> np.ndarray:
    """Wall, table and the fruit's shadow, linear (3, resolution, resolution)."""
    place = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    u, v = place[None, :], place[:, None]
    below = v - _mix(0.24, 0.46, content["horizon"])
    on_table = np.clip(below / max(1.0 / resolution, 0.006) + 0.5, 0.0, 1.0)
    # Dividing by the distance makes the table's grain run towards the horizon.
    depth = 1.0 / (np.maximum(below, 0.0) + 0.22)
    s = np.where(below > 0.0, (u - 0.5) * depth * 0.1, u * 0.6) + content["background_brightness"]
    t = np.broadcast_to(np.where(below > 0.0, depth * 0.55, v * 0.6) + content["background_warmth"], s.shape)
    clouds, grain = _sample(_CLOUDS_AND_GRAIN, s.ravel(), t.ravel(), 1.2 / resolution).reshape(2, *s.shape)
    glow = np.exp((u - (0.5 + 0.55 * light.direction[0])) ** 2 * -2.2) * np.exp((v - 0.1) ** 2 * -2.6)
    wall = 0.38 + 0.34 * glow + 0.018 * clouds + 0.010 * grain
    table = (0.86 + 0.34 * below + 0.03 * clouds + 0.035 * grain) * _shadow(content, light, u, v)
    # The table's far edge catches a line of light, as rounded edges do.
    edge = max(0.008, 0.8 / resolution)
    shade = _mix(wall, table, on_table) * (1.0 + 0.002 / edge * np.exp(-((below / edge - 0.8) ** 2)))
    tint = _mix(1.0, np.array([[[1.06]], [[1.0]], [[0.93]]], np.float32), on_table)
    return light.tone[:, :, None] * tint * ((0.55 + 0.5 * light.key) * shade)


def _shadow(content: Mapping[str, float], light: _Light, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The light that reaches the table: dark where the fruit stands, dimmed on the side away from the lamp."""
    x, y, radius = placement(content)
    across, down = (u - x) / radius, (v - y) / radius
    contact = np.exp((across / 0.74) ** 2 * -1.0) * np.exp(((down - 0.9) / 0.15) ** 2 * -1.0)
    away = ((across + 1.05 * light.direction[0]) / 1.12) ** 2 + ((down - 0.8) / 0.34) ** 2
    return (1.0 - 0.8 * contact) * (1.0 - (0.35 + 0.14 * light.key) * np.exp(-away))


# The fruit's shape: a surface around an axis, found along every sample's line of sight


class _Body:
    """A fruit's surface, with every silhouette of one area and centroid.

    Its own unit is free: `scale` of it make one fruit radius, and the silhouette's centroid lies at `centre`.
    Points are given to its methods as their squared distance from the origin and their places along the axis
    and along the side that the ribs start from.
    """

    def __init__(self, factors: FruitFactors):
        look = factors.look
        if factors.style == "apple":
            tilt, roll = _mix(0.26, 0.55, look["tilt"]), _mix(-0.26, 0.26, look["roll"])
            self.height, self.taper = _mix(0.98, 1.14, look["height"]), _mix(0.08, 0.22, look["taper"])
            self.dip, self.dip_sharpness, self.hollow = _mix(0.27, 0.42, look["dip"]), 9.0, 0.16
            self.ribs, self.lean = _mix(0.012, 0.047, look["ribs"]), 0.05 * look["lean"]
        else:
            tilt, roll = _mix(0.5, 1.1, look["tilt"]), _mix(-0.7, 0.7, look["roll"])
            self.height, self.taper = _mix(0.91, 0.99, look["height"]), 0.0
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

    def parts(self, square, along, aside) -> tuple[np.ndarray, ...]:
        """Distance of points from the centre, of the surface below them, cosine to the axis, cosine about it."""
        lateral = np.sqrt(np.maximum(square - along * along, 1e-6))
        lobe = aside / lateral
        along = along * (1.0 / self.height)
        width = lateral * (1.0 - self.taper * along)
        distance = np.sqrt(width * width + along * along)
        cosine = along / distance
        surface = 1.0 - self.dip * np.exp((cosine - 1.0) * self.dip_sharpness)
        surface -= self.hollow * np.exp((cosine + 1.0) * -7.0)
        bulge = self.lean * lobe * cosine
        if self.ribs:
            bulge += _fivefold(lobe) * (0.9 * self.ribs - (0.7 * self.ribs) * cosine)
        return distance, surface + bulge * width, cosine, lobe

    def gap(self, square, along, aside) -> np.ndarray:
        """A length that is never above the true distance to the surface, and negative inside."""
        distance, surface, _, _ = self.parts(square, along, aside)
        return (distance - surface) * 0.85

    def trace(self, x: np.ndarray, y: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
        """Depth where lines of sight through `x`, `y` meet the surface, and how much of each sample it covers.

        Depth grows towards the camera; `spacing` lies between two samples, all in the body's own unit.
        """
        square, (along, aside) = x * x + y * y, (v[0] * x + v[1] * y for v in (self.axis, self.rib_side))
        z, nearest = self._march(np.sqrt(np.maximum(1.6 - square, 0.0)), square, along, aside, 5)
        # Few lines skim a shoulder on their way into the dip; only they need many steps.
        left = np.flatnonzero((nearest > 0.03 * spacing) & (z > -1.2))
        start = (values.take(left) for values in (z, square, along, aside))
        z[left], further = self._march(*start, 10)
        nearest[left] = np.minimum(nearest.take(left), further)
        return z, np.clip(1.0 - nearest * (2.0 / spacing), 0.0, 1.0)

    def _march(self, z, square, along, aside, steps: int) -> tuple[np.ndarray, np.ndarray]:
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

    def surface(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Normals (3, points) at `point` (3, points), cosines to the axis, and cosines about it."""
        at = _dot(point, point), _dot(self.axis, point), _dot(self.rib_side, point)
        distance, surface, cosine, lobe = self.parts(*at)
        here, slopes, offset = (distance - surface) * 0.85, [], 2e-3
        for place, axis, side in zip(point, self.axis, self.rib_side, strict=True):
            moved = at[0] + place * (2.0 * offset), at[1] + offset * axis, at[2] + offset * side
            slopes.append(self.gap(*moved) - here)
        return _unit(np.stack(slopes)), cosine, lobe


# Painting: the body, then its stem, then its leaf


@dataclass(frozen=True)
class _Window:
    """A rectangle of whole pixels around the fruit, and its samples in fruit radii."""

    rows: slice
    columns: slice
    x: np.ndarray
    y: np.ndarray
    spacing: float

    @classmethod
    def around(cls, content: Mapping[str, float], resolution: int, box: tuple[float, ...]) -> _Window:
        """The part of `box` (left, right, bottom, top in fruit radii) that lies in the picture."""
        x, y, radius = placement(content)
        columns = _pixels(x + box[0] * radius, x + box[1] * radius, resolution)
        rows = _pixels(y - box[3] * radius, y - box[2] * radius, resolution)
        across, down = (_sample_places(span, resolution) for span in (columns, rows))
        spacing = 1.0 / (_SAMPLES * resolution * radius)
        return cls(rows, columns, (across[None] - x) / radius, (y - down[:, None]) / radius, spacing)

    def blend(self, picture: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> None:
        """Lay `colour` (3, ...samples), already multiplied by `cover`, over the picture."""
        target = picture[:, self.rows, self.columns]
        target *= 1.0 - _halve(cover[None])
        target += _halve(colour)


def _pixels(low: float, high: float, resolution: int) -> slice:
    return slice(max(math.floor(low * resolution), 0), min(math.ceil(high * resolution), resolution))


def _sample_places(span: slice, resolution: int) -> np.ndarray:
    count = _SAMPLES * (span.stop - span.start)
    return ((np.arange(count, dtype=np.float32) + 0.5) / _SAMPLES + span.start) / resolution


def _paint_fruit(picture: np.ndarray, factors: FruitFactors, light: _Light) -> None:
    body = _Body(factors)
    window = _Window.around(factors.content, picture.shape[1], (-1.22, 1.22, -1.22, 1.5))
    canvas = np.zeros((5, window.y.size, window.x.size), np.float32)
    canvas[4] = -9.0
    samples = np.flatnonzero(window.x**2 + window.y**2 < 1.22**2)
    for start in range(0, len(samples), _CHUNK):
        _paint_body(canvas.reshape(5, -1), samples[start : start + _CHUNK], window, body, factors, light)
    if factors.style == "apple":
        _paint_stem(canvas, window, body, factors.look, light)
    window.blend(picture, canvas[:3], canvas[3])
    if factors.look["leaf"] > _LEAFLESS:
        _paint_leaf(picture, body, factors, light)


def _paint_body(canvas, samples, window: _Window, body: _Body, factors: FruitFactors, light: _Light) -> None:
    """Fill rows of `canvas` at `samples`: colour times cover, cover, and depth in fruit radii."""
    rows, columns = np.divmod(samples, window.x.size)
    x = window.x[0].take(columns) * body.scale + body.centre[0]
    y = window.y[:, 0].take(rows) * body.scale + body.centre[1]
    z, cover = body.trace(x, y, window.spacing * body.scale)
    seen = np.flatnonzero(cover)
    point, cover = np.stack([x, y, z]).take(seen, axis=1), cover[seen]
    paint = _apple_skin if factors.style == "apple" else _orange_skin
    colour = paint(point, body, factors.look, window.spacing, light)
    canvas[:, samples[seen]] = np.concatenate([colour * cover, cover[None], point[2:] / body.scale])


def _lit(point, smooth, normal, colour, occlusion, light: _Light) -> np.ndarray:
    """Linear light (3, points) that skin scatters from lamp, sky and table; `smooth` is the unbumped normal."""
    lambert = np.clip((_dot(light.direction, normal) + 0.12) / 1.12, 0.0, 1.0)
    # Where the whole body turns away from the lamp, its bumps must not catch it.
    lambert *= _smooth(-0.25, 0.15, _dot(light.direction, smooth))
    open_sky = occlusion * (1.0 - 0.55 * _smooth(0.35, 1.05, -point[1]))
    table = light.tone * (0.2 + 0.17 * light.key) * (np.clip(0.25 - 0.75 * smooth[1], 0.0, 1.0) * open_sky)
    lamp = 0.95 * light.key * lambert * (0.35 + 0.65 * open_sky)
    return colour * (table + ((0.2 + 0.14 * normal[1]) * open_sky + lamp))


def _highlight(normal: np.ndarray, strength: float, tightness: float, light: _Light) -> np.ndarray:
    toward = _dot(light.half, normal) - 1.0
    lamp = np.exp(toward * tightness) + 0.25 * np.exp(toward * (tightness * 0.12))
    rim = (1.0 - np.clip(normal[2], 0.0, 1.0)) ** 4 * (0.5 + 0.5 * normal[1])
    return strength * light.key * lamp + 0.10 * rim


def _skin_places(point: np.ndarray, look: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Texture coordinates that spread evenly over the visible half: an equal-area map seen from the camera."""
    x, y, z = _unit(point)
    spread = np.sqrt(2.0 / (1.0 + np.maximum(z, -0.5))) * (1.0 / _TEXTURE_TILE)
    return x * spread + look["texture_x"], look["texture_y"] - y * spread


def _apple_skin(point, body: _Body, look: Mapping[str, float], spacing: float, light: _Light) -> np.ndarray:
    normal, cosine, _ = body.surface(point)
    colour = _apple_colour(point, cosine, body, look, spacing / _TEXTURE_TILE)
    occlusion = 1.0 - 0.72 * np.exp((cosine - 1.0) * 14.0)
    shine = _highlight(normal, _mix(0.5, 0.95, look["gloss"]), 260.0, light) * occlusion
    return _lit(point, normal, normal, colour, occlusion, light) + shine


def _apple_colour(point, cosine, body: _Body, look: Mapping[str, float], spacing: float) -> np.ndarray:
    """Green to yellow ground under a streaked blush towards its sunny side, pale dots, russet in the dip."""
    dots, _, clouds = _sample(_SKIN_OF_APPLE, *_skin_places(point, look), spacing)
    around = np.arctan2(_dot(body.side, point), _dot(body.front, point)) * (2.0 / math.tau)
    (streaks,) = _sample(_GRAIN, around + look["texture_x"], cosine * 0.05 + look["texture_y"], spacing)
    # A third of the apples stay green or yellow, a third are half blushed, a third are red.
    blush = float(np.interp(look["blush"], [0, 0.3, 0.33, 0.66, 0.7, 1], [-0.9, -0.45, -0.2, 0.25, 0.6, 1.3]))
    sun = math.tau * look["blush_side"]
    ripe = blush + 0.41 * (math.cos(sun) * point[0] + math.sin(sun) * point[1]) + 0.14 * (cosine + clouds)
    ripe = _smooth(-0.55, 0.65, ripe + (0.08 + 0.2 * look["streaks"]) * streaks)
    ground = _mix(_linear(104, 158, 38), _linear(226, 196, 72), look["ground"])
    colour = _mix(ground, _mix(_linear(198, 44, 34), _linear(126, 10, 24), look["redness"]), ripe)
    streaked = ripe * np.clip(streaks, -1.0, 1.5) * (0.05 + 0.13 * look["streaks"])
    colour = colour * ((1.0 + 0.05 * clouds) * (1.0 - streaked))
    colour = _mix(colour, _linear(236, 210, 140), (0.08 + 0.36 * look["speckles"]) * dots)
    russet = _mix(_linear(120, 140, 40), _linear(140, 100, 45), look["russet"])
    near_stem = np.clip(np.exp((cosine - 1.0) * 16.0) * (1.0 + 0.3 * streaks), 0.0, 1.0)
    return _mix(colour, russet, 0.75 * near_stem)


def _orange_skin(point, body: _Body, look: Mapping[str, float], spacing: float, light: _Light) -> np.ndarray:
    smooth, cosine, lobe = body.surface(point)
    clouds, pit, slope_x, slope_y = _sample(_SKIN_OF_ORANGE, *_skin_places(point, look), spacing / _TEXTURE_TILE)
    colour = _mix(_linear(255, 172, 20), _linear(238, 96, 6), look["hue"])
    colour = colour * (1.0 + (0.03 + 0.06 * look["mottling"]) * clouds - 0.1 * pit)
    from_pole = np.sqrt(np.maximum(2.0 - 2.0 * cosine, 0.0))
    green = 0.55 * look["greening"] * np.exp((from_pole / 0.42) ** 2 * -1.0)
    colour = _mix(colour, _linear(150, 150, 30), green)
    size, blur = _mix(0.11, 0.17, look["calyx"]), max(spacing, 0.012)
    star = np.clip((size * (1.0 + 0.42 * _fivefold(lobe)) - from_pole) / blur + 0.5, 0.0, 1.0)
    colour = _mix(colour, _mix(_linear(62, 88, 30), _linear(92, 76, 38), look["calyx"]), star)
    colour = _mix(colour, _linear(160, 136, 84), np.clip((size * 0.4 - from_pole) / blur + 0.5, 0.0, 1.0))
    depth = _mix(0.55, 1.2, look["pores"]) * (1.0 - star)
    slope_x, slope_y = slope_x * depth, slope_y * depth
    across = slope_x * smooth[0] + slope_y * smooth[1]
    bumped = smooth * (1.0 + across)
    bumped[0] -= slope_x
    bumped[1] -= slope_y
    normal = _unit(bumped)
    occlusion = (1.0 - 0.1 * pit) * (1.0 - 0.4 * np.exp((from_pole / (1.6 * size)) ** 2 * -1.0) * (1.0 - star))
    shine = _highlight(normal, _mix(0.16, 0.3, look["gloss"]), 26.0, light) * (occlusion * (1.0 - 0.8 * star))
    return _lit(point, smooth, normal, colour, occlusion, light) + shine


def _paint_stem(canvas, window: _Window, body: _Body, look: Mapping[str, float], light: _Light) -> None:
    """A bent woody peg in the dip, hidden where the near shoulder stands before it."""
    base_x, base_y, base_z = body.pole()
    length, upright = _mix(0.42, 0.68, look["stem_length"]), math.hypot(*body.axis[:2])
    up_x, up_y = float(body.axis[0]) / upright, float(body.axis[1]) / upright
    reach = length * upright
    # Only the strip that the stem can reach is painted.
    columns = slice(*np.searchsorted(window.x[0], (base_x - 0.45, base_x + 0.45)))
    rows = slice(*np.searchsorted(-window.y[:, 0], (-base_y - reach - 0.1, -base_y + 0.1)))
    target = canvas[:, rows, columns]
    x, y = window.x[:, columns] - base_x, window.y[rows] - base_y
    along = (x * up_x + y * up_y) / reach
    aside = x * up_y - y * up_x - _mix(-0.16, 0.16, look["stem_bend"]) * along * np.abs(along)
    width = 0.038 + 0.12 * np.clip(along - 0.55, 0.0, 1.0) ** 2
    cover = np.clip((width - np.abs(aside)) / window.spacing + 0.5, 0.0, 1.0)
    cover *= np.clip((1.0 - along) * reach / window.spacing + 0.5, 0.0, 1.0) * (along > -0.05)
    cover *= base_z + along * (length * float(body.axis[2])) + 0.04 > target[4]
    around = np.clip(aside / width, -1.0, 1.0)
    facing = light.direction[0] * up_y * around + light.direction[2] * np.sqrt(1.0 - around**2)
    lit = (0.22 + 0.75 * light.key * np.clip(facing + 0.2, 0.0, 1.0)) * (0.35 + 0.65 * _smooth(0.0, 0.6, along))
    target[:4] *= 1.0 - cover
    target[:3] += _linear(112, 78, 44)[:, :, None] * (lit * cover)
    target[3] += cover


def _paint_leaf(picture: np.ndarray, body: _Body, factors: FruitFactors, light: _Light) -> None:
    """A leaf to one side of the stem or calyx, and the shadow it throws on the fruit."""
    look, (x, y, _) = factors.look, body.pole()
    y += 0.1 if factors.style == "apple" else 0.0
    side = 1.0 if look["leaf_angle"] > 0.5 else -1.0
    angle = _mix(-0.25, 0.45, abs(look["leaf_angle"] - 0.5) * 2.0)
    length = _mix(0.55, 0.85, (look["leaf"] - _LEAFLESS) / (1.0 - _LEAFLESS))
    ends = sorted((x - side * 0.12, x + side * (length + 0.08)))
    window = _Window.around(factors.content, picture.shape[1], (*ends, y - 0.5, y + 0.5))
    shadow, _, _ = _leaf_blade(window, x - 0.1 * float(light.direction[0]), y - 0.09, side, angle, length, 0.05)
    shadow *= 0.45 * (window.x**2 + window.y**2 < 0.9)
    window.blend(picture, np.zeros((3, *shadow.shape), np.float32), shadow)
    cover, along, aside = _leaf_blade(window, x, y, side, angle, length, window.spacing)
    window.blend(picture, _leaf_colour(along, aside, side, look["texture_x"], light) * cover, cover)


def _leaf_colour(along, aside, side: float, hue: float, light: _Light) -> np.ndarray:
    fold, from_rib = np.clip(aside * 30.0, -1.0, 1.0), np.abs(aside)
    normal = _unit(np.stack([0.25 * side * (along - 0.3), 0.33 * fold + 0.35, np.full_like(along, 0.8)]))
    veins = 0.06 * np.sin(along * 46.0 - from_rib * 110.0) * _smooth(0.0, 0.04, from_rib)
    rib = 0.35 * np.clip(1.4 - from_rib / 0.012, 0.0, 1.0)
    green = _mix(_linear(52, 100, 30), _linear(104, 140, 44), hue)[:, :, None] * (1.0 + veins + rib)
    lit = 0.26 + 0.85 * light.key * np.clip(_dot(light.direction, normal), 0.0, 1.0)
    return green * lit + 0.10 * light.key * np.maximum(_dot(light.half, normal), 0.0) ** 24


def _leaf_blade(
    window: _Window, x: float, y: float, side: float, angle: float, length: float, blur: float
) -> tuple[np.ndarray, ...]:
    """Cover, place along the blade from 0 to 1, and distance from its midrib, of a pointed, drooping leaf."""
    right, up = (window.x - x) * side, window.y - y
    along = (right * math.cos(angle) + up * math.sin(angle)) / length
    inner = np.clip(along, 0.0, 1.0)
    aside = up * math.cos(angle) - right * math.sin(angle) + length * (0.34 * inner - 0.22) * inner
    width = length * 0.62 * np.sqrt(inner) * (1.0 - inner) * (0.75 + 0.35 * inner) + 0.012 * (1.0 - inner)
    cover = np.clip((width - np.abs(aside)) / blur + 0.5, 0.0, 1.0)
    return cover * ((along > -0.02) & (along < 1.0)), along, aside
