"""Both sides of `throughput.py vqvae2`: the published iteration and the trainer's, from the same weights."""

from __future__ import annotations

from typing import Any

from letit_dist.autoencoders.vqvae2 import VQVAE2
from letit_dist.recipes.base import OptimizerConfig
from letit_dist.recipes.vqvae2 import VQVAE2Recipe, VQVAE2RecipeConfig
from speed.agreement import apart
from speed.naive_vqvae2 import LEVELS, NaiveVQVAE2
from speed.training_sides import OnePhaseSides

RATE = 3e-4


class Vqvae2Sides(OnePhaseSides):
    """One iteration of training a VQ-VAE-2.

    In float32 only the loss can be compared: rounding decides which of two codes as good as equally near is nearer.
    """

    _compiled = "forward_training"

    def _compiled_part(self) -> VQVAE2:
        return self.recipe.autoencoder

    def _make_recipe(self, network: VQVAE2, options: dict[str, Any]) -> VQVAE2Recipe:
        settings = VQVAE2RecipeConfig(optimizer=OptimizerConfig(learning_rate=RATE))
        return VQVAE2Recipe(settings, network, **options)

    def _make_naive(self) -> NaiveVQVAE2:
        return NaiveVQVAE2(self.recipe.autoencoder, rate=RATE)

    def _run_naive(self) -> None:
        self.naive.iteration(self.images)

    def _naive_loss(self) -> float:
        return self.naive.iteration(self.images)

    def _differences(self) -> dict[str, float]:
        """Of weights and of codebooks, in units of the largest."""
        parameters = dict(self.recipe.autoencoder.named_parameters())
        buffers = dict(self.recipe.autoencoder.named_buffers())
        # Not the codes: those that the first batch leaves out are thrown so far away that they hide the others.
        names = [f"{level}_quantizer.{name}" for level in LEVELS for name in ("embed_avg", "cluster_size")]
        return {
            "weights": max(apart(parameters[name], plain) for name, plain in self.naive.weights.items()),
            "codebooks": max(apart(buffers[name], self.naive.books[name]) for name in names),
        }
