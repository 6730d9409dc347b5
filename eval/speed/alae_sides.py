"""Both sides of `throughput.py alae`: the published iteration and the trainer's, from the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from letit_dist.autoencoders.alae import ALAE, ALAEConfig
from letit_dist.errors import UserError
from letit_dist.evaluation.benchmark import Side
from letit_dist.recipes.alae import ALAERecipe, ALAERecipeConfig
from letit_dist.recipes.base import Batch, OptimizerConfig
from speed.agreement import compile_methods, full_precision
from speed.naive_alae import PHASES, NaiveALAE
from speed.training_sides import Setting, TrainingSides

RATE, HALF_LIFE = 1.5e-3, 10_000.0  # as published


@dataclass(frozen=True)
class Tolerance:
    """How far apart results may be: losses relatively, gradients and averages in units of the largest entry of their
    tensor, weights in units of the optimiser's step. Weights whose gradient is below `floor` of the largest one are
    exempt: Adam's first step is the gradient's sign, and the sign of rounding is nobody's."""

    loss: float = 1e-5
    gradient: float = 1e-8
    weight: float = 1e-6
    average: float = 1e-8
    floor: float = 1e-6


class Differences:
    """The largest of each kind so far; a UserError beyond the tolerance."""

    def __init__(self, tolerance: Tolerance):
        self.tolerance = tolerance
        self.found = dict.fromkeys(("loss", "gradient", "weight", "average"), 0.0)
        self.weights = self.exempt = 0

    def note(self, kind: str, difference: float, where: str) -> None:
        """`difference` of `kind` was seen at `where`."""
        limit = getattr(self.tolerance, kind)
        if not difference <= limit:
            raise UserError(f"the two sides disagree: {kind} of {where} by {difference:.2g}, allowed are {limit:.2g}")
        self.found[kind] = max(self.found[kind], difference)


class AlaeSides(TrainingSides):
    """One iteration of training ALAE: three phases, each with a loss and a step of its own."""

    def __init__(self, config: ALAEConfig, run: Path, setting: Setting, *, eps: float = 1e-8):
        self.eps = eps
        super().__init__(config, run, setting, ema_half_life=HALF_LIFE, ema_warmup=0.0)
        self.level = self.recipe.autoencoder.top

    def _make_recipe(self, network: ALAE, options: dict[str, Any]) -> ALAERecipe:
        optimizer = OptimizerConfig(learning_rate=RATE, betas=(0.0, 0.99), eps=self.eps)
        return ALAERecipe(ALAERecipeConfig(optimizer=optimizer), _without_constants(network), **options)

    def _make_naive(self) -> NaiveALAE:
        return NaiveALAE(self.recipe.autoencoder, rate=RATE, half_life=HALF_LIFE, eps=self.eps)

    def _compile(self, backend: str, *, naive: bool) -> None:
        # R1 differentiates inside the loss, which the compiler follows only when told to.
        torch._dynamo.config.trace_autograd_ops = True
        for phase, _ in PHASES:
            compile_methods(self.recipe, f"{phase}_step", backend=backend)
            if naive:
                compile_methods(self.naive, f"{phase}_loss", backend=backend)

    def _run_naive(self) -> None:
        count = len(self.images)
        for _ in self.naive.iteration(self.images, lambda p: self.naive.draw(p, count, self.level), self.level):
            pass

    def _next_batch(self) -> Batch:
        """The same images every time, under the positions of a run: the draws are new."""
        seen = self.trainer.images_seen
        return replace(self.batch, images_seen=seen, positions=self.batch.positions + seen)

    def in_turns(self, every: int) -> tuple[Side, Side]:
        """Both sides over `every` iterations, with R1 in one of ours; `our_side` is changed by it for good."""
        self.recipe.config = self.recipe.config.model_copy(update={"r1_every": every})

        def repeated(side: Side) -> Side:
            def run() -> None:
                for _ in range(every):
                    side.run()

            return replace(side, run=run)

        return repeated(self.naive_side), repeated(self.our_side)

    def compare(self, tolerance: Tolerance) -> Differences:
        """One iteration of both on the same draws, in full precision; a UserError beyond the tolerance.

        Each phase starts from equal weights: the naive side takes ours when they have been compared.
        """
        with full_precision(self.recipe, self.naive):
            return self._compare(Differences(tolerance))

    def _compare(self, differences: Differences) -> Differences:
        naive, weights = self.naive, dict(self.recipe.autoencoder.named_parameters())
        batch = self._next_batch()
        draws = {phase: self.recipe.draws(phase, batch, self.level) for phase, _ in PHASES}
        theirs = naive.iteration(self.images, draws.get, self.level)

        def compare_phase(phase: str) -> None:
            expected_phase, loss = next(theirs)
            assert phase == expected_phase
            found, expected = self.trainer.means.means()[f"loss_{phase}"], float(loss)
            differences.note("loss", abs(found - expected) / abs(expected), phase)
            for name, plain in naive.weights.items():
                moved = plain.grad is not None and name.startswith(dict(PHASES)[phase])
                self._compare_weight(differences, weights[name], plain, name, phase, moved)

        self.trainer.means.clear()
        self.trainer.learn(batch, compare_phase)
        if next(theirs, None) is not None:
            raise UserError("the two sides disagree: the naive one has more phases")
        averaged = self.trainer.average and self.trainer.average.module
        assert isinstance(averaged, ALAERecipe)
        averages: dict[str, Tensor] = dict(averaged.autoencoder.named_parameters())
        averages["w_mean"] = self.recipe.autoencoder.w_mean
        for name, plain in {**naive.averages, "w_mean": naive.w_mean}.items():
            differences.note("average", _apart(averages[name], plain) / float(plain.abs().max()), name)
        return differences

    @torch.no_grad()
    def _compare_weight(
        self, differences: Differences, ours: Tensor, plain: Tensor, name: str, phase: str, moved: bool
    ) -> None:
        where = f"{name} after {phase}"
        if not moved:
            if not torch.equal(ours, plain):
                raise UserError(f"the two sides disagree: {where}, which the naive one does not move")
            return
        if ours.grad is None:
            raise UserError(f"the two sides disagree: only the naive one moves {where}")
        assert plain.grad is not None
        sizes = plain.grad.abs()
        if sizes.max() > 0:
            differences.note("gradient", _apart(ours.grad, plain.grad) / float(sizes.max()), where)
        compared = (sizes >= differences.tolerance.floor * sizes.max()) | (sizes == 0)
        differences.weights += compared.numel()
        differences.exempt += compared.numel() - int(compared.sum())
        step = RATE * self.naive.coefficients[name]
        differences.note("weight", _apart(ours[compared], plain[compared]) / step, where)
        plain.copy_(ours)


def _without_constants(network: ALAE) -> ALAE:
    """Parameters that start as zeros or ones are drawn: zeros hide differences, and while the constant is all ones,
    instance norm cancels the bias after it, whose gradient is then rounding alone."""
    with torch.no_grad():
        for parameter in network.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.normal_(std=1.0 if parameter is network.generator.const else 0.1)
        network.w_mean.normal_()
    return network


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max()) if found.numel() else 0.0
