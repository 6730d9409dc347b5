import math

import pytest

from letit_dist.schedule import average_beta, blend_at, crosses, learning_rate, level_at, level_starts


def test_a_constant_rate():
    assert [learning_rate(0.3, images) for images in (0, 10**9)] == [0.3, 0.3]


def test_the_rate_rises_linearly_and_is_full_at_the_end_of_the_warmup():
    assert learning_rate(2.0, 0, warmup=100) == 0.02
    assert learning_rate(2.0, 49, warmup=100) == 1.0
    assert learning_rate(2.0, 99, warmup=100) == learning_rate(2.0, 100, warmup=100) == 2.0


def test_the_rate_falls_along_a_half_cosine():
    rates = [learning_rate(4.0, images, decay=(100, 300)) for images in (0, 100, 150, 200, 250, 300, 999)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([4, 4, 2 * (1 + root), 2, 2 * (1 - root), 0, 0], abs=1e-12)
    assert learning_rate(4.0, 200, warmup=400, decay=(100, 300)) == pytest.approx(2 * 201 / 400)


def test_the_average_forgets_half_in_a_half_life():
    assert average_beta(1000, 1000, 10**9, 0.05) == 0.5
    assert average_beta(1000, 100, 10**9, 0.0) ** 10 == pytest.approx(0.5)
    # In the warm-up the half-life is a share of what was seen; without one it is full from the start.
    assert average_beta(1000, 100, 8000, 0.05) == pytest.approx(0.5 ** (100 / 400))
    assert average_beta(1000, 100, 100, 0.0) == average_beta(1000, 100, 20_000, 0.05)
    assert average_beta(1000, 100, 0, 0.05) == 0.0


def test_an_interval_is_crossed_once_for_each_multiple_at_most():
    assert [crosses(10, before, before + 4) for before in range(0, 28, 4)] == [
        False, False, True, False, True, False, False
    ]  # fmt: skip
    assert crosses(10, 6, 10) and not crosses(10, 10, 14)
    assert crosses(10, 5, 65)


def test_levels_follow_one_another_and_the_last_one_stays():
    durations = [100, 50, 200]
    assert level_starts(durations) == [0, 100, 150]
    assert [level_at(durations, images) for images in (0, 99, 100, 149, 150, 10**9)] == [0, 0, 1, 1, 2, 2]


def test_a_level_fades_in_over_its_first_half_along_a_half_sine():
    durations = [100, 100, 100]
    # 0.5 + 0.5 sin(pi * progress - pi / 2), and never at the lowest level
    quarter = 0.5 - 0.5 * math.sqrt(0.5)
    blends = [blend_at(durations, 100 + offset) for offset in (0, 12.5, 25, 37.5, 50, 99)]
    assert blends == pytest.approx([0, quarter, 0.5, 1 - quarter, 1, 1], abs=1e-12)
    assert [blend_at(durations, images) for images in (0, 10, 99, 250, 10**6)] == [1.0] * 5
    assert 0 < blend_at(durations, 201) < 0.01
