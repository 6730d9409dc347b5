"""What a run will take: against tensors that are really there."""

import json

import pytest
import torch
from conftest import ROOT, tiny_alae_trainer, tiny_energy_trainer, tiny_trainer
from PIL import Image
from ranks import start
from torch.nn.parallel import DistributedDataParallel

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.config import load_config
from letit_dist.energy.convolutional import ConvEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.memory import peak_bytes
from letit_dist.recipes.base import Batch
from letit_dist.recipes.latent_energy import LatentEnergyRecipe
from letit_dist.registry import RECIPES
from letit_dist.schemas import PretrainConfig, TrainEnergyConfig
from letit_dist.training.checkpoint import verify
from letit_dist.training.estimate import Sharding, footprint, images_of, latents_of, pictures
from letit_dist.training.plan import plan_batches, timetable
from letit_dist.training.setup import read_deepspeed

TINY = [
    *("autoencoder.resolution=32", "autoencoder.channels=8", "autoencoder.residual_blocks=1", "training.images=64"),
    *("autoencoder.residual_channels=4", "autoencoder.code_dim=4", "autoencoder.codes=16", "training.batch=8"),
    *("autoencoder.noise=true", "recipe.input_noise=0.1", "training.microbatch=2", "training.ema_half_life=100"),
    "recipe.optimizer.decay=null",
]


@pytest.fixture
def config():
    return load_config(PretrainConfig, "configs/debug/vqvae2.yaml", TINY)


def measured(config, levels, plans, **options):
    def build():
        network = build_autoencoder(config.autoencoder)
        return RECIPES.get(config.recipe.kind)(config.recipe, network, seed=0, precision="fp32")

    rows = images_of(config.autoencoder.resolution)
    return footprint(build, config, levels, plans, rows=rows, result=lambda recipe: recipe.autoencoder, **options)


def like(trainer):
    """The configuration of a trainer that was made without one."""
    recipe, common = trainer.recipe, {"training": trainer.training, "intervals": trainer.intervals}
    return PretrainConfig.model_construct(autoencoder=recipe.autoencoder.config, recipe=recipe.config, **common)


def test_a_pass_takes_what_it_takes_with_real_tensors(fruit_shards, fresh_accelerate, tmp_path, config):
    plans = plan_batches(config.training, 2)
    found = measured(config, config.recipe.levels(config.autoencoder), plans)
    recipe = tiny_trainer(tmp_path, fruit_shards).recipe
    recipe.to(memory_format=torch.contiguous_format)
    assert found.parameters == sum(p.numel() for p in recipe.parameters())
    assert found.weights == found.average == 4 * sum(t.numel() for t in recipe.state_dict().values())
    assert found.optimizer == 8 * found.parameters and found.frozen == found.copies == found.host == 0
    recipe.eval()
    batch = Batch({"images": torch.rand(2, 3, 32, 32)}, torch.arange(2), 0, 8)

    def run():
        for _ in range(plans[0].accumulation):
            recipe("reconstruct", batch).loss.backward()
        recipe.zero_grad(set_to_none=True)

    assert found.passes[0] == pytest.approx(peak_bytes(run), rel=0.15)


def test_an_energys_pass_takes_what_it_takes_with_real_tensors(fruit_latents, fresh_accelerate, tmp_path):
    recipe = tiny_energy_trainer(tmp_path, fruit_latents).recipe
    given = ("autoencoder=x", "data.source=y", "data.target=z", "training.batch=16")
    config = load_config(TrainEnergyConfig, "configs/energy/fruit.yaml", given)
    batch = Batch(
        {f"{side}.latent": torch.randn(16, 8, 8, 8) for side in ("source", "target")}, torch.arange(16), 0, 16
    )
    rows, plans = latents_of((8, 8, 8), False), plan_batches(config.training, 1)
    real = peak_bytes(lambda: recipe("energy", batch).loss.backward())
    recipe.zero_grad(set_to_none=True)

    def build():
        energy = build_energy(ConvEnergyConfig(), (8, 8, 8))
        given = {"seed": 7, "precision": "fp32"}
        return LatentEnergyRecipe(recipe.config, energy, recipe.autoencoder, recipe.mean_shifts, **given)

    found = footprint(
        build,
        config,
        recipe.levels,
        plans,
        rows=rows,
        result=lambda recipe: recipe.energy,
    )
    assert found.passes[0] == pytest.approx(real, rel=0.15)
    assert found.frozen == 4 * sum(t.numel() for t in recipe.autoencoder.state_dict().values())
    assert found.export == found.weights == 4 * found.parameters


def test_gradients_on_their_way_are_ddps_buckets(config, tmp_path, fruit_shards, fresh_accelerate):
    found = measured(config, config.recipe.levels(config.autoencoder), plan_batches(config.training, 2))
    alone = measured(config, config.recipe.levels(config.autoencoder), plan_batches(config.training, 1))
    recipe = tiny_trainer(tmp_path, fruit_shards).recipe
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        taken = peak_bytes(lambda: DistributedDataParallel(recipe, init_sync=False))
    finally:
        torch.distributed.destroy_process_group()
    assert found.exchange == pytest.approx(taken, rel=0.1) and alone.exchange == 0


def test_a_larger_microbatch_takes_more(config):
    levels = config.recipe.levels(config.autoencoder)
    whole = measured(config, levels, plan_batches(config.training, 4))
    training = config.training.model_copy(update={"microbatch": 8})
    larger = measured(config, levels, plan_batches(training, 1))
    assert 3 * whole.passes[0] < larger.passes[0] < 5 * whole.passes[0]
    assert larger.rank(0) == larger.weights + larger.average + larger.optimizer + larger.passes[0]
    assert larger.on_gpu(0) == larger.rank(0) + round(0.2 * larger.passes[0])


def zero(name):
    return Sharding.of(read_deepspeed(ROOT / f"launch/deepspeed/{name}.json"))


def test_what_each_stage_of_zero_shards(config):
    training = config.training.model_copy(update={"microbatch": 1})
    levels, plans = config.recipe.levels(config.autoencoder), plan_batches(training, 4)
    found = {name: measured(config, levels, plans, sharding=zero(name)) for name in ("zero1", "zero2_offload", "zero3")}
    ddp = measured(config, levels, plans)
    share = -(-4 * ddp.parameters // 4)
    assert all(one.checkpoint == ddp.checkpoint and one.weights == ddp.weights for one in found.values())
    assert found["zero1"].optimizer == found["zero3"].optimizer == 2 * share < ddp.optimizer
    assert found["zero1"].copies == share and found["zero3"].copies == 2 * share + -(-ddp.weights // 4)
    two, three = measured(config, levels, plans, sharding=zero("ffhq1024")), found["zero3"]
    assert found["zero1"].passes == ddp.passes
    assert ddp.passes[0] - three.passes[0] == pytest.approx(4 * ddp.parameters, rel=0.02), "accumulated from before"
    assert two.passes[0] - three.passes[0] == pytest.approx(share, rel=0.02)
    offloaded = found["zero2_offload"]
    assert (offloaded.optimizer, offloaded.copies, offloaded.host) == (0, 0, 4 * share)
    assert {one.exchange for one in found.values()} == {200_000_000}
    assert zero("ffhq1024").buffers == 2 and Sharding.of({}) == Sharding(0, False, 500_000_000, 0)


@pytest.mark.parametrize("name", ["zero1", *(pytest.param(n, marks=pytest.mark.full) for n in ("ffhq1024", "zero3"))])
def test_a_rank_under_deepspeed_holds_that(name, tmp_path, fruit_shards, config):
    pytest.importorskip("deepspeed")
    text = (ROOT / "launch/accelerate/deepspeed_cpu2.yaml").read_text()
    launch = tmp_path / "launch.yaml"
    launch.write_text(text.replace("zero1.json", f"{name}.json"))
    done = start("tests/held_by_a_rank.py", tmp_path, fruit_shards, launch=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    levels, plans = config.recipe.levels(config.autoencoder), plan_batches(config.training, 2)
    found = measured(config, levels, plans, sharding=zero(name))
    for rank in range(2):
        held = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.optimizer == pytest.approx(held["moments"], abs=4096), held  # shares end in padding
        stored = -(-found.weights // 2) + held["gradients"] if name == "zero3" else 0
        assert found.copies - stored == pytest.approx(held["copies"], abs=4096), held
        assert found.exchange == held["buckets"], held


def test_every_level_of_alae(fruit_shards, fresh_accelerate, tmp_path):
    trainer = tiny_alae_trainer(tmp_path, fruit_shards)
    found = measured(like(trainer), trainer.recipe.levels, trainer.plans)
    # 8, 8, 4, 4 images at 4, 8, 16, 32 pixels.
    assert len(found.passes) == 4 and found.passes[2] < found.passes[3] and found.passes[0] < found.passes[1]


def test_the_timetable_is_what_is_trained(fruit_shards, fresh_accelerate, tmp_path):
    trainer = tiny_alae_trainer(tmp_path, fruit_shards)
    lines = timetable(trainer.recipe.levels, trainer.plans, trainer.training.images)
    real, counts = trainer.learn, {}

    def count(batch):
        side = batch.data["images"].shape[-1]
        steps, images = counts.get(side, (0, 0))
        counts[side] = (steps + 1, images + batch.global_batch)
        real(batch)

    trainer.learn = count
    trainer.train()
    told = [line.rsplit(", ", 2)[1:] for line in lines[:-1]]
    assert told == [[f"{steps} steps", f"{images} images"] for steps, images in counts.values()]
    assert list(counts) == [4, 8, 16, 32] and lines[-1] == f"steps: {sum(c[0] for c in counts.values())}, 128 images"


def test_the_sizes_of_what_is_written(fruit_shards, fresh_accelerate, tmp_path, config):
    trainer = tiny_trainer(tmp_path, fruit_shards, intervals={"samples": 50})
    trainer.train()
    folder = trainer.store.latest().folder
    written = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    plans = plan_batches(config.training, 1)
    found = measured(config, config.recipe.levels(config.autoencoder), plans)
    # Headers and names are most of so small a file.
    assert verify(folder) is None and found.checkpoint < written < found.checkpoint + 60_000
    trainer.trained.save(tmp_path / "export")
    assert found.export < (tmp_path / "export/model.safetensors").stat().st_size < found.export + 20_000
    files = list((tmp_path / "samples").glob("*.png"))
    assert len(files) <= pictures(trainer.intervals, 128) == 4 <= len(files) + 1
    sizes = [Image.open(path).size for path in files]
    assert {3 * width * height for width, height in sizes} == {found.picture}
