"""Both sides of `throughput.py vqvae2`: the published iteration and the trainer's, from the same weights."""

from __future__ import annotations

from pathlib import Path

import torch

from letit_dist.autoencoders.vqvae2 import VQVAE2, VQVAE2Config
from letit_dist.evaluation.benchmark import Side
from letit_dist.recipes.base import Batch, OptimizerConfig
from letit_dist.recipes.vqvae2 import VQVAE2Recipe, VQVAE2RecipeConfig
from letit_dist.training.setup import seed_weights
from speed.agreement import apart, compile_methods, full_precision, require_agreement
from speed.naive_vqvae2 import LEVELS, NaiveVQVAE2
from speed.trainers import idle_trainer, learning_side, ready

RATE = 3e-4


class Vqvae2Sides:
    """One iteration of training, by hand and by the trainer, on the same images."""

    def __init__(
        self,
        config: VQVAE2Config,
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
        network = VQVAE2(config)
        optimizer = OptimizerConfig(learning_rate=RATE)
        self.recipe = VQVAE2Recipe(VQVAE2RecipeConfig(optimizer=optimizer), network, seed=seed, precision=precision)
        self.trainer = idle_trainer(self.recipe, run, batch=batch)
        # Only now are the weights on their device and in their precision.
        self.naive = NaiveVQVAE2(network, rate=RATE)
        self.naive.precision = naive_precision or precision
        device, dtype = self.trainer.accelerator.device, self.trainer.dtype
        images = torch.rand(batch, 3, config.resolution, config.resolution) * 2 - 1
        self.images = images.to(device, dtype)
        self.batch = ready(self.trainer, Batch({"images": self.images}, torch.arange(batch), 0, batch))
        if compiler:
            compile_methods(network, "forward_training", backend=compiler)
        if compiler and naive_precision is None:
            compile_methods(self.naive, "loss", backend=compiler)

    @property
    def naive_side(self) -> Side:
        """As published."""
        return Side(lambda: self.naive.iteration(self.images), self.naive.held, self.naive.forget_gradients)

    @property
    def our_side(self) -> Side:
        """What `Trainer.train` does with a batch."""
        return learning_side(self.trainer, lambda: self.trainer.learn(self.batch))

    def compare(self, tolerance: float = 1e-5, *, weights: bool = True) -> dict[str, float]:
        """The largest relative differences after one iteration of both; UserError beyond the tolerance.

        With `weights` also of those and of the codebooks: only float64 tells which of two codes as good as equally
        near is nearer, and the sign of a small gradient, which is all that Adam's first step takes from it.
        """
        with full_precision(self.recipe, self.naive):
            loss = self.naive.iteration(self.images)
            self.trainer.means.clear()
            self.trainer.learn(self.batch)
        found = {"loss": abs(self.trainer.means.means()["loss"] - loss) / loss}
        if weights:
            parameters = dict(self.recipe.autoencoder.named_parameters())
            buffers = dict(self.recipe.autoencoder.named_buffers())
            found["weights"] = max(apart(parameters[name], plain) for name, plain in self.naive.weights.items())
            # Not the codes: those that the first batch leaves out are thrown so far away that they hide the others.
            names = [f"{level}_quantizer.{name}" for level in LEVELS for name in ("embed_avg", "cluster_size")]
            found["codebooks"] = max(apart(buffers[name], self.naive.books[name]) for name in names)
        require_agreement(found, tolerance)
        return found
