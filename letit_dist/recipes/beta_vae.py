"""Stage 1 for beta-VAE: the evidence lower bound with a weighted divergence (LETIT, eq. 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from letit_dist import rng
from letit_dist.autoencoders.base import AutoencoderConfig
from letit_dist.autoencoders.beta_vae import BetaVAE, BetaVAEConfig
from letit_dist.errors import UserError
from letit_dist.recipes.base import Batch, Phase, Recipe, RecipeConfig, StepResult
from letit_dist.registry import RECIPES
from letit_dist.schemas import TrainingConfig


class BetaVAERecipeConfig(RecipeConfig):
    """The published run: Adam 1e-4, batch 64, 1.5e6 iterations."""

    kind: Literal["beta_vae"] = "beta_vae"
    beta: float = Field(10.0, ge=0, description="weight of the divergence from N(0, 1)")

    def problems(self, autoencoder: AutoencoderConfig | None, training: TrainingConfig) -> list[str]:
        """Also: another kind of network."""
        if not isinstance(autoencoder, BetaVAEConfig):
            found = None if autoencoder is None else autoencoder.kind
            return [f"recipe.kind: beta_vae trains a beta_vae, autoencoder.kind is {found!r}"]
        return super().problems(autoencoder, training)


@RECIPES.register("beta_vae")
class BetaVAERecipe(Recipe):
    """loss = squared error, summed over pixels + beta * KL(q(z | x) || N(0, 1)), both means over the batch."""

    config_class: ClassVar[type] = BetaVAERecipeConfig
    phases = (Phase("reconstruct", ("autoencoder",)),)
    config: BetaVAERecipeConfig

    def __init__(self, config: BetaVAERecipeConfig, autoencoder: BetaVAE, *, seed: int, precision: str):
        if not isinstance(autoencoder, BetaVAE):
            raise UserError(f"recipe.kind: beta_vae trains a beta_vae, autoencoder.kind is {autoencoder.config.kind!r}")
        super().__init__(config, seed=seed, precision=precision)
        self.autoencoder = autoencoder

    def step(self, phase: str, batch: Batch) -> StepResult:
        """`batch.data["images"]` (B, 3, 64, 64) in [-1, 1]."""
        images = batch.data["images"]
        shape = self.autoencoder.latent_shape
        eps = rng.normal(shape, self.seed, "posterior", batch.positions, device=images.device, dtype=images.dtype)
        return self.loss(images, eps)

    def loss(self, images: Tensor, eps: Tensor) -> StepResult:
        """The loss for given draws eps (B, latent_dim) of N(0, 1)."""
        mean, log_variance = self.autoencoder.posterior(images)
        mean, log_variance = mean.to(eps.dtype), log_variance.to(eps.dtype)
        decoded = self.autoencoder.decode(mean + (log_variance / 2).exp() * eps)
        error = (decoded - images).to(eps.dtype).square().sum((1, 2, 3)).mean()
        if self.autoencoder.config.output == "sigmoid":
            error = error / 4  # the published error is that of images in [0, 1]
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        metrics = {"squared_error": error.detach(), "divergence": divergence.detach()}
        return StepResult(error + self.config.beta * divergence, metrics)

    @torch.no_grad()
    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """Images, their reconstructions from the means, and decoded draws of the prior."""
        images = batch.data["images"]
        prior = rng.normal(self.autoencoder.latent_shape, self.seed, "prior", batch.positions, device=images.device)
        return {
            "image": images,
            "reconstruction": self.autoencoder.decode(self.autoencoder.encode(images)),
            "sample": self.autoencoder.decode(prior.to(images.dtype)),
        }

    def save(self, folder: str | Path, **extra: Any) -> None:
        self.autoencoder.save_pretrained(folder, **extra)
