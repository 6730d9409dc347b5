"""Schedules as pure functions of images_seen, so that a resumed run or another world size agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def learning_rate(base: float, images_seen: int, *, warmup: int = 0, decay: tuple[int, int] | None = None) -> float:
    """`base`, rising linearly over the first `warmup` images, and falling to 0 along a half cosine between
    the two counts of images in `decay` (None = constant, as in the published runs)."""
    rate = base * min(1.0, (images_seen + 1) / warmup) if warmup else base
    if decay is None:
        return rate
    start, end = decay
    progress = min(max((images_seen - start) / (end - start), 0.0), 1.0)
    return rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def average_beta(half_life: float, batch: int, images_seen: int, warmup: float) -> float:
    """Decay of a weight average over one batch; the half-life (in images) is at most `warmup` x images_seen."""
    if warmup:
        half_life = min(half_life, warmup * images_seen)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def level_starts(durations: Sequence[int]) -> list[int]:
    """images_seen at which each level of a growing network begins; `durations` holds the images of each level."""
    return [0, *accumulate(durations)][:-1]


def level_at(durations: Sequence[int], images_seen: int) -> int:
    """The level of the batch that starts at `images_seen`; the last one lasts for ever."""
    return sum(start <= images_seen for start in level_starts(durations)) - 1


def blend_at(durations: Sequence[int], images_seen: int) -> float:
    """How far the level has faded in, in [0, 1]: a half sine over the first half of each level but the lowest
    (ALAE's code; progressive growing, 1710.10196, is linear)."""
    level = level_at(durations, images_seen)
    progress = (images_seen - level_starts(durations)[level]) / (durations[level] / 2)
    return 1.0 if level == 0 or progress >= 1 else 0.5 + 0.5 * math.sin(math.pi * (progress - 0.5))


def crosses(interval: int, before: int, after: int) -> bool:
    """True when a multiple of `interval` lies in (before, after]."""
    return after // interval > before // interval
