"""Both sides of `throughput.py beta_vae`: the published iteration and the trainer's, from the same weights."""

from __future__ import annotations

from typing import Any

import torch

from letit_dist import rng
from letit_dist.autoencoders.beta_vae import BetaVAE
from letit_dist.recipes.base import OptimizerConfig
from letit_dist.recipes.beta_vae import BetaVAERecipe, BetaVAERecipeConfig
from speed.agreement import apart
from speed.naive_beta_vae import NaiveBetaVAE
from speed.training_sides import OnePhaseSides

RATE = 1e-4  # as published


class BetaVaeSides(OnePhaseSides):
    """One iteration of training a beta-VAE."""

    def _make_recipe(self, network: BetaVAE, options: dict[str, Any]) -> BetaVAERecipe:
        settings = BetaVAERecipeConfig(optimizer=OptimizerConfig(learning_rate=RATE))
        return BetaVAERecipe(settings, network, **options)

    def _make_naive(self) -> NaiveBetaVAE:
        return NaiveBetaVAE(self.recipe.autoencoder, rate=RATE)

    def _run_naive(self) -> None:
        shape = (len(self.images), *self.recipe.autoencoder.latent_shape)
        self.naive.iteration(self.images, torch.randn(shape, device=self.images.device, dtype=self.images.dtype))

    def _naive_loss(self) -> float:
        shape, places = self.recipe.autoencoder.latent_shape, self.batch.positions
        device, dtype = self.images.device, self.images.dtype
        eps = rng.normal(shape, self.recipe.seed, "posterior", places, device=device, dtype=dtype)
        return self.naive.iteration(self.images, eps)

    def _differences(self) -> dict[str, float]:
        """Of weights, in units of the optimiser's step."""
        ours, step = dict(self.recipe.autoencoder.named_parameters()), torch.tensor(RATE)
        return {"weights": max(apart(ours[name], plain, step) for name, plain in self.naive.weights.items())}
