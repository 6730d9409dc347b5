"""The sampler against closed forms, and what it must leave untouched."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from letit_dist import rng
from letit_dist.energy import descent
from letit_dist.energy.convolutional import Block, ConvEnergy, ConvEnergyConfig, _pointwise
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler, frozen
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.objective import contrastive_loss


class Quadratic(nn.Module):
    """E = k/2 |z|^2, whose density is N(0, 1/k)."""

    def __init__(self, k: float = 1.0):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, z):
        return self.k / 2 * z.square().flatten(1).sum(1)


def sampler(**settings):
    return LangevinSampler(LangevinConfig(**{"steps": 7, "step_size": 0.3, **settings}))


@pytest.fixture
def start():
    return torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[MLPEnergyConfig(hidden=16, latent_shape=(4, 8, 8)), ConvEnergyConfig(latent_shape=(4, 8, 8))])
def energy(request):
    torch.manual_seed(0)
    return build_energy(request.param, request.param.latent_shape)


@pytest.fixture
def latents():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


# Closed forms


def test_every_point_of_the_path_is_watched(start):
    seen = []
    for steps in (0, 4):
        seen.clear()
        chain = sampler(steps=steps)
        result = chain.sample(Quadratic(), start, keep_path=True, watch=lambda z: seen.append(z.clone()))
        assert torch.equal(torch.stack(seen), result.path)


def by_autograd(mlp, z, length, steps, condition=()):
    for _ in range(steps):
        z = z.detach().requires_grad_()
        z = z - length * torch.autograd.grad(mlp(z, *condition).sum(), z)[0]
    return z.detach()


WAYS = {  # of a chain -> which bounds of `descent` choose it; the latents and steps below do not by themselves
    "in_hidden_units": {"_NARROW": 512, "_WIDE": 1 << 40},
    "by_changes": {"_NARROW": 0, "_WIDE": 0},
    "_inner": {"_NARROW": 0, "_WIDE": 1 << 40},
}


@pytest.mark.parametrize("conditions", [0, 3])
@pytest.mark.parametrize(("share", "length"), [("few", 0.02), ("most", 3.0)])  # of the units change in a step
@pytest.mark.parametrize(("unit", "activation"), [(1.0, "leaky_relu"), (1.7, "leaky_relu"), (1.7, "gelu")])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_down_is_autograds(monkeypatch, way, unit, activation, share, length, conditions):
    torch.manual_seed(0)
    config = MLPEnergyConfig(hidden=20, activation=activation, latent_unit=unit)
    if conditions:
        config = config.model_copy(update={"condition_on": "target"})
    mlp = build_energy(config, (4, 3), conditions=[f"domain {n}" for n in range(conditions)]).double()
    with torch.no_grad():
        mlp.layers[2].weight *= 4
    start = unit * torch.randn(16, 4, 3, dtype=torch.float64)
    length = length * unit**2
    condition = (torch.arange(16) % 3,) if conditions else ()

    taken = []
    for name, value in WAYS[way].items():
        monkeypatch.setattr(descent, name, value)
    for name in WAYS:
        wanted = getattr(descent.OneHiddenLayer, name)
        monkeypatch.setattr(
            descent.OneHiddenLayer, name, lambda *a, f=wanted, name=name: (taken.append(name), f(*a))[1]
        )
    for steps in (0, 1, 2, 9):
        taken.clear()
        found = mlp.descent(*condition)(start, length, steps)
        torch.testing.assert_close(found, by_autograd(mlp, start, length, steps, condition), rtol=1e-11, atol=1e-13)
    assert set(taken) == {"_inner" if (way, activation) == ("by_changes", "gelu") else way}

    if activation == "leaky_relu":
        hidden, later = (
            F.linear(z.flatten(1) / unit, mlp.layers[0].weight, mlp.layers[0].bias)
            for z in (start, by_autograd(mlp, start, length, 1, condition))
        )
        changed = ((hidden > 0) != (later > 0)).any(0).sum()
        assert 0 < changed < 10 if share == "few" else changed > 10  # of 20


def test_a_chain_in_which_no_unit_changes(monkeypatch):
    monkeypatch.setattr(descent, "_NARROW", 0)
    monkeypatch.setattr(descent, "_WIDE", 0)
    mlp = build_energy(MLPEnergyConfig(hidden=20), (4,)).double()
    with torch.no_grad():
        mlp.layers[0].bias += 100
    start = torch.randn(16, 4, dtype=torch.float64)
    torch.testing.assert_close(mlp.descent()(start, 0.1, 5), by_autograd(mlp, start, 0.1, 5), rtol=1e-12, atol=0)


def test_a_chain_leaves_its_start_alone(monkeypatch):
    mlp = build_energy(MLPEnergyConfig(hidden=20), (12,)).double()
    start = torch.randn(16, 12, dtype=torch.float64)
    before = start.clone()
    for bounds in WAYS.values():
        for name, value in bounds.items():
            monkeypatch.setattr(descent, name, value)
        end = sampler(steps=3).sample(mlp, start, keep_shift=False).latents
        assert torch.equal(start, before) and end.data_ptr() != start.data_ptr()
        with torch.inference_mode():
            inside = sampler(steps=3).sample(mlp, start * 1, keep_shift=False).latents
        assert torch.equal(inside, end) and not inside.is_inference()


@pytest.mark.parametrize("unit", [1.0, 1.7])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_mlps_slope_is_that_of_autograd(start, layers, activation, unit):
    torch.manual_seed(0)
    config = MLPEnergyConfig(layers=layers, hidden=16, activation=activation, latent_unit=unit)
    mlp = build_energy(config, start.shape[1:]).double()
    z = start.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mlp(z).sum(), z)
    slope = mlp.slope()(start)
    assert slope.shape == start.shape and not slope.requires_grad
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-15)
    descend = mlp.descent()
    assert (descend is None) == (layers == 0)
    if descend:
        torch.testing.assert_close(descend(start, 0.7, 1), start - 0.7 * expected, rtol=1e-12, atol=1e-15)
        twice = descend(descend(start, 0.7, 1), 0.7, 1)
        torch.testing.assert_close(descend(start, 0.7, 2), twice, rtol=1e-12, atol=1e-15)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert mlp.descent() is None  # whose step would be in bfloat16


@pytest.mark.parametrize("noise_scale", [0.0, 0.3])
@pytest.mark.parametrize("conditions", [(), ("a", "b")])
def test_without_the_shift_the_chain_is_the_same(noise_scale, conditions):
    torch.manual_seed(0)
    config = MLPEnergyConfig(hidden=12, latent_unit=1.7, condition_on="target" if conditions else None)
    mlp = build_energy(config, (2, 3), conditions=conditions).double()
    start = torch.randn(4, 2, 3, dtype=torch.float64)
    condition = torch.tensor([0, 1, 1, 0]) if conditions else None
    draws = torch.randn(9, 4, 2, 3, dtype=torch.float64)
    chain = sampler(noise_scale=noise_scale)
    given = {"noise": (lambda t: draws[t]) if noise_scale else None, "condition": condition, "keep_path": True}
    full, short = (chain.sample(mlp, start, keep_shift=keep, **given) for keep in (True, False))
    assert full.shift.abs().sum() > 0 and short.shift is None
    torch.testing.assert_close(short.path, full.path, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(short.energies, full.energies, rtol=1e-12, atol=1e-14)
    assert not short.latents.requires_grad and not torch.equal(short.latents, start)


def test_quadratic_energy_shrinks_geometrically(start):
    k, step = 1.7, 0.3
    result = sampler(step_size=step).sample(Quadratic(k), start, keep_path=True)
    factor = 1 - step * k / 2
    expected = torch.stack([factor**t * start for t in range(8)])
    torch.testing.assert_close(result.path, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(result.latents, expected[-1], rtol=1e-13, atol=0)
    # Section 4.2: sum over the T steps of |k z(t)|
    torch.testing.assert_close(result.shift, k * expected[:-1].abs().sum(0), rtol=1e-13, atol=0)
    energies = k / 2 * expected.square().flatten(2).sum(2)
    torch.testing.assert_close(result.energies, energies, rtol=1e-13, atol=0)


def test_noise_reaches_the_stationary_variance():
    """z' = (1 - s/2) z + sqrt(s) eps has the variance s / (1 - (1 - s/2)^2) = 1 / (1 - s/4)."""
    step, count = 0.8, 100_000
    zeros = torch.zeros(count, 1, dtype=torch.float64)
    chain = sampler(steps=20, step_size=step, noise_scale=1.0)
    z = chain.sample(Quadratic(), zeros, generator=torch.Generator().manual_seed(0)).latents
    expected = 1 / (1 - step / 4)
    # The variance of N Gaussian draws is known to sqrt(2 / N): four of those, 1.8 %. No noise scale would be 0,
    # a noise of step instead of sqrt(step) 20 % less, and the continuous-time limit 20 % less too.
    assert z.var().item() == pytest.approx(expected, rel=4 * (2 / count) ** 0.5)
    assert abs(z.mean().item()) < 4 * (expected / count) ** 0.5


def test_each_step_is_eq_6_with_the_given_noise(start):
    draws = torch.randn(3, *start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step, scale = 0.3, 0.5
    result = sampler(steps=3, step_size=step, noise_scale=scale).sample(
        Quadratic(), start, noise=lambda t: draws[t], keep_path=True
    )
    z = start
    for t in range(3):
        z = z - step / 2 * z + scale * step**0.5 * draws[t]
        torch.testing.assert_close(result.path[t + 1], z)


def test_no_steps_return_the_start(start):
    result = sampler(steps=0).sample(Quadratic(), start, keep_path=True)
    assert torch.equal(result.latents, start)
    assert torch.equal(result.path, start[None])
    assert torch.equal(result.shift, torch.zeros_like(start))
    assert result.energies.shape == (1, 5)
    result.latents.zero_()
    assert start.abs().sum() > 0


# Units


@pytest.mark.parametrize("unit", [0.05, 7.0])
@pytest.mark.parametrize("noise_scale", [0.0, 0.6])
def test_a_unit_scales_the_whole_chain(energy, latents, unit, noise_scale):
    """With E(z / u), the chain from u z is u times the chain from z of E itself."""
    energy = energy.double()
    scaled = build_energy(energy.config.model_copy(update={"latent_unit": unit}), energy.latent_shape).double()
    scaled.load_state_dict(energy.state_dict())
    start = latents.double()
    draws = torch.randn(7, *start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    chain = sampler(noise_scale=noise_scale)
    noise = (lambda step: draws[step]) if noise_scale else None
    expected = chain.sample(energy, start, noise=noise, keep_path=True)
    found = chain.sample(scaled, unit * start, noise=noise, keep_path=True)
    torch.testing.assert_close(found.path, unit * expected.path)
    torch.testing.assert_close(found.latents, unit * expected.latents)
    torch.testing.assert_close(found.shift, expected.shift)  # already in that unit
    torch.testing.assert_close(found.energies, expected.energies)
    assert (expected.latents - start).abs().max() > 1e-3


@pytest.mark.parametrize("unit", [0.2, 3.0])
def test_quadratic_energy_in_a_unit(start, unit):
    """E = k/2 |z / u|^2 shrinks by the same factor a step whatever u is; the shift is counted in u."""
    k, step = 1.7, 0.3
    energy = Quadratic(k / unit**2)
    energy.unit = unit
    result = sampler(step_size=step).sample(energy, start, keep_path=True)
    factor = 1 - step * k / 2
    expected = torch.stack([factor**t * start for t in range(8)])
    torch.testing.assert_close(result.path, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.shift, k / unit * expected[:-1].abs().sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise_scale", [0.0, 0.5])
def test_a_unit_of_one_changes_no_bit(energy, latents, noise_scale):
    assert energy.unit == 1.0
    step = 0.3
    draws = torch.randn(7, *latents.shape, generator=torch.Generator().manual_seed(3))
    energy.requires_grad_(False)
    z, shift = latents.clone(), torch.zeros_like(latents)
    for t in range(7):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(without_unit(energy, z).sum(), z)
        z = torch.sub(z.detach(), gradient, alpha=step / 2)
        if noise_scale:
            z = z + noise_scale * step**0.5 * draws[t]
        shift += gradient.abs()
    chain = sampler(step_size=step, noise_scale=noise_scale)
    result = chain.sample(energy, latents, noise=(lambda t: draws[t]) if noise_scale else None)
    assert torch.equal(result.latents, z) and torch.equal(result.shift, shift)


def without_unit(energy, latents):
    """The energy with its latents as they are."""
    if not isinstance(energy, ConvEnergy):
        return energy.layers(latents.flatten(1)).squeeze(1)
    stem, blocks, (conv1, conv2, linear) = energy._effective()
    x = _pointwise(latents.contiguous(memory_format=torch.channels_last), *stem)
    for block in blocks:
        x = Block.run(x, *block)
    x = F.silu(F.conv2d(F.silu(F.conv2d(x, *conv1, padding=1)), *conv2))
    return _pointwise(x, *linear).flatten()


# Randomness is explicit


def test_noise_needs_a_source(start):
    noisy = sampler(noise_scale=1.0)
    with pytest.raises(ValueError, match="exactly one"):
        noisy.sample(Quadratic(), start)
    with pytest.raises(ValueError, match="exactly one"):
        noisy.sample(Quadratic(), start, generator=torch.Generator(), noise=lambda t: start)


def test_without_noise_nothing_is_drawn(start):
    generator = torch.Generator().manual_seed(0)
    before, default = generator.get_state(), torch.get_rng_state()
    sampler().sample(Quadratic(), start, generator=generator, noise=pytest.fail)
    sampler(noise_scale=1.0).sample(Quadratic(), start, noise=lambda t: torch.zeros_like(start))
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default)


def test_noise_by_sample_index_does_not_depend_on_the_batch(energy, latents):
    noisy = sampler(noise_scale=0.5)

    def run(indices):
        def noise(step):
            return rng.normal(energy.latent_shape, 0, f"langevin/{step}", indices)

        return noisy.sample(energy, latents[indices], noise=noise).latents

    torch.testing.assert_close(torch.cat([run([0]), run([1, 2])]), run([0, 1, 2]))


# What is left alone


def test_result_is_detached_and_parameters_get_no_gradient(energy, latents):
    next(energy.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in energy.parameters()]
    latents.requires_grad_()
    result = sampler().sample(energy, latents, keep_path=True)
    assert [p.requires_grad for p in energy.parameters()] == flags
    assert all(p.grad is None for p in energy.parameters())
    assert latents.grad is None
    for tensor in (result.latents, result.shift, result.path, result.energies):
        assert not tensor.requires_grad and tensor.grad_fn is None


def test_parameters_are_frozen_during_the_chain(start):
    class Watching(Quadratic):
        def forward(self, z):
            assert not self.k.requires_grad
            return super().forward(z)

    sampler().sample(Watching(), start)


def test_flags_are_restored_after_an_exception(start):
    class Failing(Quadratic):
        def forward(self, z):
            raise RuntimeError("stop")

    energy = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        sampler().sample(energy, start)
    assert energy.k.requires_grad


def test_frozen_keeps_mixed_flags():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with frozen(module):
        assert not module.weight.requires_grad
    assert module.weight.requires_grad and not module.bias.requires_grad


def test_shape_of_the_energy_is_checked(start):
    class Column(Quadratic):
        def forward(self, z):
            return super().forward(z).unsqueeze(1)

    with pytest.raises(AssertionError, match=r"\(5, 1\)"):
        sampler().sample(Column(), start)


# Callers


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(energy, latents, mode):
    expected = sampler().sample(energy, latents, keep_path=True)
    with mode():
        result = sampler().sample(energy, latents * 1, keep_path=True)
    assert torch.equal(result.path, expected.path)
    assert torch.equal(result.shift, expected.shift)


def test_autocast_keeps_the_path_in_float32(energy, latents):
    expected = sampler().sample(energy, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = sampler().sample(energy, latents)
    assert result.latents.dtype == torch.float32
    assert not torch.equal(result.shift, expected.shift)
    torch.testing.assert_close(result.latents - latents, expected.latents - latents, rtol=0.1, atol=0.05)


class Step(nn.Module):
    """As a recipe does it: the chain and the loss inside the wrapped module's forward."""

    def __init__(self, energy):
        super().__init__()
        self.energy = energy

    def forward(self, source, target):
        return contrastive_loss(self.energy, target, sampler().sample(self.energy, source).latents)[0]


def test_inside_a_ddp_forward(energy, latents, tmp_path):
    target = latents.flip(0) + 1
    plain = Step(energy)
    plain(latents, target).backward()
    expected = {name: p.grad.clone() for name, p in energy.named_parameters()}
    assert any(gradient.abs().sum() > 0 for gradient in expected.values())
    energy.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(plain, find_unused_parameters=True)
        for _ in range(2):  # a second time, after the flags have been restored once
            energy.zero_grad()
            wrapped(latents, target).backward()
    finally:
        dist.destroy_process_group()
    for name, parameter in energy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
