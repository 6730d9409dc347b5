"""`throughput.py save`: what a checkpoint and a resume take of a run of some configuration."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.recipes.base import Batch, Recipe
from letit_dist.registry import RECIPES
from letit_dist.schemas import PretrainConfig
from letit_dist.training.setup import seed_weights
from letit_dist.training.trainer import Trainer
from speed.trainers import idle_trainer, ready


@dataclass(frozen=True)
class SaveCost:
    """Seconds, and bytes of one checkpoint."""

    image: float  # of training, an image
    held: float  # training stands still while it saves
    behind: float  # the writing goes on behind it
    resumed: float  # finding, verifying and loading the newest checkpoint
    bytes: int

    def share(self, interval: int) -> float:
        """Of the time between two checkpoints, `interval` images apart, that training stands still."""
        return self.held / (self.held + interval * self.image)


def save_cost(config: PretrainConfig, run: Path, *, count: int, repeats: int) -> SaveCost:
    """Medians over `repeats`, with all state of the last level, on batches of `count` random images."""
    levels = config.recipe.levels(config.autoencoder)
    changes: dict[str, Any] = {"batch": count, "microbatch": None}
    if not torch.cuda.is_available() and config.training.precision == "bf16":
        changes["precision"] = "fp32"  # most processors crawl in bfloat16, and a checkpoint is the same
    training = config.training.model_copy(update=changes)
    seed_weights(training.seed)

    recipe_class: Callable[..., Recipe] = RECIPES.get(config.recipe.kind)

    def trainer() -> Trainer:
        recipe = recipe_class(
            config.recipe, build_autoencoder(config.autoencoder), seed=training.seed, precision=training.precision
        )
        made = idle_trainer(recipe, run, **dict(training))
        made.images_seen, made.level = levels[-1].start, len(levels) - 1
        return made

    made = trainer()
    side = levels[-1].resolution or config.autoencoder.resolution
    images = torch.rand(count, 3, side, side) * 2 - 1
    steps, held, behind, resumed = [], [], [], []
    for _ in range(repeats + 1):
        batch = ready(made, Batch({"images": images}, torch.arange(count), made.images_seen, count))
        steps.append(_seconds(partial(made.learn, batch)))
        held.append(_seconds(lambda: made.save(background=True)))
        behind.append(_seconds(made.store.wait))
    newest = max(made.store.folder.glob("images-*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    for _ in range(repeats):
        with redirect_stdout(io.StringIO()):
            resumed.append(_seconds(trainer().resume))
    # The first step starts everything.
    image, stop, writing = (statistics.median(values[1:]) for values in (steps, held, behind))
    return SaveCost(image / count, stop, writing, statistics.median(resumed), size)


def _seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
