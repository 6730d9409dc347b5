"""Fixtures and tiny runs that several test files share. Everything is drawn on the fly; nothing is downloaded.

`from conftest import tiny_trainer` gives a real Trainer over the built-in fruit in about 50 ms.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Before torch is imported, here and in the programs that tests start: threads of tiny models only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def fruit_shards(tmp_path_factory) -> Path:
    """A folder with {apple,orange}/{train,test}: the built-in fruit at 32 pixels, 24 and 8 pictures a style.

    Shared by the whole session: read it, never write into it.
    """
    from letit_dist.data.packing import PackOptions, pack
    from letit_dist.data.sources import Request, open_source

    folder = tmp_path_factory.mktemp("fruit")
    for part in open_source("builtin:fruit", Request(resolution=32, count=24, test=8, seed=0)):
        pack(part, folder, PackOptions(resolution=32))
    return folder


@pytest.fixture(scope="session")
def fruit_latents(tmp_path_factory, fruit_shards) -> Path:
    """A folder with {apple,orange}: the training fruit as codes of `tiny_autoencoder()`. Read it only."""
    from letit_dist.data.encoding import EncodeOptions, encode_domain
    from letit_dist.data.reader import ShardDataset

    folder = tmp_path_factory.mktemp("latents")
    for style in ("apple", "orange"):
        encode_domain(
            tiny_autoencoder(), ShardDataset([fruit_shards / style / "train"]), folder / style, EncodeOptions()
        )
    return folder


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The one `programs.Chain` of this session. Read it only."""
    from programs import shared_chain

    return shared_chain(tmp_path_factory)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory) -> Path:
    """Another autoencoder with the shapes of the chain's."""
    from refusals import save_stranger

    return save_stranger(tmp_path_factory.mktemp("stranger") / "autoencoder")


@pytest.fixture
def refused(chain):
    """`refused(program, *arguments)`: its error lines, having seen that it left every file of the chain as it was."""
    from refusals import refusal

    return partial(refusal, chain.root)


@pytest.fixture(scope="session")
def fruit64(tmp_path_factory):
    """{train: [apples, oranges], test, pairs} at 64 pixels, with their factors."""
    from fruit_judge import draw_fruit

    return draw_fruit(tmp_path_factory.mktemp("fruit64"))


@pytest.fixture(scope="session")
def fruit64_images(fruit64):
    """Images of its test and pairs."""
    from letit_dist.data.transforms import to_images
    from letit_dist.evaluation.attributes import read_pixels

    return {name: to_images(read_pixels(fruit64[name])) for name in ("test", "pairs")}


@pytest.fixture(scope="session")
def examples(fruit64):
    """What the judge learns from."""
    from letit_dist.evaluation.attributes import read_examples

    return read_examples(*fruit64["train"])


@pytest.fixture(scope="session")
def judge(examples):
    """A judge of domain and factors that has learnt them."""
    from letit_dist.evaluation.attributes import train_judge

    return train_judge(examples, steps=80, batch=32)


@pytest.fixture(scope="session")
def inception():
    """The first layers of the Inception with random weights."""
    from small_inception import open_small

    return open_small()


@pytest.fixture(scope="session")
def inception_file(inception, tmp_path_factory) -> Path:
    """A file in the published one's format, random inside."""
    from small_inception import save_weights

    return save_weights(inception, tmp_path_factory.mktemp("weights") / "net.pth")


@pytest.fixture
def known_weights(inception_file, tmp_path, monkeypatch) -> Path:
    """A weights folder in which that file is the right one."""
    from small_inception import take_for_published

    return take_for_published(inception_file, tmp_path / "weights", monkeypatch)


@pytest.fixture(scope="module")
def browser():
    """A `browser.Browser`: one for a test file, since it takes a while to start."""
    from browser import open_browser

    with open_browser() as found:
        yield found


@pytest.fixture
def fresh_accelerate():
    """A function that forgets accelerate's singletons: call it before every `Accelerator` of a test.

    It is called before and after the test as well, so that no test sees what another one set up.
    """
    reset_accelerate()
    yield reset_accelerate
    reset_accelerate()


def reset_accelerate() -> None:
    """Forget accelerate's singletons."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def tiny_autoencoder(seed: int = 0, **changes):
    """A VQ-VAE-2 with random weights for 32 pixels: latents (8, 8, 8), 16 codes a level."""
    from letit_dist.autoencoders.vqvae2 import VQVAE2, VQVAE2Config
    from letit_dist.training.setup import seed_weights

    sizes = {"resolution": 32, "channels": 8, "residual_blocks": 1, "residual_channels": 4, "code_dim": 4, "codes": 16}
    seed_weights(seed)
    return VQVAE2(VQVAE2Config(**{**sizes, **changes}))


def start_trainer(recipe, feed, run: Path, training: dict, intervals: dict, **options):
    """A Trainer in a fresh accelerator; 128 images in batches of 8, checkpoints that the intervals do not share."""
    from letit_dist.schemas import IntervalsConfig, TrainingConfig
    from letit_dist.training.setup import create_accelerator
    from letit_dist.training.trainer import Trainer

    reset_accelerate()
    run.mkdir(parents=True, exist_ok=True)
    return Trainer(
        create_accelerator(several_phases=len(recipe.phases) > 1, timeout=training.get("timeout", 600.0)),
        recipe,
        feed,
        run=run,
        training=TrainingConfig(**{"images": 128, "batch": 8, "ema_half_life": 100.0, **training}),
        intervals=IntervalsConfig(**{"report": 40, "samples": 1_000_000, "checkpoint": 48, **intervals}),
        **options,
    )


def tiny_trainer(
    run: Path, shards: Path, *, feed=None, training=None, intervals=None, recipe=None, workers=0, **options
):
    """A Trainer of a VQ-VAE-2 with all that is random switched on: flips, input noise, layer noise, restarts.

    `feed` wraps the real feed (`lambda feed: ...`); `training`, `intervals` and `recipe` are keys to change;
    `options` go to the Trainer.
    """
    from letit_dist.recipes.base import OptimizerConfig
    from letit_dist.recipes.vqvae2 import VQVAE2Recipe, VQVAE2RecipeConfig
    from letit_dist.schemas import ImagesConfig
    from letit_dist.training.feeds import ImageFeed

    training = training or {}
    images = ImageFeed(ImagesConfig(train=(str(shards / "apple" / "train"),), workers=workers, grayscale=0.3), seed=7)
    rates = OptimizerConfig(learning_rate=1e-3, warmup=32, decay=(64, 128))
    config = VQVAE2RecipeConfig(**{"optimizer": rates, "input_noise": 0.1, **(recipe or {})})
    model = VQVAE2Recipe(
        config,
        tiny_autoencoder(noise=True, restart_below=0.5, restart_every=3),
        seed=7,
        precision=training.get("precision", "fp32"),
    )
    return start_trainer(model, feed(images) if feed else images, run, training, intervals or {}, **options)


def tiny_alae_trainer(run: Path, shards: Path, *, feed=None, training=None, intervals=None, recipe=None):
    """A Trainer of an ALAE that grows from 4 to 32 pixels in 128 images, with flips, style mixing and R1."""
    import torch

    from letit_dist.autoencoders.alae import ALAE, ALAEConfig
    from letit_dist.recipes.alae import ALAERecipe, ALAERecipeConfig, GrowthConfig
    from letit_dist.recipes.base import OptimizerConfig
    from letit_dist.schemas import ImagesConfig
    from letit_dist.training.feeds import ImageFeed
    from letit_dist.training.setup import seed_weights

    training = {"batch": (8, 8, 4, 4), **(training or {})}
    images = ImageFeed(ImagesConfig(train=(str(shards / "apple" / "train"),), workers=0), seed=7)
    config = ALAERecipeConfig(
        **{
            "optimizer": OptimizerConfig(learning_rate=(0.002, 0.002, 0.001, 0.001), betas=(0.0, 0.99)),
            # Levels change in mid-batch, and a level fades in over several batches.
            "growth": GrowthConfig(images_per_level=(20, 32, 40, 24)),
            **(recipe or {}),
        }
    )
    seed_weights(7)
    network = ALAE(ALAEConfig(resolution=32, start_channels=4, max_channels=8, latent_dim=8, mapping_layers=2))
    # The constant starts as ones, all positive, so that instance norm cancels the bias after it: a gradient of rounding
    # alone, which Adam would magnify to a difference between two runs.
    with torch.no_grad():
        network.generator.const.normal_()
    model = ALAERecipe(config, network, seed=7, precision=training.get("precision", "fp32"))
    return start_trainer(model, feed(images) if feed else images, run, training, intervals or {})


def tiny_energy_trainer(run: Path, latents: Path, *, feed=None, training=None, intervals=None, recipe=None):
    """A Trainer of a convolutional energy on `fruit_latents`, apples to oranges, with Langevin noise."""
    from letit_dist.data.latents import LatentSet
    from letit_dist.energy.baselines import MeanShift
    from letit_dist.energy.convolutional import ConvEnergyConfig
    from letit_dist.energy.langevin import LangevinConfig
    from letit_dist.energy.models import build_energy
    from letit_dist.evaluation.latents import all_latents
    from letit_dist.recipes.base import OptimizerConfig
    from letit_dist.recipes.latent_energy import LatentEnergyConfig, LatentEnergyRecipe
    from letit_dist.training.feeds import LatentFeed
    from letit_dist.training.setup import seed_weights

    training = training or {}
    autoencoder = tiny_autoencoder()
    sides = [LatentSet.open(latents / style) for style in ("apple", "orange")]
    pairs = LatentFeed(*sides, seed=7)
    config = LatentEnergyConfig(
        **{
            "optimizer": OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.999)),
            "langevin": LangevinConfig(steps=2, step_size=1.0, noise_scale=0.1),
            **(recipe or {}),
        }
    )
    seed_weights(7)
    model = LatentEnergyRecipe(
        config,
        build_energy(ConvEnergyConfig(), autoencoder.latent_shape),
        autoencoder,
        {("apple", "orange"): MeanShift.fit(*(all_latents(autoencoder, side) for side in sides))},
        seed=7,
        precision=training.get("precision", "fp32"),
    )
    return start_trainer(model, feed(pairs) if feed else pairs, run, training, intervals or {})


class SignalFeed:
    """The feed it wraps, which sends this process a real signal in place of its batch number `after`, first."""

    def __init__(self, feed, after: int, number: int):
        self.feed, self.after, self.number = feed, after, number

    def batches(self, *place):
        """The wrapped batches."""
        for count, batch in enumerate(self.feed.batches(*place)):
            if count == self.after:
                os.kill(os.getpid(), self.number)
            yield batch

    def preview(self, count: int):
        """The wrapped preview."""
        return self.feed.preview(count)


def everything(trainer) -> dict:
    """All tensors that make up a run's state, copied: weights, codebooks, their average, optimiser state."""
    from letit_dist.training.optim import state_tensors

    state = {f"model/{name}": value for name, value in trainer.recipe.state_dict().items()}
    if trainer.average:
        state |= {f"average/{name}": value for name, value in trainer.average.module.state_dict().items()}
    state |= state_tensors(trainer.base_optimizer, trainer.recipe)
    return {name: value.detach().clone() for name, value in state.items()}


def assert_equal(found: dict, expected: dict) -> None:
    """The same tensors under the same names, bit for bit."""
    import torch

    assert sorted(found) == sorted(expected)
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different, f"differ: {different}"


def stats_of(run: Path) -> list[dict]:
    """The lines of stats.jsonl without the one number that belongs to the clock."""
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]
