"""Stage 1 for VQ-VAE-2: reconstruction, commitment of both levels, and optionally a perceptual term."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from letit_dist import rng
from letit_dist.autoencoders.quantize import BatchPlace
from letit_dist.autoencoders.vqvae2 import VQVAE2
from letit_dist.config import StrictConfig
from letit_dist.errors import UserError
from letit_dist.losses.perceptual import PerceptualLoss
from letit_dist.losses.reconstruction import mse
from letit_dist.recipes.base import Batch, Phase, Recipe, RecipeConfig, StepResult
from letit_dist.registry import RECIPES


class PerceptualConfig(StrictConfig):
    """LPIPS beside the squared error (LETIT's option). The backbone's weights are given by path."""

    weight: float = Field(gt=0)
    network: Literal["alex", "vgg", "squeeze"] = "vgg"
    backbone: str = Field(description="torchvision's weights file of the network")


class VQVAE2RecipeConfig(RecipeConfig):
    """The loss of rosinality's implementation; LETIT adds input noise and LPIPS."""

    kind: Literal["vqvae2"] = "vqvae2"
    commitment: float = Field(0.25, ge=0, description="weight of the sum of both levels' commitment losses")
    input_noise: float = Field(0.0, ge=0, description="standard deviation; the target stays the clean image")
    perceptual: PerceptualConfig | None = None


@RECIPES.register("vqvae2")
class VQVAE2Recipe(Recipe):
    """loss = MSE + commitment * (top + bottom) [+ weight * LPIPS]; codebooks move once a global batch."""

    config_class: ClassVar[type] = VQVAE2RecipeConfig
    phases = (Phase("reconstruct", ("autoencoder",)),)
    config: VQVAE2RecipeConfig

    def __init__(self, config: VQVAE2RecipeConfig, autoencoder: VQVAE2, *, seed: int, precision: str):
        if not isinstance(autoencoder, VQVAE2):
            raise UserError(f"recipe.kind: vqvae2 trains a VQVAE2, autoencoder.kind is {autoencoder.config.kind!r}")
        super().__init__(config, seed=seed, precision=precision)
        self.autoencoder = autoencoder
        self._perceptual: tuple[PerceptualLoss] | None = None
        if config.perceptual:
            loss = PerceptualLoss(config.perceptual.backbone, config.perceptual.network)
            self._perceptual = (self.add_companion(loss),)  # a tuple: not a child, so neither saved nor averaged

    def step(self, phase: str, batch: Batch) -> StepResult:
        """`batch.data["images"]` (B, 3, H, W) in [-1, 1]."""
        images = batch.data["images"]
        inputs = images
        if self.config.input_noise:
            noise = self._draw("input noise", images.shape[1:], batch)
            inputs = images + self.config.input_noise * noise
        shapes = self.autoencoder.noise_shapes()
        output = self.autoencoder.forward_training(
            inputs,
            noise=[self._draw(f"layer noise {i}", shape, batch) for i, shape in enumerate(shapes)] or None,
            place=BatchPlace(self.seed, batch.slots, batch.global_batch),
        )
        reconstruction = mse(output.reconstruction, images)
        commitment = output.commitment_top + output.commitment_bottom
        loss = reconstruction + self.config.commitment * commitment
        metrics = {
            "mse": reconstruction.detach(),
            "commitment_top": output.commitment_top.detach(),
            "commitment_bottom": output.commitment_bottom.detach(),
        }
        if self._perceptual and self.config.perceptual:
            perceptual = self._perceptual[0](output.reconstruction, images)
            loss = loss + self.config.perceptual.weight * perceptual
            metrics["lpips"] = perceptual.detach()
        return StepResult(loss, metrics)

    def _draw(self, purpose: str, shape: Sequence[int], batch: Batch) -> Tensor:
        images = batch.data["images"]
        return rng.normal(shape, self.seed, purpose, batch.positions, device=images.device, dtype=images.dtype)

    def sums(self) -> list[Tensor]:
        return self.autoencoder.codebook_sums()

    def after_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Move both codebooks; the counts are those of the global batch."""
        metrics = {}
        for level, stats in self.autoencoder.update_codebooks().items():
            metrics[f"perplexity_{level}"] = stats.perplexity
            metrics[f"usage_{level}"] = stats.usage
            metrics[f"restarted_{level}"] = stats.restarted
        return metrics

    def discard(self) -> None:
        self.autoencoder.discard_statistics()

    @torch.no_grad()
    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """Images and their reconstructions, without layer noise."""
        images = batch.data["images"]
        return {"image": images, "reconstruction": self.autoencoder.decode(self.autoencoder.encode(images))}

    def save(self, folder: str | Path, **extra: Any) -> None:
        self.autoencoder.save_pretrained(folder, **extra)
