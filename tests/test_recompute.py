"""Results that are computed again in the backward pass: the same weights after steps, in less memory."""

import collections

import pytest
import torch
from conftest import tiny_alae_trainer, tiny_trainer
from programs import ROOT
from programs import run as program

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.autoencoders.beta_vae import BetaVAE
from letit_dist.config import load_config
from letit_dist.errors import UserError
from letit_dist.registry import RECIPES
from letit_dist.schemas import PretrainConfig
from letit_dist.training.estimate import footprint, images_of
from letit_dist.training.plan import plan_batches

TRAINERS = {"alae": tiny_alae_trainer, "vqvae2": tiny_trainer}


@pytest.mark.parametrize(("kind", "side"), [("alae", 16), ("alae", 4), ("vqvae2", 16)])
def test_the_run_is_the_same(fresh_accelerate, fruit_shards, tmp_path, kind, side):
    """Growing, R1 and layer noise on; in float64, where the sums of a second pass cannot hide."""
    weights = {}
    for asked in (None, side):
        fresh_accelerate()
        trainer = TRAINERS[kind](tmp_path / f"{asked}", fruit_shards, training={"precision": "fp64", "images": 96})
        trainer.recipe.autoencoder.recompute(asked)
        counted = collections.Counter()
        for module in trainer.recipe.modules():
            module.register_forward_hook(lambda *_, counted=counted: counted.update(["call"]))
        assert trainer.train() == 0
        weights[asked] = (trainer.recipe.state_dict(), counted["call"])
    (plain, once), (again, twice) = weights[None], weights[side]
    assert twice > once, "nothing was computed again"
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "overrides", "least"),
    [
        ("configs/pretrain/celebahq256_alae.yaml", ("autoencoder.max_channels=64", "training.microbatch=2"), 0.9),
        ("configs/pretrain/ffhq1024_vqvae2.yaml", ("autoencoder.resolution=256", "training.microbatch=2"), 0.85),
    ],
)
def test_it_takes_less_memory(config, overrides, least):
    found = {}
    for side in (None, 32):
        loaded = load_config(PretrainConfig, config, overrides)
        levels = loaded.recipe.levels(loaded.autoencoder)
        plans = plan_batches(loaded.training, 1, len(levels))

        def build(loaded=loaded, side=side):
            model = build_autoencoder(loaded.autoencoder)
            model.recompute(side)
            return RECIPES.get(loaded.recipe.kind)(loaded.recipe, model, seed=0, precision="fp32")

        rows = images_of(loaded.autoencoder.resolution)
        given = {"rows": rows, "result": lambda recipe: recipe.autoencoder}
        found[side] = footprint(build, loaded, levels[-1:], plans[-1:], **given).passes[0]
    assert found[32] < least * found[None], f"{found[32] / found[None]:.2f}"


def test_kinds_that_cannot_refuse_it(tmp_path):
    with pytest.raises(UserError, match=r"training.recompute_from: beta_vae keeps all its results; leave it out"):
        build_autoencoder(BetaVAE.tiny).recompute(64)
    done = program("launch/pretrain.py", "configs/debug/beta_vae.yaml", "--check", "training.recompute_from=32")
    assert done.code == 2 and "training.recompute_from: beta_vae keeps all" in done.err
    options = ("--check", "autoencoder=x", "data.source=y", "data.target=z", "training.recompute_from=32")
    done = program("launch/train_energy.py", "configs/energy/vqvae2.yaml", *options)
    assert done.code == 2 and "training.recompute_from has no effect on an energy" in done.err


def test_the_benchmark_of_it_compares_equal_iterations_and_shows_the_price(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "eval")
    options = ("--resolution", 64, "--channels", 16, "--batch", 2, "--from", 32, "--repeats", 1, "--device", "cpu")
    done = program("eval/throughput.py", "recompute", *options)
    assert done.code == 0, done.err
    assert "64 pixels, again from 32" in done.out and "float32: weights" in done.out
