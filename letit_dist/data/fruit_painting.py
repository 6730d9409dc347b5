"""Paints the scene and the fruit in it: light, wall, table and shadow, then skin, stem and leaf.

Lengths: pictures are 1 wide and 1 high, x to the right and y down. Around a fruit the unit is its radius,
x to the right, y up and z towards the camera. Colours are linear light, channels first, until `encode`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from letit_dist.data.fruit_surface import (
    APPLE_SKIN,
    CLOUDS_AND_GRAIN,
    GRAIN,
    ORANGE_SKIN,
    Array,
    Body,
    dot,
    fivefold,
    halve,
    mix,
    sample_texture,
    unit,
)

# Centre x and y (down) and radius of the fruit's silhouette, in fractions of the picture's width.
Place = tuple[float, float, float]

_LEAFLESS = 0.55
_SAMPLES = 2  # per pixel and axis, on the fruit
_TEXTURE_TILE = 2.0  # fruit radii that one texture tile covers
_CHUNK = 1 << 15  # points shaded at a time, so that their arrays stay in cache


def encode(picture: Array) -> Array:
    """Linear light (3, height, width) as uint8 sRGB (height, width, 3)."""
    # An exponential shoulder keeps highlights from clipping to flat white patches.
    exposed = 1.0 - np.exp(-1.25 * picture)
    srgb = np.power(np.clip(exposed, 0.0, 1.0), np.float32(1 / 2.2))
    return np.ascontiguousarray((srgb * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _smooth(low: float, high: float, value: Array) -> Array:
    t = np.clip((value - low) * (1.0 / (high - low)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


@functools.cache
def _linear(red: int, green: int, blue: int) -> Array:
    """A column of linear light from an sRGB colour, so that it multiplies rows of pixels."""
    return (np.array([[red], [green], [blue]], np.float32) / 255.0) ** 2.2


# The scene: light, wall and table, which depend on content alone


@dataclass(frozen=True)
class Light:
    """A soft lamp before the scene, halfway between it and the camera, and the light the table throws back."""

    direction: Array
    half: Array
    key: float
    tone: Array

    @classmethod
    def of(cls, content: Mapping[str, float]) -> Light:
        direction = unit(np.array([mix(-1.15, 1.15, content["light_x"]), 0.85, 0.75], np.float32))
        half = unit(direction + np.array([0.0, 0.0, 1.0], np.float32))
        # Equal steps of the factor are equal ratios of light, as the eye counts them.
        brightness = 0.055 * (0.52 / 0.055) ** content["background_brightness"]
        cool, warm = np.array([[0.74], [0.98], [1.32]]), np.array([[1.28], [0.97], [0.62]])
        tone = (brightness * mix(cool, warm, content["background_warmth"])).astype(np.float32)
        return cls(direction, half, mix(0.5, 1.75, content["light_strength"]), tone)


def paint_scene(content: Mapping[str, float], place: Place, light: Light, resolution: int) -> Array:
    """Wall, table and the shadow of the fruit at `place`, linear (3, resolution, resolution)."""
    places = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    u, v = places[None, :], places[:, None]
    below = v - mix(0.24, 0.46, content["horizon"])
    on_table = np.clip(below / max(1.0 / resolution, 0.006) + 0.5, 0.0, 1.0)
    # Dividing by the distance makes the table's grain run towards the horizon.
    depth = 1.0 / (np.maximum(below, 0.0) + 0.22)
    s = np.where(below > 0.0, (u - 0.5) * depth * 0.1, u * 0.6) + content["background_brightness"]
    t = np.broadcast_to(np.where(below > 0.0, depth * 0.55, v * 0.6) + content["background_warmth"], s.shape)
    clouds, grain = sample_texture(CLOUDS_AND_GRAIN, s.ravel(), t.ravel(), 1.2 / resolution).reshape(2, *s.shape)
    glow = np.exp((u - (0.5 + 0.55 * light.direction[0])) ** 2 * -2.2) * np.exp((v - 0.1) ** 2 * -2.6)
    wall = 0.38 + 0.34 * glow + 0.018 * clouds + 0.010 * grain
    table = (0.86 + 0.34 * below + 0.03 * clouds + 0.035 * grain) * _shadow(place, light, u, v)
    # The table's far edge catches a line of light, as rounded edges do.
    edge = max(0.008, 0.8 / resolution)
    shade = mix(wall, table, on_table) * (1.0 + 0.002 / edge * np.exp(-((below / edge - 0.8) ** 2)))
    tint = mix(1.0, np.array([[[1.06]], [[1.0]], [[0.93]]], np.float32), on_table)
    return light.tone[:, :, None] * tint * ((0.55 + 0.5 * light.key) * shade)


def _shadow(place: Place, light: Light, u: Array, v: Array) -> Array:
    """The light that reaches the table: dark where the fruit stands, dimmed on the side away from the lamp."""
    x, y, radius = place
    across, down = (u - x) / radius, (v - y) / radius
    contact = np.exp((across / 0.74) ** 2 * -1.0) * np.exp(((down - 0.9) / 0.15) ** 2 * -1.0)
    away = ((across + 1.05 * light.direction[0]) / 1.12) ** 2 + ((down - 0.8) / 0.34) ** 2
    return (1.0 - 0.8 * contact) * (1.0 - (0.35 + 0.14 * light.key) * np.exp(-away))


# Painting: the body, then its stem, then its leaf


@dataclass(frozen=True)
class _Window:
    """A rectangle of whole pixels around the fruit, and its samples in fruit radii."""

    rows: slice
    columns: slice
    x: Array
    y: Array
    spacing: float

    @classmethod
    def around(cls, place: Place, resolution: int, box: tuple[float, ...]) -> _Window:
        """The part of `box` (left, right, bottom, top in fruit radii) that lies in the picture."""
        x, y, radius = place
        columns = _pixels(x + box[0] * radius, x + box[1] * radius, resolution)
        rows = _pixels(y - box[3] * radius, y - box[2] * radius, resolution)
        across, down = (_sample_places(span, resolution) for span in (columns, rows))
        spacing = 1.0 / (_SAMPLES * resolution * radius)
        return cls(rows, columns, (across[None] - x) / radius, (y - down[:, None]) / radius, spacing)

    def blend(self, picture: Array, colour: Array, cover: Array) -> None:
        """Lay `colour` (3, ...samples), already multiplied by `cover`, over the picture."""
        target = picture[:, self.rows, self.columns]
        target *= 1.0 - halve(cover[None])
        target += halve(colour)


def _pixels(low: float, high: float, resolution: int) -> slice:
    return slice(max(math.floor(low * resolution), 0), min(math.ceil(high * resolution), resolution))


def _sample_places(span: slice, resolution: int) -> Array:
    count = _SAMPLES * (span.stop - span.start)
    return ((np.arange(count, dtype=np.float32) + 0.5) / _SAMPLES + span.start) / resolution


def paint_fruit(picture: Array, style: str, look: Mapping[str, float], place: Place, light: Light) -> None:
    """Lay the fruit of `style` and `look` over a picture that `paint_scene` gave."""
    body = Body(style, look)
    window = _Window.around(place, picture.shape[1], (-1.22, 1.22, -1.22, 1.5))
    canvas = np.zeros((5, window.y.size, window.x.size), np.float32)
    canvas[4] = -9.0
    samples = np.flatnonzero(window.x**2 + window.y**2 < 1.22**2)
    skin = functools.partial(
        _apple_skin if style == "apple" else _orange_skin, body=body, look=look, spacing=window.spacing, light=light
    )
    for start in range(0, len(samples), _CHUNK):
        _paint_body(canvas.reshape(5, -1), samples[start : start + _CHUNK], window, body, skin)
    if style == "apple":
        _paint_stem(canvas, window, body, look, light)
    window.blend(picture, canvas[:3], canvas[3])
    if look["leaf"] > _LEAFLESS:
        x, y, _ = body.pole()
        _paint_leaf(picture, x, y + (0.1 if style == "apple" else 0.0), look, place, light)


def _paint_body(canvas: Array, samples: Array, window: _Window, body: Body, skin: Callable[[Array], Array]) -> None:
    """Fill rows of `canvas` at `samples`: the colour of `skin` times cover, cover, and depth in fruit radii."""
    rows, columns = np.divmod(samples, window.x.size)
    x = window.x[0].take(columns) * body.scale + body.centre[0]
    y = window.y[:, 0].take(rows) * body.scale + body.centre[1]
    z, cover = body.trace(x, y, window.spacing * body.scale)
    seen = np.flatnonzero(cover)
    point, cover = np.stack([x, y, z]).take(seen, axis=1), cover[seen]
    canvas[:, samples[seen]] = np.concatenate([skin(point) * cover, cover[None], point[2:] / body.scale])


def _lit(
    point: Array,
    smooth: Array,
    normal: Array,
    colour: Array,
    occlusion: Array,
    light: Light,
) -> Array:
    """Linear light (3, points) that skin scatters from lamp, sky and table; `smooth` is the unbumped normal."""
    lambert = np.clip((dot(light.direction, normal) + 0.12) / 1.12, 0.0, 1.0)
    # Where the whole body turns away from the lamp, its bumps must not catch it.
    lambert *= _smooth(-0.25, 0.15, dot(light.direction, smooth))
    open_sky = occlusion * (1.0 - 0.55 * _smooth(0.35, 1.05, -point[1]))
    table = light.tone * (0.2 + 0.17 * light.key) * (np.clip(0.25 - 0.75 * smooth[1], 0.0, 1.0) * open_sky)
    lamp = 0.95 * light.key * lambert * (0.35 + 0.65 * open_sky)
    return colour * (table + ((0.2 + 0.14 * normal[1]) * open_sky + lamp))


def _highlight(normal: Array, strength: float, tightness: float, light: Light) -> Array:
    toward = dot(light.half, normal) - 1.0
    lamp = np.exp(toward * tightness) + 0.25 * np.exp(toward * (tightness * 0.12))
    rim = (1.0 - np.clip(normal[2], 0.0, 1.0)) ** 4 * (0.5 + 0.5 * normal[1])
    return strength * light.key * lamp + 0.10 * rim


def _skin_places(point: Array, look: Mapping[str, float]) -> tuple[Array, Array]:
    """Texture coordinates that spread evenly over the visible half: an equal-area map seen from the camera."""
    x, y, z = unit(point)
    spread = np.sqrt(2.0 / (1.0 + np.maximum(z, -0.5))) * (1.0 / _TEXTURE_TILE)
    return x * spread + look["texture_x"], look["texture_y"] - y * spread


def _apple_skin(point: Array, body: Body, look: Mapping[str, float], spacing: float, light: Light) -> Array:
    normal, cosine, _ = body.surface(point)
    colour = _apple_colour(point, cosine, body, look, spacing / _TEXTURE_TILE)
    occlusion = 1.0 - 0.72 * np.exp((cosine - 1.0) * 14.0)
    shine = _highlight(normal, mix(0.5, 0.95, look["gloss"]), 260.0, light) * occlusion
    return _lit(point, normal, normal, colour, occlusion, light) + shine


def _apple_colour(point: Array, cosine: Array, body: Body, look: Mapping[str, float], spacing: float) -> Array:
    """Green to yellow ground under a streaked blush towards its sunny side, pale dots, russet in the dip."""
    dots, _, clouds = sample_texture(APPLE_SKIN, *_skin_places(point, look), spacing)
    around = np.arctan2(dot(body.side, point), dot(body.front, point)) * (2.0 / math.tau)
    (streaks,) = sample_texture(GRAIN, around + look["texture_x"], cosine * 0.05 + look["texture_y"], spacing)
    # A third of the apples stay green or yellow, a third are half blushed, a third are red.
    blush = float(np.interp(look["blush"], [0, 0.3, 0.33, 0.66, 0.7, 1], [-0.9, -0.45, -0.2, 0.25, 0.6, 1.3]))
    sun = math.tau * look["blush_side"]
    ripe = blush + 0.41 * (math.cos(sun) * point[0] + math.sin(sun) * point[1]) + 0.14 * (cosine + clouds)
    ripe = _smooth(-0.55, 0.65, ripe + (0.08 + 0.2 * look["streaks"]) * streaks)
    ground = mix(_linear(104, 158, 38), _linear(226, 196, 72), look["ground"])
    colour = mix(ground, mix(_linear(198, 44, 34), _linear(126, 10, 24), look["redness"]), ripe)
    streaked = ripe * np.clip(streaks, -1.0, 1.5) * (0.05 + 0.13 * look["streaks"])
    colour = colour * ((1.0 + 0.05 * clouds) * (1.0 - streaked))
    colour = mix(colour, _linear(236, 210, 140), (0.08 + 0.36 * look["speckles"]) * dots)
    russet = mix(_linear(120, 140, 40), _linear(140, 100, 45), look["russet"])
    near_stem = np.clip(np.exp((cosine - 1.0) * 16.0) * (1.0 + 0.3 * streaks), 0.0, 1.0)
    return mix(colour, russet, 0.75 * near_stem)


def _orange_skin(point: Array, body: Body, look: Mapping[str, float], spacing: float, light: Light) -> Array:
    smooth, cosine, lobe = body.surface(point)
    clouds, pit, slope_x, slope_y = sample_texture(ORANGE_SKIN, *_skin_places(point, look), spacing / _TEXTURE_TILE)
    colour = mix(_linear(255, 172, 20), _linear(238, 96, 6), look["hue"])
    colour = colour * (1.0 + (0.03 + 0.06 * look["mottling"]) * clouds - 0.1 * pit)
    from_pole = np.sqrt(np.maximum(2.0 - 2.0 * cosine, 0.0))
    green = 0.55 * look["greening"] * np.exp((from_pole / 0.42) ** 2 * -1.0)
    colour = mix(colour, _linear(150, 150, 30), green)
    size, blur = mix(0.11, 0.17, look["calyx"]), max(spacing, 0.012)
    star = np.clip((size * (1.0 + 0.42 * fivefold(lobe)) - from_pole) / blur + 0.5, 0.0, 1.0)
    colour = mix(colour, mix(_linear(62, 88, 30), _linear(92, 76, 38), look["calyx"]), star)
    colour = mix(colour, _linear(160, 136, 84), np.clip((size * 0.4 - from_pole) / blur + 0.5, 0.0, 1.0))
    depth = mix(0.55, 1.2, look["pores"]) * (1.0 - star)
    slope_x, slope_y = slope_x * depth, slope_y * depth
    across = slope_x * smooth[0] + slope_y * smooth[1]
    bumped = smooth * (1.0 + across)
    bumped[0] -= slope_x
    bumped[1] -= slope_y
    normal = unit(bumped)
    occlusion = (1.0 - 0.1 * pit) * (1.0 - 0.4 * np.exp((from_pole / (1.6 * size)) ** 2 * -1.0) * (1.0 - star))
    shine = _highlight(normal, mix(0.16, 0.3, look["gloss"]), 26.0, light) * (occlusion * (1.0 - 0.8 * star))
    return _lit(point, smooth, normal, colour, occlusion, light) + shine


def _paint_stem(canvas: Array, window: _Window, body: Body, look: Mapping[str, float], light: Light) -> None:
    """A bent woody peg in the dip, hidden where the near shoulder stands before it."""
    base_x, base_y, base_z = body.pole()
    length, upright = mix(0.42, 0.68, look["stem_length"]), math.hypot(*body.axis[:2])
    up_x, up_y = float(body.axis[0]) / upright, float(body.axis[1]) / upright
    reach = length * upright
    # Only the strip that the stem can reach is painted.
    columns = slice(*np.searchsorted(window.x[0], (base_x - 0.45, base_x + 0.45)))
    rows = slice(*np.searchsorted(-window.y[:, 0], (-base_y - reach - 0.1, -base_y + 0.1)))
    target = canvas[:, rows, columns]
    x, y = window.x[:, columns] - base_x, window.y[rows] - base_y
    along = (x * up_x + y * up_y) / reach
    aside = x * up_y - y * up_x - mix(-0.16, 0.16, look["stem_bend"]) * along * np.abs(along)
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


def _paint_leaf(picture: Array, x: float, y: float, look: Mapping[str, float], place: Place, light: Light) -> None:
    """A leaf that grows from `x`, `y` (fruit radii) to one side, and the shadow it throws on the fruit."""
    side = 1.0 if look["leaf_angle"] > 0.5 else -1.0
    angle = mix(-0.25, 0.45, abs(look["leaf_angle"] - 0.5) * 2.0)
    length = mix(0.55, 0.85, (look["leaf"] - _LEAFLESS) / (1.0 - _LEAFLESS))
    ends = sorted((x - side * 0.12, x + side * (length + 0.08)))
    window = _Window.around(place, picture.shape[1], (*ends, y - 0.5, y + 0.5))
    shadow, _, _ = _leaf_blade(window, x - 0.1 * float(light.direction[0]), y - 0.09, side, angle, length, 0.05)
    shadow *= 0.45 * (window.x**2 + window.y**2 < 0.9)
    window.blend(picture, np.zeros((3, *shadow.shape), np.float32), shadow)
    cover, along, aside = _leaf_blade(window, x, y, side, angle, length, window.spacing)
    window.blend(picture, _leaf_colour(along, aside, side, look["texture_x"], light) * cover, cover)


def _leaf_colour(along: Array, aside: Array, side: float, hue: float, light: Light) -> Array:
    fold, from_rib = np.clip(aside * 30.0, -1.0, 1.0), np.abs(aside)
    normal = unit(np.stack([0.25 * side * (along - 0.3), 0.33 * fold + 0.35, np.full_like(along, 0.8)]))
    veins = 0.06 * np.sin(along * 46.0 - from_rib * 110.0) * _smooth(0.0, 0.04, from_rib)
    rib = 0.35 * np.clip(1.4 - from_rib / 0.012, 0.0, 1.0)
    green = mix(_linear(52, 100, 30), _linear(104, 140, 44), hue)[:, :, None] * (1.0 + veins + rib)
    lit = 0.26 + 0.85 * light.key * np.clip(dot(light.direction, normal), 0.0, 1.0)
    return green * lit + 0.10 * light.key * np.maximum(dot(light.half, normal), 0.0) ** 24


def _leaf_blade(
    window: _Window, x: float, y: float, side: float, angle: float, length: float, blur: float
) -> tuple[Array, ...]:
    """Cover, place along the blade from 0 to 1, and distance from its midrib, of a pointed, drooping leaf."""
    right, up = (window.x - x) * side, window.y - y
    along = (right * math.cos(angle) + up * math.sin(angle)) / length
    inner = np.clip(along, 0.0, 1.0)
    aside = up * math.cos(angle) - right * math.sin(angle) + length * (0.34 * inner - 0.22) * inner
    width = length * 0.62 * np.sqrt(inner) * (1.0 - inner) * (0.75 + 0.35 * inner) + 0.012 * (1.0 - inner)
    cover = np.clip((width - np.abs(aside)) / blur + 0.5, 0.0, 1.0)
    return cover * ((along > -0.02) & (along < 1.0)), along, aside
