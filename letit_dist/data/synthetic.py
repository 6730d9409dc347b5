"""Unpaired apples and oranges, drawn at any resolution, with the factors that made each picture kept.

A picture has a style (apple or orange), content (where the fruit lies, how large it is, how it is lit, what
is behind it) and a look (skin, stem, leaf: what only its style can say). Content has one distribution for
both styles, so a translation is right when it changes the style and leaves the content as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from letit_dist.data.fruit_painting import Light, encode, paint_fruit, paint_scene
from letit_dist.data.fruit_surface import mix

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
# The factors of each style's own; a fruit has a leaf when its "leaf" is above 0.55.
LOOK_FACTORS = {
    "apple": (*_SHARED_LOOK, *_APPLE_LOOK, "stem_length", "stem_bend"),
    "orange": (*_SHARED_LOOK, "hue", "mottling", "pores", "greening", "calyx"),
}
MIN_RESOLUTION, MAX_RESOLUTION = 32, 1024


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


def fruit(style: str, seed: int, index: int, resolution: int) -> tuple[np.ndarray[Any, Any], FruitFactors]:
    """Picture `index` of the stream `(style, seed)`, as `render` gives it, and its factors."""
    factors = sample_factors(style, seed, index)
    return render(factors, resolution), factors


def placement(content: Mapping[str, float]) -> tuple[float, float, float]:
    """Centre x and y (down) of the fruit's silhouette and the radius of a disc of equal area.

    In fractions of the picture's width; each depends on one factor alone and linearly, in either style.
    """
    x = mix(0.38, 0.62, content["x"])
    y = mix(0.46, 0.62, content["y"])
    return x, y, mix(0.20, 0.34, content["size"])


def render(factors: FruitFactors, resolution: int) -> np.ndarray[Any, Any]:
    """Draw the factors: uint8 sRGB of shape (resolution, resolution, 3), the same bytes every time.

    Any whole resolution from 32 to 1024 shows the same picture, only sharper; otherwise ValueError.
    """
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION or int(resolution) != resolution:
        raise ValueError(f"resolution must be a whole number from 32 to 1024; got {resolution}")
    light, place = Light.of(factors.content), placement(factors.content)
    picture = paint_scene(factors.content, place, light, int(resolution))
    paint_fruit(picture, factors.style, factors.look, place, light)
    return encode(picture)
