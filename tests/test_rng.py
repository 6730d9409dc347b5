import pytest
import torch

from letit_dist import rng


def test_draws_are_what_they_always_were():
    """Pinned: a change of any of these is a change of every run, and of every resume."""
    assert rng.seed_for(0, "flip", 0) == 8796854225463938499
    assert rng.seed_for(7, "input noise", 123_456_789) == 3942681656759716017
    assert rng.uniform(3, "flip", [0, 1, 10**12]).tolist() == [
        0.1407881216474577,
        0.26360133611686865,
        0.9036356602012096,
    ]
    assert rng.normal((2,), 3, "z", [5])[0].tolist() == pytest.approx([0.7605754137, -0.2149727792], abs=1e-6)
    assert rng.generator(3, "z", 5).initial_seed() == rng.seed_for(3, "z", 5)


def test_a_draw_belongs_to_its_index_and_to_no_batch():
    whole = rng.normal((2, 3), 1, "noise", range(6))
    assert whole.shape == (6, 2, 3) and whole.dtype == torch.float32
    assert torch.equal(rng.normal((2, 3), 1, "noise", torch.tensor([4, 1])), whole[[4, 1]])
    draws = rng.uniform(1, "flip", range(6))
    assert torch.equal(rng.uniform(1, "flip", torch.tensor([5, 0])), draws[[5, 0]])
    # Nobody else's generator is touched.
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    rng.normal((3,), 0, "noise", [1])
    assert torch.equal(torch.rand(3), first)


def test_seed_purpose_and_index_each_make_another_draw():
    draws = [
        rng.normal((4,), seed, purpose, [index]) for seed in (0, 1) for purpose in ("a", "b") for index in (0, 1, -1)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 12


def test_double_precision_draws_the_same_numbers():
    single = rng.normal((5,), 0, "noise", [3])
    assert torch.equal(rng.normal((5,), 0, "noise", [3], dtype=torch.float64), single.double())


@pytest.mark.parametrize("purpose", ["flip", "grayscale"])
def test_uniform_draws_are_uniform_and_below_one(purpose):
    draws = rng.uniform(0, purpose, range(20_000))
    assert draws.dtype == torch.float64
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.005
    # Multiples of 2^-53: what is finer rounds, and the largest would round to 1.
    assert torch.equal((draws * 2**53).frac(), torch.zeros(20_000, dtype=torch.float64))


def test_normal_draws_are_normal_and_independent():
    draws = rng.normal((16,), 0, "noise", range(2000))
    assert abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.02
    correlation = torch.corrcoef(draws.T) - torch.eye(16)
    assert correlation.abs().max() < 0.12
    assert abs(torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]) < 0.1
