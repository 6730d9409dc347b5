"""Gaussian transport and the light bridge against closed forms."""

import math

import pytest
import torch
from gaussian_rows import draw, rows_with

from letit_dist.energy import gaussian, light_bridge
from letit_dist.energy.gaussian import GaussianTransport, covariance
from letit_dist.energy.light_bridge import LightBridge
from letit_dist.errors import UserError


def spd(dims, seed):
    a = draw(dims, dims, seed=seed).double()
    return a @ a.t() + 0.5 * torch.eye(dims).double()


# Gaussian optimal transport


def test_gaussian_transport_makes_the_targets_gaussian_and_is_a_gradient():
    """The optimal map is the only affine one with a symmetric positive matrix that does it."""
    means, covs = draw(2, 4, seed=3), [spd(4, 1), spd(4, 2)]
    x, y = (rows_with(mean, cov, 50, seed) for seed, (mean, cov) in enumerate(zip(means, covs, strict=True)))
    fitted = GaussianTransport.fit(x, y)
    moved = fitted.translate(x)
    torch.testing.assert_close(moved.mean(0), means[1].double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved.t().cov(), covs[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fitted.stretch, fitted.stretch.t(), atol=1e-5, rtol=0)
    assert torch.linalg.eigvalsh(fitted.stretch).min() > 0
    # Bures: the mean squared way is |m|^2 + tr C_s + tr C_t - 2 tr (C_s C_t)^(1/2).
    root = torch.linalg.eigvals(covs[0] @ covs[1]).real.sqrt().sum()
    expected = (means[0] - means[1]).double().square().sum() + covs[0].trace() + covs[1].trace() - 2 * root
    way = (moved - x).square().sum(1)
    # The unbiased covariances want the sum over N - 1, the mean that over N.
    gap = (means[0] - means[1]).double().square().sum()
    assert float((way.sum() - 50 * gap) / 49 + gap) == pytest.approx(float(expected), rel=1e-4)


def test_gaussian_transport_of_maps_is_of_every_entry():
    x = draw(40, 2, 3, 3) * 2 + 1
    y = draw(30, 2, 3, 3, seed=1) * 0.5 - 1
    fitted = GaussianTransport.fit(x.split(7), iter(y.split(9)))
    assert fitted.diagonal and fitted.stretch.shape == (2, 3, 3)
    moved = fitted.translate(x)
    torch.testing.assert_close(moved.mean(0), y.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.std(0), y.std(0), atol=1e-5, rtol=1e-5)
    half = fitted.translate(x, strength=0.5)
    torch.testing.assert_close(half, (x + moved) / 2)
    flat = GaussianTransport.fit(x.flatten(1), y.flatten(1), diagonal=True)
    torch.testing.assert_close(flat.translate(x.flatten(1)), moved.flatten(1))
    assert not GaussianTransport.fit(x.flatten(1), y.flatten(1)).diagonal


def test_entries_that_do_not_vary_go_to_the_targets_mean():
    x, y = draw(50, 3), draw(50, 3, seed=1) + 2
    x[:, 1] = 0.7
    for diagonal in (True, False):
        moved = GaussianTransport.fit(x, y, diagonal=diagonal).translate(x)
        assert moved.isfinite().all()
        torch.testing.assert_close(moved[:, 1].mean(), y[:, 1].mean())


def test_shrinkage_is_ledoit_and_wolfs():
    x = draw(12, 20).double() * torch.linspace(0.5, 2, 20)
    centred = x - x.mean(0)
    plain = centred.t() @ centred / 12
    scale = plain.trace() / 20
    d2 = ((plain - scale * torch.eye(20)) ** 2).sum() / 20
    b2 = sum(((torch.outer(row, row) - plain) ** 2).sum() / 20 for row in centred) / 12**2
    share = min(b2, d2) / d2
    expected = (share * scale * torch.eye(20) + (1 - share) * plain) * 12 / 11
    torch.testing.assert_close(covariance(x), expected)
    assert 0 < share < 1 and torch.linalg.matrix_rank(covariance(x)) == 20
    many = draw(30, 20)
    torch.testing.assert_close(covariance(many), many.double().t().cov())


def test_fewer_samples_than_dimensions_still_move_the_mean():
    x, y = draw(10, 24), draw(9, 24, seed=1) * 2 + 3
    moved = GaussianTransport.fit(x, y).translate(x)
    torch.testing.assert_close(moved.mean(0), y.mean(0), atol=1e-4, rtol=1e-4)
    assert moved.std() > 1.3 * x.std()


def test_gaussian_transport_refuses(monkeypatch):
    cases = (
        (torch.zeros(0, 3), draw(5, 3), "no source latents"),
        ([], draw(5, 3), "no source latents"),
        (draw(5, 3), draw(5, 4), r"source latents are \(3,\), target \(4,\)"),
        (draw(1, 3), draw(5, 3), "2 samples a side, got 1 and 5"),
    )
    for source, target, words in cases:
        with pytest.raises(UserError, match=words):
            GaussianTransport.fit(source, target)
    monkeypatch.setattr(gaussian, "LIMIT", 2)
    with pytest.raises(UserError, match="3 dimensions, a full covariance has at most 2"):
        GaussianTransport.fit(draw(5, 3), draw(5, 3))


# The light bridge


def entropic(source, target, epsilon):
    """(slope, noise variance) of the entropic plan between Gaussians of these variances on one axis: the covariance
    of the two ends is sqrt(s t + e^2 / 4) - e / 2."""
    both = math.sqrt(source * target + epsilon**2 / 4) - epsilon / 2
    return both / source, target - both**2 / source


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_the_bridge_between_gaussians_is_the_closed_form(epsilon):
    """One component is exact: its loss sees nothing but the moments of the samples."""
    variances = torch.tensor([[1.0, 0.5, 2.0], [2.0, 0.5, 0.3]])
    means = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 0.0, 4.0]])
    count = 200
    # The loss knows the mean square over N.
    x, y = (
        rows_with(m, torch.diag(v) * count / (count - 1), count, seed).float()
        for seed, (m, v) in enumerate(zip(means, variances, strict=True))
    )
    bridge = LightBridge.fit(x, y, components=1, epsilon=epsilon, steps=1500, batch=None, learning_rate=0.03)
    absolute = epsilon * bridge.unit**2
    moved = bridge.translate(x)
    slopes, noises = zip(*(entropic(float(s), float(t), absolute) for s, t in variances.t()), strict=True)
    expected = (x - means[0]) * torch.tensor(slopes) + means[1]
    torch.testing.assert_close(moved, expected, atol=5e-3, rtol=5e-3)
    drawn = bridge.translate(x[:1].expand(4000, -1), places=torch.arange(4000))
    torch.testing.assert_close(drawn.var(0), torch.tensor(noises), atol=0.02, rtol=0.08)
    torch.testing.assert_close(drawn.mean(0), expected[0], atol=0.1, rtol=0)


def test_the_bridge_reaches_two_modes_and_keeps_order():
    """From one Gaussian to two far apart: half goes to each, whatever lies left goes left."""
    x = draw(2000, 1)
    y = draw(2000, 1, seed=1) * 0.2 + torch.where(torch.arange(2000) % 2 == 0, 3.0, -3.0)[:, None]
    bridge = LightBridge.fit(x, y, components=6, epsilon=0.02, steps=800)
    moved = bridge.translate(x, places=torch.arange(2000))
    assert 0.4 < float((moved > 0).float().mean()) < 0.6
    assert float(((moved.abs() - 3).abs() < 1).float().mean()) > 0.9
    outer = x[:, 0].abs() > 0.5
    assert float((moved[outer].sign() == x[outer].sign()).float().mean()) > 0.95


def test_the_start_is_near_the_identity_plus_the_mean_shift():
    x, y = draw(100, 8) + 2, draw(100, 8, seed=1) - 5
    bridge = LightBridge.fit(x, y, components=1, epsilon=0.1, steps=1, learning_rate=1e-9)
    torch.testing.assert_close(bridge.translate(x), 0.97 * (x - x.mean(0)) + y.mean(0), atol=1e-4, rtol=1e-4)


def test_potentials_are_their_formulas():
    torch.manual_seed(0)
    log_a, r, log_s = draw(3), draw(3, 4, seed=1), 0.3 * draw(3, 4, seed=2)
    bridge = LightBridge(log_a, r, log_s, epsilon=0.7, centre=torch.zeros(4), unit=1.0)
    y = draw(5, 4, seed=3)
    for row, found in zip(y, bridge.log_potential(y), strict=True):
        parts = [
            log_a[k] + torch.distributions.Normal(r[k], (0.7 * log_s[k].exp()).sqrt()).log_prob(row).sum()
            for k in range(3)
        ]
        torch.testing.assert_close(found, torch.stack(parts).logsumexp(0))
    for row, found in zip(y, bridge.scores(y), strict=True):
        parts = [log_a[k] + (row @ (log_s[k].exp() * row) + 2 * r[k] @ row) / 1.4 for k in range(3)]
        torch.testing.assert_close(found, torch.stack(parts))


def test_draws_belong_to_their_places():
    x = draw(20, 2, 3)
    bridge = LightBridge.fit(x, draw(20, 2, 3, seed=1) + 1, components=3, steps=5)
    places = torch.arange(20)
    whole = bridge.translate(x, places=places)
    torch.testing.assert_close(whole[5:9], bridge.translate(x[5:9], places=places[5:9]))
    assert whole.shape == x.shape and not torch.equal(whole, bridge.translate(x, places=places, seed=1))
    again = LightBridge.fit(x, draw(20, 2, 3, seed=1) + 1, components=3, steps=5)
    assert torch.equal(again.r, bridge.r)


def test_the_bridge_refuses(monkeypatch):
    cases = (
        (draw(1, 3), draw(5, 3), {}, "2 samples a side, got 1 and 5"),
        (draw(5, 3), draw(5, 4), {}, r"latents of \(3,\) and \(4,\)"),
        (torch.ones(5, 3), torch.ones(5, 3), {}, "are the same"),
        (draw(5, 3), draw(5, 3), {"components": 0}, "at least 1"),
        (draw(5, 3), draw(5, 3), {"epsilon": 0.0}, "epsilon positive"),
    )
    for source, target, given, words in cases:
        with pytest.raises(UserError, match=words):
            LightBridge.fit(source, target, **given)
    monkeypatch.setattr(light_bridge, "LIMIT", 2)
    with pytest.raises(UserError, match="3 dimensions, at most 2"):
        LightBridge.fit(draw(5, 3), draw(5, 3))
