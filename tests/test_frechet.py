"""The Frechet distance against closed forms and torch-fidelity, and its speed on few rows."""

import time

import pytest
import torch
from gaussian_rows import draw, rows_with

from letit_dist.errors import UserError
from letit_dist.evaluation.fidelity import fid
from letit_dist.evaluation.frechet import frechet_distance

pytest.importorskip("torch_fidelity")


def test_gaussians_that_commute():
    """With covariances of the same axes it is |m|^2 + |sqrt(C_a) - sqrt(C_b)|^2."""
    turn = torch.linalg.qr(draw(5, 5).double()).Q
    first, second = torch.tensor([1.0, 4.0, 9.0, 0.25, 2.0]).double(), torch.tensor([4.0, 1.0, 1.0, 1.0, 3.0]).double()
    means = draw(2, 5, seed=1).double()
    sides = [
        rows_with(mean, turn @ torch.diag(scale) @ turn.t(), count, seed)
        for seed, (mean, scale, count) in enumerate(zip(means, (first, second), (9, 20), strict=True))
    ]
    expected = (means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(*sides) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(*sides[::-1]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [(20, 15), (20, 90), (90, 20), (90, 80)])
def test_few_and_many_rows_equal_torch_fidelity(a, b):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    mix = draw(40, 40, seed=9)
    x, y = (draw(a, 40, seed=1) @ mix).relu(), (draw(b, 40, seed=2) @ mix * 1.2).relu()
    statistics = [fid_features_to_statistics(side) for side in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert fid(x, y) == pytest.approx(expected, rel=1e-6)


def test_few_rows_are_fast():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = draw(60, 700), draw(50, 700, seed=1) + 0.1

    def slow():
        return fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)

    def seconds(run):
        begun = time.process_time()
        run()
        return time.process_time() - begun

    frechet_distance(x, y)
    ratio = seconds(slow) / max(min(seconds(lambda: frechet_distance(x, y)) for _ in range(3)), 1e-9)
    assert ratio > 10
    assert frechet_distance(x, y) == pytest.approx(slow()["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("count", [30, 200])
def test_a_set_is_at_no_distance_from_itself(count):
    x = draw(count, 64).relu()
    assert abs(fid(x, x)) < 1e-3 and abs(frechet_distance(x, x)) < 1e-9
    assert abs(fid(x, x.flip(0))) < 1e-3


def test_frechet_refuses():
    with pytest.raises(UserError, match="3 dimensions on one side, 4 on the other"):
        frechet_distance(draw(5, 3), draw(5, 4))
    with pytest.raises(UserError, match="2 samples a side, got 1 and 5"):
        frechet_distance(draw(1, 3), draw(5, 3))
