"""What the benchmarks of pretraining have in common: both sides on the same images, and the match between them."""

from __future__ import annotations

import argparse
import gc
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from letit_dist.autoencoders.base import AutoencoderConfig, build_autoencoder
from letit_dist.evaluation.benchmark import Match, Side
from letit_dist.recipes.base import Batch, Recipe
from letit_dist.training.setup import seed_weights
from speed.agreement import compile_methods, full_precision, listed, require_agreement
from speed.trainers import idle_trainer, learning_side, ready


@dataclass(frozen=True)
class Setting:
    """What both sides are timed in. `compiler` is a backend of torch.compile for both; with `naive_precision` the naive
    side has its own precision, and no compiler."""

    batch: int
    precision: str = "fp32"
    compiler: str | None = None
    naive_precision: str | None = None
    seed: int = 0

    @classmethod
    def asked(cls, args: argparse.Namespace) -> Setting:
        """That of throughput.py's options."""
        precision, naive = "bf16" if args.bf16 else "fp32", "fp32" if args.plain else None
        return cls(args.batch, precision, args.compile, naive)


class TrainingSides(ABC):
    """One iteration of training an autoencoder, by hand and by the trainer, on the same images."""

    recipe: Any  # each benchmark has its own
    naive: Any

    def __init__(self, config: AutoencoderConfig, run: Path, setting: Setting, **training: Any):
        """`run` is a folder for the trainer, `training` are keys of its configuration."""
        seed_weights(setting.seed)
        self.recipe = self._make_recipe(
            build_autoencoder(config), {"seed": setting.seed, "precision": setting.precision}
        )
        self.trainer = idle_trainer(self.recipe, run, batch=setting.batch, **training)
        # Only now are the weights on their device and in their precision.
        self.naive = self._make_naive()
        self.naive.precision = setting.naive_precision or setting.precision
        images = torch.rand(setting.batch, 3, config.resolution, config.resolution) * 2 - 1
        self.images = images.to(self.trainer.accelerator.device, self.trainer.dtype)
        places = torch.arange(setting.batch)
        self.batch = ready(self.trainer, Batch({"images": self.images}, places, 0, setting.batch))
        if setting.compiler:
            self._compile(setting.compiler, naive=setting.naive_precision is None)

    @abstractmethod
    def _make_recipe(self, network: Any, options: dict[str, Any]) -> Recipe: ...

    @abstractmethod
    def _make_naive(self) -> Any: ...

    @abstractmethod
    def _compile(self, backend: str, *, naive: bool) -> None: ...

    @abstractmethod
    def _run_naive(self) -> object:
        """An iteration as published; the draws are torch's."""

    def _next_batch(self) -> Batch:
        return self.batch

    @property
    def naive_side(self) -> Side:
        """As published."""
        return Side(self._run_naive, self.naive.held, self.naive.forget_gradients)

    @property
    def our_side(self) -> Side:
        """What `Trainer.train` does with a batch, draws included."""
        return learning_side(self.trainer, lambda: self.trainer.learn(self._next_batch()))


class OnePhaseSides(TrainingSides):
    """Of a recipe with one loss, `loss` on the naive side too."""

    _compiled = "loss"

    def _compile(self, backend: str, *, naive: bool) -> None:
        compile_methods(self._compiled_part(), self._compiled, backend=backend)
        if naive:
            compile_methods(self.naive, "loss", backend=backend)

    def _compiled_part(self) -> object:
        return self.recipe

    @abstractmethod
    def _naive_loss(self) -> float:
        """The loss of a naive iteration on the draws that ours will take."""

    @abstractmethod
    def _differences(self) -> dict[str, float]:
        """Of what an iteration changes, by kind."""

    def compare(self, tolerance: float = 1e-5, *, weights: bool = True) -> dict[str, float]:
        """The differences after one iteration of both, of the loss relatively; UserError beyond the tolerance.

        Adam's first step is the gradient's sign: only in float64 is that of a small one more than rounding, so that
        `weights` (and all else that an iteration changes) is for float64.
        """
        with full_precision(self.recipe, self.naive):
            loss = self._naive_loss()
            self.trainer.means.clear()
            self.trainer.learn(self.batch)
        found = {"loss": abs(self.trainer.means.means()["loss"] - loss) / abs(loss)}
        if weights:
            found |= self._differences()
        require_agreement(found, tolerance)
        return found


def training_match(
    sides: type[OnePhaseSides],
    config: AutoencoderConfig,
    args: argparse.Namespace,
    *,
    exact_batch: int,
    target: float | None = None,
) -> Iterator[Match]:
    """An iteration of both in what `args` ask for, after they agreed in float64 on `exact_batch` images."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        exact = sides(config, run, Setting(min(args.batch, exact_batch), "fp64")).compare()
        loss = sides(config, run, Setting(args.batch)).compare(weights=False)["loss"]
        gc.collect()
        pair = sides(config, run, Setting.asked(args))
        agree = f"float64: {listed(exact)}; float32: loss {loss:.0e}"
        name = f"{config.resolution} pixels"
        yield Match(name, pair.naive_side, pair.our_side, partial(str, agree), args.batch, target)
