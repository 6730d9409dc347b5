"""A trainer that stands still, for benchmarks that take its iterations one by one; and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from letit_dist.evaluation.benchmark import Side
from letit_dist.recipes.base import Batch, Recipe
from letit_dist.schemas import IntervalsConfig, TrainingConfig
from letit_dist.training.setup import create_accelerator
from letit_dist.training.trainer import Trainer


class _NoFeed:
    """The caller has the batches."""

    def batches(self, *_: object, **__: object) -> Iterator[Batch]:
        raise AssertionError("this trainer stands still")

    def preview(self, count: int) -> Batch:
        raise AssertionError("this trainer stands still")


def idle_trainer(recipe: Recipe, run: Path, **training: Any) -> Trainer:
    """A trainer of `recipe` in the folder `run`, whose batches the caller gives to `Trainer.learn`.

    `training` are keys of TrainingConfig; seed and precision are the recipe's.
    """
    keys = {"images": 1, **training, "seed": recipe.seed, "precision": recipe.precision}
    return Trainer(
        create_accelerator(several_phases=len(recipe.phases) > 1),
        recipe,
        _NoFeed(),
        run=run,
        training=TrainingConfig(**keys),
        intervals=IntervalsConfig(report=1, samples=1, checkpoint=1),
    )


def ready(trainer: Trainer, batch: Batch) -> Batch:
    """The batch as the training loop has it before it learns: moved, and in the run's precision and format."""
    return batch.to(trainer.accelerator.device, trainer.dtype, trainer.memory_format)


def held(trainer: Trainer) -> Iterator[Tensor]:
    """What lives between two iterations, but for the gradients, which the next one replaces."""
    for module in (trainer.recipe, *trainer.recipe.companions):
        yield from module.state_dict().values()
    if trainer.average:
        yield from trainer.average.module.state_dict().values()
    yield from trainer.state.optimizer_tensors().values()


def learning_side(trainer: Trainer, run: Callable[[], object]) -> Side:
    """Our side of a match: `run` takes an iteration of `trainer`."""
    return Side(run, lambda: held(trainer), lambda: trainer.base_optimizer.zero_grad(set_to_none=True))
