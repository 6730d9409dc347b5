"""Two networks in phases that have their turns in every second and every third batch: RUN SHARDS PRECISION MICROBATCH.

Batches 1, 5, 7, 11 ... have no phase at all. To be launched, or called by other programs of tests.
"""

import sys
from pathlib import Path

import torch
from conftest import start_trainer
from torch import nn

from letit_dist import rng
from letit_dist.recipes.base import OptimizerConfig, Phase, Recipe, RecipeConfig, StepResult
from letit_dist.schemas import ImagesConfig
from letit_dist.training.feeds import ImageFeed
from letit_dist.training.setup import seed_weights


class TwoPhases(Recipe):
    """Both networks enter both losses, with noise of the sample; `moved` is a running mean over the samples of a batch,
    of those alone in which the second phase had its turn."""

    phases = (Phase("first", ("a",), every=2), Phase("second", ("b",), every=3))

    def __init__(self, precision: str):
        config = RecipeConfig(kind="two_phases", optimizer=OptimizerConfig(learning_rate=0.05))
        super().__init__(config, seed=7, precision=precision)
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)
        self.register_buffer("moved", torch.zeros(8))
        self.collected: torch.Tensor | None = None

    def step(self, phase, batch):
        images = batch.data["images"]
        place = {"device": images.device, "dtype": images.dtype}
        noise = rng.normal((8,), self.seed, phase, batch.positions, drawn_on="cpu", **place)
        hidden = self.a(images.mean((2, 3))).sin()
        if phase == "second":
            both = torch.cat([hidden.new_full((1,), len(hidden)), hidden.detach().sum(0)])
            self.collected = both if self.collected is None else self.collected + both
        loss = (self.b(hidden + 0.1 * noise) - float(phase == "second")).square().mean()
        return StepResult(loss, {f"hidden_{phase}": hidden.detach().mean()})

    def sums(self):
        return [] if self.collected is None else [self.collected]

    def after_batch(self, batch):
        if self.collected is not None:
            self.moved.lerp_(self.collected[1:] / self.collected[0], 0.1)
        self.discard()
        return {}

    def discard(self):
        self.collected = None

    def samples(self, batch):
        return {"image": batch.data["images"]}

    def save(self, folder, **extra):
        raise NotImplementedError


def two_phases_trainer(run: Path, shards: Path, *, feed=None, training=None, intervals=None):
    """A Trainer of it over the apples: 16 batches of 8."""
    images = ImageFeed(ImagesConfig(train=(str(shards / "apple" / "train"),), workers=0), seed=7)
    seed_weights(7)
    model = TwoPhases((training or {}).get("precision", "fp32"))
    return start_trainer(model, feed(images) if feed else images, run, training or {}, intervals or {})


if __name__ == "__main__":
    run, shards, precision, microbatch = sys.argv[1:]
    trainer = two_phases_trainer(
        Path(run), Path(shards), training={"precision": precision, "microbatch": int(microbatch)}
    )
    code = trainer.train()
    trainer.accelerator.end_training()
    sys.exit(code)
