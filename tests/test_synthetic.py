"""The synthetic fruit: same factors, same picture; same content, same scene; and the factors are true."""

import dataclasses
import json

import numpy as np
import pytest

from letit_dist.data import fruit_painting, fruit_surface, synthetic
from letit_dist.data.synthetic import (
    CONTENT_FACTORS,
    LOOK_FACTORS,
    STYLES,
    FruitFactors,
    fruit,
    sample_factors,
)

RESOLUTION = 96


def in_scene(factors: FruitFactors, **content: float) -> FruitFactors:
    """The fruit in another scene, without a leaf, so that its silhouette can be measured."""
    merged = {**factors.content, **content}
    return dataclasses.replace(factors, content=merged, look={**factors.look, "leaf": 0.0})


def empty_scene(factors: FruitFactors, resolution: int) -> np.ndarray:
    light, place = fruit_painting.Light.of(factors.content), synthetic.placement(factors.content)
    return fruit_painting.encode(fruit_painting.paint_scene(factors.content, place, light, resolution))


def silhouette(factors: FruitFactors, resolution: int = RESOLUTION) -> np.ndarray:
    """Where the picture with the fruit differs from the picture without it."""
    changed = synthetic.render(factors, resolution).astype(int) - empty_scene(factors, resolution)
    return np.abs(changed).max(axis=2) > 12


def box_down(image: np.ndarray, factor: int) -> np.ndarray:
    height, width, channels = image.shape
    return image.reshape(height // factor, factor, width // factor, factor, channels).mean(axis=(1, 3))


def extremes() -> list[dict[str, float]]:
    corners = [{"x": x, "y": y, "size": 1.0} for x in (0.0, 1.0) for y in (0.0, 1.0)]
    return [{**dict.fromkeys(CONTENT_FACTORS, 0.5), **corner} for corner in corners]


@pytest.mark.parametrize("style", STYLES)
def test_same_arguments_give_the_same_bytes_and_others_do_not(style):
    image, factors = fruit(style, 3, 14, 64)
    # As in another process, which makes its own textures.
    fruit_surface.textures.cache_clear()
    again, same = fruit(style, 3, 14, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.flags["C_CONTIGUOUS"]
    assert image.tobytes() == again.tobytes() and factors == same
    for other in ((style, 3, 15), (style, 4, 14)):
        assert sample_factors(*other).content != factors.content
        assert not np.array_equal(fruit(*other, 64)[0], image)


def test_the_styles_have_independent_streams():
    apples, oranges = (
        np.array([list(sample_factors(style, 0, index).content.values()) for index in range(500)]) for style in STYLES
    )
    assert not np.any(apples == oranges)
    between = np.corrcoef(apples.T, oranges.T) - np.eye(2 * len(CONTENT_FACTORS))
    assert np.abs(between).max() < 0.2


def test_factors_are_uniform_in_the_unit_interval_for_both_styles():
    for style in STYLES:
        drawn = [sample_factors(style, 1, index) for index in range(800)]
        content = np.array([[one.content[name] for name in CONTENT_FACTORS] for one in drawn])
        look = np.array([[one.look[name] for name in LOOK_FACTORS[style]] for one in drawn])
        for values in (content, look):
            # The largest step between sorted draws and a uniform law, as in the Kolmogorov-Smirnov test.
            even = (np.arange(800)[:, None] + 0.5) / 800
            assert np.abs(np.sort(values, axis=0) - even).max() < 0.075
            assert values.min() >= 0.0 and values.max() <= 1.0


@pytest.mark.parametrize("style", STYLES)
def test_a_fine_picture_shrinks_to_the_coarse_one(style):
    differences = []
    for index in range(8):
        fine, coarse = fruit(style, 0, index, 256)[0], fruit(style, 0, index, 64)[0]
        apart = np.abs(box_down(fine, 4) - coarse)
        differences.append(apart.mean())
        assert np.percentile(apart, 99) < 20
        shifted = np.abs(box_down(np.roll(fine, 4, axis=1), 4) - coarse)
        assert shifted.mean() > 1.5 * apart.mean()
    assert np.mean(differences) < 0.95


@pytest.mark.parametrize("resolution", [32, 33, 101, 1024])
def test_any_resolution_in_range_is_drawn(resolution):
    assert fruit("orange", 0, 0, resolution)[0].shape == (resolution, resolution, 3)


@pytest.mark.parametrize("resolution", [31, 1025, 0, -64, 64.5])
def test_other_resolutions_are_refused(resolution):
    with pytest.raises(ValueError, match=r"whole number from 32 to 1024; got"):
        fruit("apple", 0, 0, resolution)


def test_bad_styles_streams_and_factors_are_refused():
    good = sample_factors("apple", 0, 0)
    with pytest.raises(ValueError, match="unknown style 'pear': expected one of apple, orange"):
        sample_factors("pear", 0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        sample_factors("apple", 0, -1)
    with pytest.raises(ValueError, match=r"content factor x must lie in \[0, 1\]; got 1.5"):
        dataclasses.replace(good, content={**good.content, "x": 1.5})
    with pytest.raises(ValueError, match="content factors must be exactly x, y"):
        dataclasses.replace(good, content={"x": 0.5})
    with pytest.raises(ValueError, match="orange look factors must be exactly"):
        dataclasses.replace(good, style="orange")
    with pytest.raises(ValueError, match="lack content, look"):
        FruitFactors.from_json({"style": "apple"})


@pytest.mark.parametrize("style", STYLES)
def test_factors_survive_json(style):
    factors = sample_factors(style, 5, 6)
    assert FruitFactors.from_json(json.loads(json.dumps(factors.as_json()))) == factors


def test_same_content_gives_the_same_scene_around_either_fruit():
    for index in range(4):
        apple = in_scene(sample_factors("apple", 0, index))
        orange = in_scene(sample_factors("orange", 0, index), **apple.content)
        x, y, radius = synthetic.placement(apple.content)
        place = (np.arange(RESOLUTION) + 0.5) / RESOLUTION
        far = np.hypot(place - x, place[:, None] - y) > 1.5 * radius
        pictures = [synthetic.render(factors, RESOLUTION) for factors in (apple, orange)]
        assert far.mean() > 0.2
        assert np.array_equal(pictures[0][far], pictures[1][far])
        assert not np.array_equal(*pictures)


@pytest.mark.parametrize("style", STYLES)
def test_the_silhouette_has_the_promised_place_and_area(style):
    for index in range(8):
        # Dim light on a bright wall separates every skin from what is behind it.
        factors = in_scene(sample_factors(style, 2, index), background_brightness=1.0, background_warmth=0.0)
        rows, columns = np.nonzero(silhouette(factors))
        x, y, radius = synthetic.placement(factors.content)
        stem = 0.05 if style == "apple" else 0.02
        assert (columns.mean() + 0.5) / RESOLUTION == pytest.approx(x, abs=0.02 * radius / 0.2)
        assert (rows.mean() + 0.5) / RESOLUTION == pytest.approx(y, abs=stem * radius / 0.2)
        assert np.sqrt(len(rows) / np.pi) / RESOLUTION == pytest.approx(radius, rel=0.05)


@pytest.mark.parametrize("style", STYLES)
def test_the_largest_fruit_stays_inside_the_picture(style):
    for index in range(6):
        for content in extremes():
            mask = silhouette(in_scene(sample_factors(style, 7, index), **content), 64)
            assert mask.any()
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


@pytest.mark.parametrize("style", STYLES)
def test_every_content_factor_shows(style):
    factors = sample_factors(style, 0, 1)
    for name in CONTENT_FACTORS:
        low, high = (
            synthetic.render(dataclasses.replace(factors, content={**factors.content, name: value}), 64)
            for value in (0.2, 0.8)
        )
        assert np.abs(low.astype(int) - high).mean() > 1.0, name


@pytest.mark.parametrize("style", STYLES)
def test_light_falls_from_the_side_that_light_x_says(style):
    factors = in_scene(sample_factors(style, 0, 4), x=0.5, background_brightness=0.5)
    for light_x, brighter_left in ((0.0, True), (1.0, False)):
        image = synthetic.render(in_scene(factors, light_x=light_x), 64).astype(float)
        left, right = image[28:48, 22:32].mean(), image[28:48, 32:42].mean()
        assert (left > right) == brighter_left


@pytest.mark.parametrize("style", STYLES)
def test_warmth_and_brightness_of_the_background_show_in_its_pixels(style):
    factors = sample_factors(style, 0, 2)

    def wall(**content: float) -> np.ndarray:
        return synthetic.render(in_scene(factors, **content), 64)[:6].mean(axis=(0, 1))

    cool, warm = wall(background_warmth=0.0), wall(background_warmth=1.0)
    assert cool[2] > cool[0] and warm[0] > warm[2]
    assert wall(background_brightness=1.0).mean() > wall(background_brightness=0.0).mean() + 40


def test_the_styles_differ_in_colour_and_apples_differ_among_themselves():
    hues = {}
    for style in STYLES:
        centres = []
        for index in range(24):
            factors = sample_factors(style, 0, index)
            x, y, _ = (int(64 * value) for value in synthetic.placement(factors.content))
            centres.append(synthetic.render(factors, 64)[y - 4 : y + 5, x - 4 : x + 5].mean(axis=(0, 1)))
        hues[style] = np.array(centres)
    green_share = {style: colours[:, 1] / colours.sum(axis=1) for style, colours in hues.items()}
    assert np.linalg.norm(hues["apple"].mean(axis=0) - hues["orange"].mean(axis=0)) > 15
    assert green_share["apple"].std() > 2 * green_share["orange"].std()
    red, green, blue = hues["orange"].T
    assert np.all((red > green) & (green > blue))
