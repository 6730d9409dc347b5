"""Stage 1 for ALAE (2004.04467): adversarial in image space, reciprocal in latent space, grown level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from letit_dist import rng, schedule
from letit_dist.autoencoders.alae import ALAE, ALAEConfig
from letit_dist.autoencoders.base import AutoencoderConfig
from letit_dist.autoencoders.style_layers import double, halve
from letit_dist.config import OneOrMany, StrictConfig, by_level
from letit_dist.errors import UserError
from letit_dist.losses.adversarial import discriminator_loss, generator_loss, gradient_penalty
from letit_dist.recipes.base import Batch, Level, ParameterGroup, Phase, Recipe, RecipeConfig, StepResult
from letit_dist.registry import RECIPES
from letit_dist.schemas import TrainingConfig


class GrowthConfig(StrictConfig):
    """Progressive growing from 4 pixels; the first half of each level fades it in."""

    images_per_level: OneOrMany[PositiveInt] = Field(
        description="images before the next level begins; a list has one for each level"
    )


class ALAERecipeConfig(RecipeConfig):
    """The defaults are the published ones. Its optimiser is Adam with betas (0, 0.99)."""

    kind: Literal["alae"] = "alae"
    growth: GrowthConfig | None = Field(None, description="null = the full resolution from the start")
    r1_gamma: float = Field(10.0, ge=0, description="weight of R1 / 2; 0 = without")
    r1_every: int = Field(
        1,
        ge=1,
        description="batches between two evaluations of R1, whose weight grows in step (1912.04958, appendix B)",
    )
    style_mixing: float = Field(0.9, ge=0, le=1, description="probability of mixing two w in a batch")
    w_mean_beta: float = Field(0.995, ge=0, lt=1, description="of the running mean of w, per generated batch")

    @model_validator(mode="after")
    def _check(self) -> ALAERecipeConfig:
        if self.r1_every > 1 and self.r1_gamma == 0:
            raise ValueError("r1_every has no effect with r1_gamma 0: remove it")
        return self

    def levels(self, autoencoder: AutoencoderConfig | None) -> list[Level]:
        """4, 8, 16 ... pixels if the network grows."""
        if self.growth is None:
            return [Level()]
        assert isinstance(autoencoder, ALAEConfig)  # `problems` tells of any other
        starts = schedule.level_starts(self.durations(autoencoder))
        return [Level(start, 4 << level) for level, start in enumerate(starts)]

    def durations(self, autoencoder: ALAEConfig) -> list[int]:
        """Images of each level; the last one lasts until the end of the run."""
        assert self.growth is not None
        return by_level(self.growth.images_per_level, autoencoder.levels, "recipe.growth.images_per_level")

    def problems(self, autoencoder: AutoencoderConfig | None, training: TrainingConfig) -> list[str]:
        """Also: schedules shorter than the levels, and runs that end before the network is grown."""
        if not isinstance(autoencoder, ALAEConfig):
            found = None if autoencoder is None else autoencoder.kind
            return [f"recipe.kind: alae trains an ALAE, autoencoder.kind is {found!r}"]
        if self.growth is None:
            return super().problems(autoencoder, training)
        try:
            durations = self.durations(autoencoder)
        except UserError as error:
            return [str(error)]
        lines = super().problems(autoencoder, training)
        grown = schedule.level_starts(durations)[-1] + durations[-1] // 2
        if training.images < grown:
            level = schedule.level_at(durations, training.images)
            lines.append(
                f"training.images: {training.images} end at level {level} ({4 << level} pixels), the network is grown "
                f"to {autoencoder.resolution} pixels after {grown}: lower recipe.growth.images_per_level or raise it"
            )
        return lines


@dataclass(frozen=True)
class Draws:
    """The randomness of one generated batch: latents, style mixing, layer noise."""

    z: Tensor  # (B, latent_dim)
    noise: list[Tensor]  # (B, 1, h, h) each, the first (1, 1, 4, 4)
    z_mixed: Tensor | None = None  # (B, latent_dim), of the style inputs from `cut` on
    cut: int = 0


@RECIPES.register("alae")
class ALAERecipe(Recipe):
    """Three losses a batch, in the published order, each with its own optimiser step.

    Where this departs from the published code: the critic takes no part in the reciprocity phase (under the torch
    of 2020 its second moments decayed there on zero gradients), nor do layers outside the current level; the mean of
    w is that of the global batch, and moves once both generated batches are known.
    """

    config_class: ClassVar[type] = ALAERecipeConfig
    inner_gradients: ClassVar[bool] = True
    phases = (
        Phase("discriminator", ("encoder", "critic")),
        Phase("generator", ("generator", "mapping")),
        Phase("reciprocity", ("encoder", "generator", "mapping")),
    )
    config: ALAERecipeConfig

    def __init__(self, config: ALAERecipeConfig, autoencoder: ALAE, *, seed: int, precision: str):
        if not isinstance(autoencoder, ALAE):
            raise UserError(f"recipe.kind: alae trains an ALAE, autoencoder.kind is {autoencoder.config.kind!r}")
        super().__init__(config, seed=seed, precision=precision)
        self.autoencoder = autoencoder
        self._durations = config.durations(autoencoder.config) if config.growth else None
        self._levels = config.levels(autoencoder.config)
        self._w_sums: dict[str, Tensor] = {}  # by phase: (1 + latent_dim,), count and sum of w

    # ---------------------------------------------------------------- growing

    @property
    def levels(self) -> list[Level]:
        return self._levels

    def place_at(self, images_seen: int) -> tuple[int, float]:
        """The network's level, and how far it has faded in."""
        if self._durations is None:
            return self.autoencoder.top, 1.0
        return self.level_at(images_seen), schedule.blend_at(self._durations, images_seen)

    def parameter_groups(self) -> list[ParameterGroup]:
        """By part and level, since only what takes part may learn; and by rate (see `Equalized`)."""
        found = []
        for name, parameters in self._parts():
            for rate, same in groupby(sorted(parameters, key=lambda item: item[0]), key=lambda item: item[0]):
                found.append(ParameterGroup(name, tuple(parameter for _, parameter in same), rate))
        return found

    def _parts(self) -> Iterator[tuple[str, list[tuple[float, nn.Parameter]]]]:
        network = self.autoencoder
        yield "critic", _with_rates(network.critic)
        yield "mapping", _with_rates(network.mapping)
        for level in range(network.config.levels):
            yield f"encoder.blocks.{level}", _with_rates(network.encoder.blocks[level])
            yield f"encoder.rgb.{level}", _with_rates(network.encoder.from_rgb[level])
            const = [(1.0, network.generator.const)] if level == 0 else []
            yield f"generator.blocks.{level}", const + _with_rates(network.generator.blocks[level])
            yield f"generator.rgb.{level}", _with_rates(network.generator.to_rgb[level])

    def active_groups(self, phase: Phase, images_seen: int) -> set[str]:
        level, blend = self.place_at(images_seen)
        names = set(phase.modules)
        for network in names & {"encoder", "generator"}:
            names |= {f"{network}.blocks.{index}" for index in range(level + 1)}
            names |= {f"{network}.rgb.{index}" for index in ([level] if blend == 1 else [level - 1, level])}
        return names

    # ---------------------------------------------------------------- one batch

    def draws(self, phase: str, batch: Batch, level: int) -> Draws:
        """The draws of one phase, the same for any number of ranks and any microbatch."""
        device, dtype = batch.data["images"].device, batch.data["images"].dtype

        def normal(
            shape: Sequence[int], purpose: str, at: Tensor | list[int], drawn_on: torch.device | str = "cpu"
        ) -> Tensor:
            return rng.normal(shape, self.seed, f"{phase} {purpose}", at, device=device, dtype=dtype, drawn_on=drawn_on)

        shared, latent = [batch.images_seen], self.autoencoder.latent_shape
        shapes = self.autoencoder.noise_shapes(level)
        # The published code adds the first noise to the constant before the batch is there, so the batch shares it.
        noise = [normal(shapes[0], "shared noise", shared)]
        sizes = [shape[-1] ** 2 for shape in shapes[1:]]
        # One draw a sample, where it is needed: at 1024 pixels these are 2.8 million numbers.
        flat = normal((sum(sizes),), "noise", batch.positions, device)
        noise += [part.unflatten(1, shape) for part, shape in zip(flat.split(sizes, 1), shapes[1:], strict=True)]
        z = normal(latent, "z", batch.positions)
        if phase == "reciprocity" or rng.uniform(self.seed, f"{phase} mixing", shared) >= self.config.style_mixing:
            return Draws(z, noise)
        cut = 1 + int(rng.uniform(self.seed, f"{phase} cut", shared) * len(shapes))
        return Draws(z, noise, normal(latent, "z mixed", batch.positions), cut)

    def generate(self, phase: str, draws: Draws, level: int, blend: float) -> Tensor:
        """Images (B, 3, 4 * 2^level, ...) of G(F(z)), with style mixing if it was drawn."""
        w = self.autoencoder.mapping(draws.z)
        self._collect(phase, w)
        if draws.z_mixed is not None:
            inputs = 2 * (level + 1)
            other = self.autoencoder.mapping(draws.z_mixed)
            kept = torch.arange(inputs, device=w.device) < draws.cut
            w = torch.where(kept[:, None], w[:, None], other[:, None])
        return self.autoencoder.generate(w, level, blend, noise=draws.noise)

    def step(self, phase: str, batch: Batch) -> StepResult:
        """`batch.data["images"]` (B, 3, H, W) in [-1, 1], at the level's resolution."""
        level, blend = self.place_at(batch.images_seen)
        draws = self.draws(phase, batch, level)
        if phase == "discriminator":
            images = self.faded(batch.data["images"], level, blend)
            every = self.config.r1_every
            with_r1 = self.config.r1_gamma > 0 and batch.images_seen // batch.global_batch % every == 0
            return self.discriminator_step(images, draws, level, blend, self.config.r1_gamma * every * with_r1)
        if phase == "generator":
            return self.generator_step(draws, level, blend)
        return self.reciprocity_step(draws, level, blend)

    def discriminator_step(self, images: Tensor, draws: Draws, level: int, blend: float, r1_gamma: float) -> StepResult:
        """mean[softplus(D(E(G(F(z))))) + softplus(-D(E(x))) + gamma / 2 * R1]; learns E and D."""
        network = self.autoencoder
        with torch.no_grad():
            generated = self.generate("discriminator", draws, level, blend)
        fake = network.critic(network.encode_at(generated, level, blend))
        images = images.detach().requires_grad_(r1_gamma > 0)
        real = network.critic(network.encode_at(images, level, blend))
        loss = discriminator_loss(real.float(), fake.float()).mean()
        metrics = {"logit_real": real.detach().mean(), "logit_fake": fake.detach().mean()}
        if r1_gamma > 0:
            penalty = gradient_penalty(real, images).mean()
            loss = loss + r1_gamma / 2 * penalty
            metrics["r1"] = penalty.detach()
        return StepResult(loss, metrics)

    def generator_step(self, draws: Draws, level: int, blend: float) -> StepResult:
        """mean softplus(-D(E(G(F(z))))); learns G and F."""
        network = self.autoencoder
        generated = self.generate("generator", draws, level, blend)
        return StepResult(generator_loss(network.critic(network.encode_at(generated, level, blend)).float()).mean())

    def reciprocity_step(self, draws: Draws, level: int, blend: float) -> StepResult:
        """mean (E(G(w)) - w)^2 with w = F(z), the w to be met held fixed; learns E, G and F."""
        network = self.autoencoder
        w = network.mapping(draws.z)
        generated = network.generate(w, level, blend, noise=draws.noise)
        return StepResult(F.mse_loss(network.encode_at(generated, level, blend).float(), w.detach().float()))

    def faded(self, images: Tensor, level: int, blend: float) -> Tensor:
        """Images (B, 3, H, W) brought to the level's resolution, and faded in as the network is."""
        factor = images.shape[-1] // (4 << level)
        if factor > 1:
            images = F.avg_pool2d(images, factor)
        return images if blend == 1 else torch.lerp(double(halve(images)), images, blend)

    # ---------------------------------------------------------------- the mean of w

    def _collect(self, phase: str, w: Tensor) -> None:
        if not self.training:
            return
        w = w.detach().to(self.autoencoder.w_mean.dtype)
        packed = torch.cat([w.new_full((1,), len(w)), w.sum(0)])
        self._w_sums[phase] = self._w_sums[phase] + packed if phase in self._w_sums else packed

    def sums(self) -> list[Tensor]:
        return list(self._w_sums.values())

    @torch.no_grad()
    def after_batch(self, batch: Batch) -> dict[str, float]:
        """Move the mean of w towards the means of both generated batches, in their order."""
        packed = torch.stack(list(self._w_sums.values()))
        self.discard()
        for mean in packed[:, 1:] / packed[:, :1]:
            self.autoencoder.w_mean.lerp_(mean.expand_as(self.autoencoder.w_mean), 1 - self.config.w_mean_beta)
        return {}

    def status(self, images_seen: int) -> dict[str, float]:
        level, blend = self.place_at(images_seen)
        return {"level": level, "blend": round(blend, 4)} if self._durations else {}

    def discard(self) -> None:
        self._w_sums.clear()

    # ---------------------------------------------------------------- what comes out

    @torch.no_grad()
    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """Images, their reconstructions, and samples of the generator (truncated), all at the full resolution."""
        network = self.autoencoder
        level, blend = self.place_at(batch.images_seen)
        images = self.faded(batch.data["images"], level, blend)
        # The same draws in every picture of a run, so that it is the network that changes.
        draws = self.draws("samples", Batch(batch.data, batch.positions, 0, batch.global_batch), level)
        w = network.encode_at(images, level, blend)
        styles = network.truncate(network.mapping(draws.z))
        rows = {
            "image": images,
            "reconstruction": network.generate(w, level, blend, noise=draws.noise),
            "sample": network.generate(styles, level, blend, noise=draws.noise),
        }
        side = network.config.resolution
        return {name: F.interpolate(row, size=(side, side), mode="nearest") for name, row in rows.items()}

    def save(self, folder: str | Path, **extra: Any) -> None:
        self.autoencoder.save_pretrained(folder, **extra)


def _with_rates(module: nn.Module) -> list[tuple[float, nn.Parameter]]:
    """(rate, parameter) of everything in `module`; what is no equalised layer has rate 1."""
    return [
        (getattr(layer, "rates", {}).get(name, 1.0), parameter)
        for layer in module.modules()
        for name, parameter in layer.named_parameters(recurse=False)
    ]
