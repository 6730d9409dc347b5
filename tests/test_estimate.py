"""What a run will take: against tensors that are really there."""

import pytest
import torch
from conftest import tiny_alae_trainer, tiny_trainer
from programs import run as program

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.config import load_config
from letit_dist.memory import GIB, peak_bytes
from letit_dist.recipes.base import Batch
from letit_dist.registry import RECIPES
from letit_dist.schemas import PretrainConfig
from letit_dist.training.checkpoint import verify
from letit_dist.training.estimate import data_lines, footprint, report
from letit_dist.training.plan import plan_batches

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

    return footprint(build, config, levels, plans, **options)


def test_a_pass_takes_what_it_takes_with_real_tensors(fruit_shards, fresh_accelerate, tmp_path, config):
    plans = plan_batches(config.training, 2)
    found = measured(config, config.recipe.levels(config.autoencoder), plans)
    recipe = tiny_trainer(tmp_path, fruit_shards).recipe
    recipe.to(memory_format=torch.contiguous_format)
    assert found.parameters == sum(p.numel() for p in recipe.parameters())
    assert found.weights == found.average == 4 * sum(t.numel() for t in recipe.state_dict().values())
    assert found.optimizer == 8 * found.parameters
    recipe.eval()
    batch = Batch({"images": torch.rand(2, 3, 32, 32)}, torch.arange(2), 0, 8)

    def run():
        recipe("reconstruct", batch).loss.backward()
        recipe.zero_grad(set_to_none=True)

    assert found.passes[0] == pytest.approx(peak_bytes(run), rel=0.15)


def test_zero_shards_the_optimiser_and_a_larger_microbatch_takes_more(config):
    levels = config.recipe.levels(config.autoencoder)
    whole = measured(config, levels, plan_batches(config.training, 4))
    shared = measured(config, levels, plan_batches(config.training, 4), shards_optimizer=True)
    assert shared.optimizer == -(-whole.optimizer // 4) and shared.checkpoint == whole.checkpoint
    training = config.training.model_copy(update={"microbatch": 8})
    larger = measured(config, levels, plan_batches(training, 1))
    assert 3 * whole.passes[0] < larger.passes[0] < 5 * whole.passes[0]
    assert larger.rank(0) == larger.weights + larger.average + larger.optimizer + larger.passes[0]


def test_every_level_of_alae(fruit_shards, fresh_accelerate, tmp_path):
    trainer = tiny_alae_trainer(tmp_path, fruit_shards)
    recipe = trainer.recipe
    config = PretrainConfig.model_construct(
        autoencoder=recipe.autoencoder.config,
        recipe=recipe.config,
        training=trainer.training,
        intervals=trainer.intervals,
    )
    found = measured(config, recipe.levels, trainer.plans)
    # 8, 8, 4, 4 images at 4, 8, 16, 32 pixels.
    assert len(found.passes) == 4 and found.passes[2] < found.passes[3] and found.passes[0] < found.passes[1]
    lines = report(found, config, recipe.levels, tmp_path / "not/yet/there")
    assert lines[1].startswith("level 0 (4 pixels): ") and lines[4].startswith("level 3 (32 pixels): ")
    assert lines[-1].startswith(f"free at {tmp_path}: ") and "NOT ENOUGH" not in lines[-1]


def test_the_size_of_a_checkpoint(fruit_shards, fresh_accelerate, tmp_path, config):
    trainer = tiny_trainer(tmp_path, fruit_shards)
    trainer.train()
    folder = trainer.store.latest().folder
    written = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    plans = plan_batches(config.training, 1)
    found = measured(config, config.recipe.levels(config.autoencoder), plans)
    # Headers and names are most of so small a file.
    assert verify(folder) is None and found.checkpoint < written < found.checkpoint + 60_000


def test_a_full_disk_and_data_that_are_not_there(fruit_shards, tmp_path, config, monkeypatch):
    levels = config.recipe.levels(config.autoencoder)
    found = measured(config, levels, plan_batches(config.training, 1))
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("letit_dist.training.estimate.shutil.disk_usage", lambda path: usage)
    assert report(found, config, levels, tmp_path)[-1].endswith("(NOT ENOUGH)")
    done = program("launch/pretrain.py", "configs/debug/vqvae2.yaml", "--check", "--run", tmp_path / "run", *TINY)
    assert done.code == 2 and done.errors == [
        f"error: --run {tmp_path / 'run'}: no room for its checkpoints (the last line above)"
    ]
    assert done.out.splitlines()[-1].endswith("(NOT ENOUGH)") and not (tmp_path / "run").exists()

    def data(*folders):
        return config.model_copy(update={"data": config.data.model_copy(update={"train": tuple(map(str, folders))})})

    assert data_lines(data(tmp_path / "nowhere"), 2) == [f"data.train: {tmp_path / 'nowhere'} is not here"]
    folder = fruit_shards / "apple/train"
    (line,) = data_lines(data(folder), 2)
    size = sum(path.stat().st_size for path in folder.glob("*.tar")) / GIB
    assert line.endswith(f"each of 2 ranks reads {size / 2:.3g} GiB an epoch, of all shards")
