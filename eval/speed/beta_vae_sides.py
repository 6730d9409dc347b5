"""Both sides of `throughput.py beta_vae`: the published iteration and the trainer's, from the same weights."""

from __future__ import annotations

from pathlib import Path

import torch

from letit_dist import rng
from letit_dist.autoencoders.beta_vae import BetaVAE, BetaVAEConfig
from letit_dist.evaluation.benchmark import Side
from letit_dist.recipes.base import Batch, OptimizerConfig
from letit_dist.recipes.beta_vae import BetaVAERecipe, BetaVAERecipeConfig
from letit_dist.training.setup import seed_weights
from speed.agreement import apart, compile_methods, full_precision, require_agreement
from speed.naive_beta_vae import NaiveBetaVAE
from speed.trainers import idle_trainer, learning_side, ready

RATE = 1e-4  # as published


class BetaVaeSides:
    """One iteration of training, by hand and by the trainer, on the same images."""

    def __init__(
        self,
        config: BetaVAEConfig,
        *,
        batch: int,
        run: Path,
        precision: str = "fp32",
        compiler: str | None = None,
        naive_precision: str | None = None,
        seed: int = 0,
    ):
        """`run` is a folder for the trainer; `compiler` a backend of torch.compile for both sides. With
        `naive_precision` the naive side has its own, and no compiler."""
        seed_weights(seed)
        network = BetaVAE(config)
        settings = BetaVAERecipeConfig(optimizer=OptimizerConfig(learning_rate=RATE))
        self.recipe = BetaVAERecipe(settings, network, seed=seed, precision=precision)
        self.trainer = idle_trainer(self.recipe, run, batch=batch)
        # Only now are the weights on their device and in their precision.
        self.naive = NaiveBetaVAE(network, rate=RATE)
        self.naive.precision = naive_precision or precision
        images = torch.rand(batch, 3, config.resolution, config.resolution) * 2 - 1
        self.images = images.to(self.trainer.accelerator.device, self.trainer.dtype)
        self.batch = ready(self.trainer, Batch({"images": self.images}, torch.arange(batch), 0, batch))
        if compiler:
            compile_methods(self.recipe, "loss", backend=compiler)
        if compiler and naive_precision is None:
            compile_methods(self.naive, "loss", backend=compiler)

    @property
    def naive_side(self) -> Side:
        """As published; the draws are torch's."""
        shape = (len(self.images), *self.recipe.autoencoder.latent_shape)

        def run() -> None:
            self.naive.iteration(self.images, torch.randn(shape, device=self.images.device, dtype=self.images.dtype))

        return Side(run, self.naive.held, self.naive.forget_gradients)

    @property
    def our_side(self) -> Side:
        """What `Trainer.train` does with a batch, draws included."""
        return learning_side(self.trainer, lambda: self.trainer.learn(self.batch))

    def compare(self, tolerance: float = 1e-5, *, weights: bool = True) -> dict[str, float]:
        """The differences after one iteration of both on the same draws; UserError beyond the tolerance.

        Of the loss relatively, of weights in units of the optimiser's step. Adam's first step is the gradient's
        sign: only in float64 is that of a small one more than rounding, so that `weights` is for float64.
        """
        shape, places = self.recipe.autoencoder.latent_shape, self.batch.positions
        device, dtype = self.images.device, self.images.dtype
        eps = rng.normal(shape, self.recipe.seed, "posterior", places, device=device, dtype=dtype)
        with full_precision(self.recipe, self.naive):
            loss = self.naive.iteration(self.images, eps)
            self.trainer.means.clear()
            self.trainer.learn(self.batch)
        found = {"loss": abs(self.trainer.means.means()["loss"] - loss) / abs(loss)}
        if weights:
            ours, step = dict(self.recipe.autoencoder.named_parameters()), torch.tensor(RATE)
            found["weights"] = max(apart(ours[name], plain, step) for name, plain in self.naive.weights.items())
        require_agreement(found, tolerance)
        return found
