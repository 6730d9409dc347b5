"""The kernels of a narrow energy's training step, against autograd; and when the trainer takes them."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_autoencoder
from torch import nn

from letit_dist.compiled import has_numba
from letit_dist.energy import mlp
from letit_dist.energy.langevin import LangevinConfig
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.errors import UserError
from letit_dist.recipes.base import Batch, OptimizerConfig
from letit_dist.recipes.latent_energy import LatentEnergyConfig, LatentEnergyRecipe

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
from speed.trainers import idle_trainer

pytestmark = pytest.mark.skipif(not has_numba(), reason="needs numba: pip install letit_dist[cpu]")


def narrow(hidden=24, shape=(8,), seed=0, chain=None, precision="fp64", l2=0.0, loud=3.0, **energy):
    """A recipe whose chains change the signs of many units."""
    torch.manual_seed(seed)
    model = build_energy(MLPEnergyConfig(hidden=hidden, **energy), shape)
    with torch.no_grad():
        model._linear[-1].weight.mul_(loud)
    config = LatentEnergyConfig(
        langevin=LangevinConfig(**{"steps": 9, "step_size": 0.4, **(chain or {})}),
        l2=l2,
        loss_limit=1e5,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    recipe = LatentEnergyRecipe(config, model, tiny_autoencoder(), {}, seed=0, precision=precision)
    return recipe.to(torch.float64 if precision == "fp64" else torch.float32)


def pairs(recipe, rows=6, seed=1, start=0):
    draws = torch.Generator().manual_seed(seed)
    shape = (rows, *recipe.energy.latent_shape)
    dtype = next(recipe.parameters()).dtype
    source, target = (torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype) for _ in range(2))
    data = {"source.latent": source - 1, "target.latent": target + 1, "pair": torch.zeros(rows, dtype=torch.long)}
    return Batch(data, torch.arange(start, start + rows), start, rows)


@pytest.mark.parametrize(
    "case",
    [
        {"rows": 6},
        {"rows": 1},
        {"rows": 8, "hidden": 64, "shape": (32,)},
        {"rows": 13, "shape": (2, 3, 4), "latent_unit": 0.3},
        {"rows": 5, "chain": {"steps": 1}},
        {"rows": 5, "chain": {"steps": 2, "step_size": 3.0}},
        {"rows": 6, "precision": "fp32"},
    ],
    ids=str,
)
def test_the_closed_step_is_the_step_and_its_backward_pass(case):
    recipe = narrow(**{name: value for name, value in case.items() if name != "rows"})
    batch = pairs(recipe, case["rows"])
    expected = recipe.step("energy", batch)
    gradients = torch.autograd.grad(expected.loss, list(recipe.energy.parameters()))
    found = recipe.closed_step("energy", batch)
    close = {"rtol": 1e-4, "atol": 1e-6} if case.get("precision") == "fp32" else {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(found.loss, expected.loss.detach(), **close)
    assert set(found.metrics) == set(expected.metrics)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, **close)
    for parameter, gradient in zip(recipe.energy.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **close)


def test_the_chains_above_bend():
    recipe = narrow()
    batch = pairs(recipe, 64)
    source = batch.data["source.latent"]
    first, ended = recipe.energy._linear[0], recipe.transport(source, batch).latents
    changed = (first(source) > 0) != (first(ended) > 0)
    assert 0.1 < changed.double().mean() < 0.9


@pytest.mark.parametrize(
    ("case", "there"),
    [
        ({}, True),
        ({"precision": "fp32"}, True),
        ({"precision": "bf16"}, False),
        ({"l2": 0.1}, False),
        ({"chain": {"noise_scale": 0.1}}, False),
        ({"chain": {"steps": 0}}, False),
        ({"layers": 2}, False),
        ({"layers": 0}, False),
        ({"activation": "gelu"}, False),
        ({"hidden": 22}, False),
        ({"shape": (7,)}, False),
        ({"hidden": 260}, False),
        ({"hidden": 256, "shape": (68,)}, False),
        ({"conditions": ["orange"], "condition_on": "target"}, False),
        ({"rows": 512}, True),
        ({"rows": 513}, False),
    ],
    ids=str,
)
def test_where_there_are_kernels(case, there):
    recipe = narrow(**{name: value for name, value in case.items() if name != "rows"})
    batch = pairs(recipe, case.get("rows", 6))
    assert (recipe.closed_step("energy", batch) is not None) == there


def test_none_for_two_precisions():
    energy = narrow(precision="fp32").energy
    source, target = torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.float64)
    assert energy.closed_step(source, source, 0.1, 2) is not None
    assert energy.closed_step(source, target, 0.1, 2) is None is energy.closed_step(target, target, 0.1, 2)


def test_none_without_numba_and_for_other_devices(monkeypatch):
    recipe = narrow().to("meta")
    assert recipe.energy.closed_step(*torch.zeros(2, 3, 8, device="meta", dtype=torch.float64), 0.1, 2) is None
    monkeypatch.setattr(mlp, "has_numba", lambda: False)
    recipe = narrow()
    assert recipe.closed_step("energy", pairs(recipe)) is None


class Wrapped(nn.Module):
    """As DDP and DeepSpeed stand between the trainer and the recipe, to hear of gradients."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *given):
        return self.module(*given)


@pytest.mark.parametrize("way", ["whole", "in two microbatches", "wrapped"])
def test_a_run_with_kernels_is_the_run_without(tmp_path, monkeypatch, way):
    weights = {}
    taken = []
    closed_step = LatentEnergyRecipe.closed_step

    def watched(self, phase, batch):
        taken.append(kernels)
        return closed_step(self, phase, batch) if kernels else None

    monkeypatch.setattr(LatentEnergyRecipe, "closed_step", watched)
    for kernels in (True, False):
        recipe = narrow(precision="fp64")
        microbatch = 4 if way == "in two microbatches" else None
        keys = {"batch": 8, "microbatch": microbatch, "ema_half_life": 40.0, "precision": "fp64"}
        trainer = idle_trainer(recipe, tmp_path / str(kernels), **keys)
        if way == "wrapped":
            trainer.model = Wrapped(recipe)
        for number in range(20):
            trainer.learn(pairs(recipe, 8, seed=number, start=8 * number))
        weights[kernels] = [*recipe.state_dict().values(), *trainer.average.module.state_dict().values()]
        weights[kernels].append(torch.tensor(list(trainer.means.means().values())))
    # Sums over microbatches and ranks are made where autograd finds gradients.
    assert taken == ([True] * 20 + [False] * 20 if way == "whole" else [])
    for ours, theirs in zip(*weights.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_loss_that_is_refused_leaves_no_gradient_and_no_weight_moved(tmp_path, side):
    recipe = narrow()
    trainer = idle_trainer(recipe, tmp_path, batch=8, precision="fp64")
    batch = pairs(recipe, 8)
    batch.data[f"{side}.latent"][3, 2] = float("nan")
    assert not recipe.closed_step("energy", batch).loss.isfinite()
    before = [parameter.clone() for parameter in recipe.parameters()]
    with pytest.raises(UserError, match="the loss of phase 'energy' is not finite"):
        trainer.learn(batch)
    for parameter, old in zip(recipe.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None
