"""Reading by simulation and a step by a model: against a reader, against counts by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import tiny_alae_trainer, tiny_trainer
from programs import ROOT
from programs import run as program
from torch.nn.parallel import DistributedDataParallel

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.config import load_config
from letit_dist.data import order
from letit_dist.data.index import Index
from letit_dist.data.reader import ShardDataset
from letit_dist.data.simulation import Layout, simulate
from letit_dist.errors import UserError
from letit_dist.recipes.base import Batch
from letit_dist.registry import RECIPES
from letit_dist.schemas import PretrainConfig
from letit_dist.training import setup
from letit_dist.training import trainer as trainers
from letit_dist.training.exchange import Exchange
from letit_dist.training.optim import require_gradients
from letit_dist.training.scaling import Cluster, PhaseCost, efficiency, step_costs


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_sample_comes_once_and_every_byte_is_counted(ranks):
    layout = Layout.like(1003, 5000, 7)
    found = simulate(layout, 16, ranks)
    assert (found.twice, found.never, found.images) == (0, 0, 16 // ranks)
    assert found.bytes[0] * ranks <= layout.sizes.sum() <= found.bytes[1] * ranks
    if ranks == 1:
        assert found.bytes == (layout.sizes.sum(),) * 2 and found.shards == (7, 7) and found.straggler == 1
    else:
        assert found.bytes[0] < found.bytes[1] and found.straggler > 1.05


def test_a_reader_that_deals_wrongly_is_seen(monkeypatch):
    """The simulation asks the reader's functions: break them, and samples go missing."""
    monkeypatch.setattr(
        order, "rank_positions", lambda seen, batch, rank, world: np.arange(seen, seen + batch // world)
    )
    found = simulate(Layout.like(96, 100, 3), 8, 4)
    assert found.twice > 20 and found.never > 20


def test_the_layout_is_that_of_the_index(fruit_shards):
    folder = fruit_shards / "apple" / "train"
    layout, dataset = Layout.of(Index.read(folder)), ShardDataset([folder])
    assert len(layout.sizes) == len(dataset)
    for sample, size in enumerate(layout.sizes):
        assert size == dataset.indexes[0].files(sample)["png"][1]


def test_operations_are_those_of_the_layers():
    """A beta-VAE: a layer costs 2 x weights x positions, thrice with the backward pass, and the first one twice."""
    config = load_config(PretrainConfig, "configs/debug/beta_vae.yaml")
    recipe = RECIPES.get("beta_vae")

    def build():
        return recipe(config.recipe, build_autoencoder(config.autoencoder), seed=0, precision="fp32")

    ((cost,),) = step_costs(build, config, config.recipe.levels(config.autoencoder))
    made = build()
    assert cost.gradients == 4 * sum(p.numel() for p in made.parameters())
    counted = []

    def count(module, inputs, output):
        layers = {torch.nn.Conv2d: output, torch.nn.ConvTranspose2d: inputs[0], torch.nn.Linear: output}
        positions = layers[type(module)]
        positions = positions.shape[2:].numel() if positions.ndim == 4 else 1
        counted.append(2 * module.weight.numel() * positions)

    for module in made.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    network = made.autoencoder
    network.decode(network.encode(torch.zeros(1, 3, 64, 64)))
    assert cost.operations == 3 * sum(counted) - counted[0]


def test_what_is_exchanged_is_what_ddp_exchanges(tmp_path, monkeypatch):
    """ALAE, whose phases leave networks out: the bytes of the buckets that the hook of training hands on."""
    small = ("autoencoder.resolution=16", "autoencoder.max_channels=64", "autoencoder.latent_dim=1024")
    small += ("recipe.growth=null", "training.batch=8", "recipe.optimizer.learning_rate=1e-3")
    config = load_config(PretrainConfig, "configs/debug/alae.yaml", small)

    def build():
        return RECIPES.get("alae")(config.recipe, build_autoencoder(config.autoencoder), seed=0, precision="fp32")

    (costs,) = step_costs(build, config, config.recipe.levels(config.autoencoder))
    sent = []
    real = setup.allreduce_hook
    monkeypatch.setattr(
        setup, "allreduce_hook", lambda group, bucket: sent.append(4 * bucket.buffer().numel()) or real(group, bucket)
    )
    recipe = build()
    groups = recipe.parameter_groups()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(recipe, find_unused_parameters=True, broadcast_buffers=False)
        setup.exchange_used_gradients(wrapped)
        batch = Batch({"images": torch.rand(1, 3, 16, 16)}, torch.arange(1), 0, 1)
        for phase, cost in zip(recipe.phases, costs, strict=True):
            require_gradients(groups, recipe.active_groups(phase, 0))
            sent.clear()
            wrapped(phase.name, batch).loss.backward()
            assert (cost.gradients, cost.buckets) == (sum(sent), len(sent)), phase.name
    finally:
        torch.distributed.destroy_process_group()
    everything = 4 * sum(p.numel() for p in recipe.parameters())
    assert costs[0].gradients < 0.7 * everything


@pytest.mark.parametrize(("build", "phases"), [(tiny_trainer, 1), (tiny_alae_trainer, 3)])
def test_what_is_exchanged_beside_gradients_is_what_training_exchanges(
    fruit_shards, fresh_accelerate, tmp_path, monkeypatch, build, phases
):
    """Every exchange of one batch, a phase each."""
    trainer = build(tmp_path, fruit_shards, training={"microbatch": 2})
    recipe = trainer.recipe
    config = PretrainConfig.model_construct(
        autoencoder=recipe.autoencoder.config, recipe=recipe.config, training=trainer.training
    )
    made = copy.deepcopy(recipe)
    costs = step_costs(lambda: made, config, recipe.levels)[0]
    sent = []

    class Sent(Exchange):
        def __init__(self, losses, limit, flags, sums, **more):
            sent.append(8 * (1 + len(flags) + sum(part.numel() for part in sums)))
            super().__init__(losses, limit, flags, sums, **more)

    monkeypatch.setattr(trainers, "Exchange", Sent)
    trainer.learn(next(trainer.feed.batches(0, 8, 0, 1, recipe.levels[0].resolution)))
    assert len(sent) == phases and [cost.sums for cost in costs] == sent
    assert [cost.collectives - cost.buckets for cost in costs] == [1] * phases
    assert len(set(sent)) == min(phases, 2), "the recipe's sums come with the last phase"


def test_a_phase_that_is_not_in_every_batch_counts_less():
    assert PhaseCost("rare", 1e12, 400, buckets=0.5, sums=8, every=4).collectives == 0.75


def test_efficiency_by_hand():
    costs = [PhaseCost("one", 1e12, 380, buckets=2, sums=20), PhaseCost("two", 1e12, 390, buckets=1, sums=10)]
    cluster = Cluster(operations=1e13, inside=100.0, between=10.0, machine=4, latency=0.5)
    alone = efficiency(costs, 8, 1, cluster)
    assert (alone.images, alone.compute, alone.exchange, alone.worst, alone.best) == (8, 1.6, 0.0, 1.0, 1.0)
    four = efficiency(costs, 8, 4, cluster)
    assert four.compute == pytest.approx(0.4) and four.exchange == pytest.approx(2 * 0.75 * 800 / 100 + 5 * 0.5 * 2)
    eight = efficiency(costs, 8, 8, cluster)
    assert eight.exchange == pytest.approx(2 * 7 / 8 * 800 / 10 + 5 * 0.5 * 3)
    assert eight.worst == pytest.approx(eight.compute / (eight.compute + eight.exchange))
    assert math.isclose(eight.best, eight.compute / eight.exchange)


def test_the_program(fruit_shards):
    done = program(
        "eval/scaling.py", "data", "--shards-of", fruit_shards / "apple/train", "--batch", 8, "--ranks", 1, 4
    )
    assert done.code == 0 and done.out.count("\n") == 4 and "| 4     | 2 " in done.out
    step = program("eval/scaling.py", "step", "configs/debug/beta_vae.yaml", "training.batch=6", "--ranks", 2, 4)
    assert step.code == 0 and "the batch does not divide" in step.out.splitlines()[-1]
    assert "100%" not in step.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("data", "--batch", 8), "give --shards-of, or all of"),
        (("data", "--batch", 8, "--samples", 4, "--bytes", 10, "--shards", 5), "4 samples of 10 bytes in 5 shards"),
        (("data", "--batch", 8, "--samples", 40, "--bytes", 10, "--shards", 5, "--ranks", 3), "cannot be dealt"),
        (("data", "--batch", 0, "--samples", 40, "--bytes", 10, "--shards", 5), "--batch must be at least 1"),
        (("step", "configs/debug/beta_vae.yaml", "--inside", 0), "--inside must be above 0"),
    ],
)
def test_bad_options(options, message):
    done = program("eval/scaling.py", *options)
    assert done.code == 2 and message in done.err and len(done.errors) == 1


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="cannot be dealt to 3 ranks"):
        simulate(Layout.like(40, 10, 2), 8, 3)


def test_what_the_document_says_of_two_machines():
    """docs/scaling.md, ALAE at 1024 pixels and at 128, from the rows that stand in its own table."""
    text = (ROOT / "docs/scaling.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    found = {
        int(cells[1]): (float(cells[7]), float(cells[8]))
        for cells in rows
        if len(cells) == 11 and cells[6].strip() == "16" and cells[4].strip() == "463.3"
    }
    compute, exchange = found[1024]
    assert f"{exchange:.0f} ms from 32 pixels on" in text
    assert f"{exchange / compute:.2f} of it at 1024 ({compute:.0f} ms)" in text
    assert f"128 pixels ({found[128][0]:.0f} ms)" in text and found[128][0] < exchange < found[256][0]
