"""Stage 2: learn E(z), low on the target's latents, by maximum likelihood with short chains (eq. 2 and 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from letit_dist import rng
from letit_dist.autoencoders.base import Autoencoder
from letit_dist.config import as_tree
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.langevin import LangevinConfig, LangevinResult, LangevinSampler
from letit_dist.energy.mlp import MLPEnergy
from letit_dist.energy.models import EnergyModel, condition_of
from letit_dist.energy.objective import contrastive_loss
from letit_dist.energy.translate import METHOD
from letit_dist.recipes.base import Batch, Phase, Recipe, RecipeConfig, StepResult
from letit_dist.registry import RECIPES


class LatentEnergyConfig(RecipeConfig):
    """The chain, and what keeps the energy in bounds."""

    kind: Literal["latent_energy"] = "latent_energy"
    langevin: LangevinConfig
    l2: float = Field(0.0, ge=0, description="weight of mean E(target)^2 + mean E(translated)^2; 0 = the paper")
    loss_limit: float = Field(1e4, gt=0, description="a loss beyond this, of either sign, stops the run")


@dataclass(frozen=True)
class Direction:
    """One (source, target) by name, its energy, and ways to go there: functions of source latents (B, *L)."""

    pair: tuple[str, str]
    energy: EnergyModel
    methods: dict[str, Callable[[Tensor], Tensor]]


def _end(sampler: LangevinSampler, energy: EnergyModel, latents: Tensor) -> Tensor:
    return sampler.sample(energy, latents).latents


@RECIPES.register("latent_energy")
class LatentEnergyRecipe(Recipe):
    """loss = mean E(target latents) - mean E(translated source latents), the latter detached.

    Chains start at fresh source latents in every batch (no replay buffer), as in the published code. The
    autoencoder is a frozen companion: it turns codes into latents and draws the pictures.
    """

    config_class: ClassVar[type] = LatentEnergyConfig
    inner_gradients: ClassVar[bool] = True
    phases = (Phase("energy", ("energy",)),)
    divergence_hint = "; or lower recipe.langevin.step_size, or give recipe.l2 a small weight, in a new folder"
    config: LatentEnergyConfig

    def __init__(
        self,
        config: LatentEnergyConfig,
        energy: EnergyModel,
        autoencoder: Autoencoder,
        mean_shifts: Mapping[tuple[str, str], MeanShift],
        *,
        seed: int,
        precision: str,
    ):
        """`mean_shifts` has every (source, target) by name in the order of the feed's pairs: one, or all between
        several domains for an energy with conditions."""
        super().__init__(config, seed=seed, precision=precision)
        self.energy = energy
        self.sampler = LangevinSampler(config.langevin)
        self.loss_limit = config.loss_limit
        self.mean_shifts = dict(mean_shifts)
        self._conditions: list[int] = []  # by pair
        if energy.config.condition_on is not None:
            names = [condition_of(energy.config.condition_on, *pair) for pair in self.mean_shifts]
            self._conditions = [energy.config.conditions.index(name) for name in names]
        self._autoencoder = (self.add_companion(autoencoder),)  # a tuple: not a child, so neither saved nor averaged

    @property
    def autoencoder(self) -> Autoencoder:
        return self._autoencoder[0]

    def latents(self, batch: Batch, side: str) -> Tensor:
        """(B, *L) of one side ("source" or "target") of a batch, from stored latents or codes."""
        fields = {name.partition(".")[2]: v for name, v in batch.data.items() if name.startswith(f"{side}.")}
        if "latent" in fields:
            return fields["latent"]
        with torch.no_grad():
            return self.autoencoder.latents_from_codes(fields)

    def condition(self, batch: Batch) -> Tensor | None:
        """(B,) the condition of every sample; None for an energy without."""
        if not self._conditions:
            return None
        pair = batch.data["pair"]
        return torch.tensor(self._conditions, device=pair.device)[pair]

    def transport(self, start: Tensor, batch: Batch) -> LangevinResult:
        """The chains of a batch; noise, where there is any, belongs to the sample's place in the run."""

        def noise(step: int) -> Tensor:
            return rng.normal(start.shape[1:], self.seed, f"langevin {step}", batch.positions, device=start.device)

        return self.sampler.sample(
            self.energy,
            start,
            noise=noise if self.config.langevin.noise_scale > 0 else None,
            condition=self.condition(batch),
            keep_shift=False,
        )

    def step(self, phase: str, batch: Batch) -> StepResult:
        """`batch.data` holds source.* and target.* fields, as many rows of each, and "pair" for several domains."""
        source = self.latents(batch, "source")
        result = self.transport(source, batch)
        loss, metrics = contrastive_loss(
            self.energy,
            self.latents(batch, "target"),
            result.latents,
            l2=self.config.l2,
            condition=self.condition(batch),
        )
        # Root mean square of each sample first: a root over the microbatch would depend on its size.
        moves = (result.latents - source).flatten(1)
        moved = torch.linalg.vector_norm(moves, dim=1).mean() / moves.shape[1] ** 0.5
        return StepResult(loss, {**metrics, "moved": moved})

    def closed_step(self, phase: str, batch: Batch) -> StepResult | None:
        """The same for a narrow MLP on a CPU, up to rounding: beside its few operations autograd's are many."""
        chain = self.config.langevin
        plain = self.config.l2 == chain.noise_scale == 0 and self.precision != "bf16"
        # Asked before latents are made of codes, which `step` would do again.
        if not (plain and isinstance(self.energy, MLPEnergy) and self.energy.is_narrow):
            return None
        source, target = self.latents(batch, "source"), self.latents(batch, "target")
        numbers = self.energy.closed_step(source, target, chain.step_size, chain.steps)
        if numbers is None:
            return None
        on_target, on_translated, moved = numbers.unbind()
        loss = on_target - on_translated
        metrics = {"energy_target": on_target, "energy_translated": on_translated, "energy_gap": -loss, "moved": moved}
        return StepResult(loss, metrics)

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """Decoded: source latents (so reconstructions), mean shift, the energy's translations, and target latents."""
        source = self.latents(batch, "source")
        rows = {
            "reconstruction": source,
            "mean shift": self._mean_shifted(source, batch.data.get("pair")),
            METHOD: self.transport(source, batch).latents,
            "target reconstructed": self.latents(batch, "target"),
        }
        with torch.no_grad():
            return {name: self.autoencoder.decode(latents) for name, latents in rows.items()}

    def _mean_shifted(self, source: Tensor, pair: Tensor | None) -> Tensor:
        shifts = list(self.mean_shifts.values())
        if pair is None:
            return shifts[0].translate(source)
        return torch.cat([shifts[p].translate(source[i : i + 1]) for i, p in enumerate(pair.tolist())])

    def directions(self) -> Iterator[Direction]:
        """What a result is compared with; chains run without noise."""
        plain = LangevinSampler(self.config.langevin.model_copy(update={"noise_scale": 0.0}))
        names = self.energy.config.conditions
        for number, (pair, shift) in enumerate(self.mean_shifts.items()):
            energy = self.energy.at(names[self._conditions[number]]) if names else self.energy
            methods: dict[str, Callable[[Tensor], Tensor]] = {
                "source": lambda latents: latents,
                "mean shift": shift.translate,
                METHOD: partial(_end, plain, energy),
            }
            yield Direction(pair, energy, methods)

    def save(self, folder: str | Path, **extra: Any) -> None:
        """The energy, with all that a translator must know: whose latents, and which chain."""
        self.energy.save_pretrained(
            folder,
            autoencoder_fingerprint=extra.pop("autoencoder_fingerprint"),
            langevin=as_tree(self.config.langevin),
            **extra,
        )
