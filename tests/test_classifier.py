"""The classifier of latents against brute force, and chains that stop where it says so."""

import pytest
import torch

from letit_dist.energy.classifier import _STRENGTHS, LatentClassifier
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.errors import UserError


def clouds(count=30, features=12, gap=1.0):
    draws = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, count, features, generator=draws, dtype=torch.float64)
    return source[: count - 6], target + gap


def test_ridge_and_accuracy_are_those_of_leaving_each_one_out():
    source, target = clouds()
    fitted = LatentClassifier.fit(source.split(7), target.split(11))
    mean = (source.mean(0) + target.mean(0)) / 2
    x = torch.cat([source, target]) - mean
    goal = torch.cat([-torch.ones(len(source)), torch.ones(len(target))]).double()
    scale = x.square().sum(1).mean()
    errors = []
    for strength in _STRENGTHS:

        def solve(rows, y, ridge=strength * scale):
            return torch.linalg.solve(rows.t() @ rows + ridge * torch.eye(12, dtype=torch.float64), rows.t() @ y)

        rest = [torch.arange(len(x)) != i for i in range(len(x))]
        predicted = torch.stack([x[i] @ solve(x[r], goal[r]) for i, r in enumerate(rest)])
        errors.append((float((predicted - goal).square().mean()), predicted, solve(x, goal)))
    _, predicted, weight = min(errors, key=lambda item: item[0])
    right = (predicted * goal > 0).double()
    assert fitted.accuracy == pytest.approx(float((right[: len(source)].mean() + right[len(source) :].mean()) / 2))
    torch.testing.assert_close(fitted.weight.double(), weight, rtol=1e-4, atol=1e-6)
    z = torch.randn(5, 12)
    torch.testing.assert_close(fitted.score(z), ((z.double() - mean) @ weight).float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(fitted.is_target(z), fitted.score(z) > 0)


def test_domains_that_differ_are_told_apart_and_equal_ones_are_not():
    assert LatentClassifier.fit([clouds(gap=3.0)[0]], [clouds(gap=3.0)[1]]).accuracy > 0.98
    same = torch.randn(2, 200, 12, generator=torch.Generator().manual_seed(1))
    assert 0.35 < LatentClassifier.fit([same[0]], [same[1]]).accuracy < 0.65


def test_maps_are_seen_coarsely():
    draws = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 16, 3, 32, 32, generator=draws)
    fitted = LatentClassifier.fit([source], [target + 0.5])
    assert fitted.weight.shape == (3 * 8 * 8,) and fitted.is_target(target + 0.5).all()


def test_too_little_to_learn_from():
    with pytest.raises(UserError, match="two samples of each domain, got 1 and 3"):
        LatentClassifier.fit([torch.zeros(1, 2)], [torch.ones(3, 2)])
    with pytest.raises(UserError, match="latents are all equal"):
        LatentClassifier.fit([torch.ones(2, 2)], [torch.ones(3, 2)])


class Slide(torch.nn.Module):
    """E = -z_0, so that each step of size 1 moves the first entry by 1/2."""

    def forward(self, latents):
        return -latents[:, 0]


@pytest.mark.parametrize("noise_scale", [0.0, 0.3])
def test_chains_stop_where_they_have_arrived(noise_scale):
    start = torch.tensor([[0.0, 1.0], [-1.2, 2.0], [-9.0, 3.0], [0.6, 4.0]])
    sampler = LangevinSampler(LangevinConfig(steps=5, step_size=1.0, noise_scale=noise_scale))
    draws = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0))
    noise = (lambda step: draws[step]) if noise_scale else None
    free = sampler.sample(Slide(), start, keep_path=True, noise=noise)
    assert free.steps.tolist() == [5] * 4
    stopped = sampler.sample(Slide(), start, keep_path=True, noise=noise, until=lambda z: z[:, 0] > 0.5)
    for row in range(4):
        arrived = (free.path[:, row, 0] > 0.5).nonzero().flatten().tolist()
        steps = min([*arrived, 5])
        assert stopped.steps[row] == steps
        assert torch.equal(stopped.path[: steps + 1, row], free.path[: steps + 1, row])
        assert torch.equal(stopped.path[steps:, row], free.path[steps, row].expand(6 - steps, -1))
        assert stopped.shift[row].tolist() == [steps, 0]
    assert torch.equal(stopped.latents, stopped.path[-1])
    if not noise_scale:
        assert stopped.steps.tolist() == [2, 4, 5, 0]
