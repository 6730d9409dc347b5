"""Both sides of `throughput.py energy`: the published iteration and the trainer's, from the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from letit_dist.autoencoders.base import Autoencoder
from letit_dist.data.latents import LatentSet, LatentWriter
from letit_dist.energy.convolutional import ConvEnergyConfig
from letit_dist.energy.langevin import LangevinConfig
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import EnergyConfig, build_energy
from letit_dist.errors import UserError
from letit_dist.evaluation.benchmark import Side
from letit_dist.recipes.base import Batch, OptimizerConfig
from letit_dist.recipes.latent_energy import LatentEnergyConfig, LatentEnergyRecipe
from letit_dist.training.feeds import LatentFeed
from letit_dist.training.setup import seed_weights
from speed.agreement import apart, full_precision, listed, require_agreement
from speed.naive_energy import NaiveEnergy
from speed.trainers import idle_trainer, learning_side, ready

RATE, BETAS, EPS, HALF_LIFE = 1e-3, (0.5, 0.999), 1e-8, 22_170.0
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Chain:
    """What a benchmark of an energy is made of beside its autoencoder; `step_size` is that of eq. (6)."""

    energy: EnergyConfig
    batch: int
    steps: int
    step_size: float


def published_chain(
    kind: str, *, latent: int = 512, multiplier: int = 1, batch: int | None, steps: int | None
) -> Chain:
    """On the latents of an autoencoder of that kind; `latent` is the size of ALAE's, `multiplier` of the convolutional
    energy's channels. `batch` and `steps` are the published ones where they are None."""
    energy, usual_batch, usual_steps, step_size = {
        "alae": (MLPEnergyConfig(hidden=4 * latent), 32, 20, 0.2),
        "beta_vae": (MLPEnergyConfig(hidden=64), 128, 10, 0.2),
        "vqvae2": (ConvEnergyConfig(multiplier=multiplier), 8, 35, 2.0),
    }[kind]
    return Chain(energy, batch or usual_batch, steps or usual_steps, step_size)


class EnergySides:
    """One iteration of training on `batch` source and as many target images, by hand and by the trainer.

    Images are random; the target's are darker, so that there is something to learn.
    """

    def __init__(
        self,
        chain: Chain,
        autoencoder: Autoencoder,
        folder: Path,
        *,
        frozen: bool,
        bf16: bool = False,
        naive_precision: str | None = None,
        seed: int = 0,
    ):
        """`folder` takes the encoded domains and the trainer's run; `frozen` as in `NaiveEnergy`; with
        `naive_precision` the naive side has its own."""
        self.chain, self.autoencoder = chain, autoencoder.eval().requires_grad_(False)
        seed_weights(seed)
        energy = build_energy(chain.energy, autoencoder.latent_shape)
        recipe = LatentEnergyRecipe(
            LatentEnergyConfig(
                langevin=LangevinConfig(steps=chain.steps, step_size=chain.step_size),
                loss_limit=1e5,
                optimizer=OptimizerConfig(learning_rate=RATE, betas=BETAS, eps=EPS),
            ),
            energy,
            autoencoder,
            {},
            seed=seed,
            precision="bf16" if bf16 else "fp32",
        )
        self.trainer = idle_trainer(recipe, folder / "run", batch=chain.batch, ema_half_life=HALF_LIFE, ema_warmup=0.0)
        self.recipe = recipe
        self.device = self.trainer.accelerator.device
        # Only now are the weights on their device.
        self.naive = NaiveEnergy(
            energy,
            steps=chain.steps,
            step_size=chain.step_size,
            rate=RATE,
            betas=BETAS,
            eps=EPS,
            decay=0.5 ** (chain.batch / HALF_LIFE),
            frozen=frozen,
        )
        self.naive.precision = naive_precision or recipe.precision
        side = autoencoder.config.resolution
        shape = (2, chain.batch, 3, side, side)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.images = [images[0].to(self.device), (0.5 * images[1] - 0.5).to(self.device)]
        domains = [self._encoded(folder / name, domain) for name, domain in zip("st", self.images, strict=True)]
        self.feed = LatentFeed(*domains, seed=seed)
        # Row-major, as the plain formulation has them.
        self.latents = [domain.contiguous() for domain in self._naive_latents()]

    @torch.no_grad()
    def _encoded(self, folder: Path, images: Tensor) -> LatentSet:
        """A domain as `launch/encode_latents.py` stores it."""
        model, coded = self.autoencoder, self.autoencoder.stores_codes
        fields = model.encode_codes(images) if coded else {"latent": model.encode(images)}
        writer = LatentWriter(
            folder,
            kind="codes" if coded else "latents",
            autoencoder_fingerprint=model.fingerprint(),
            codebook_size=model.codebook_size if coded else None,
            meta={"domain": folder.name},
        )
        with writer:
            for row in range(len(images)):
                writer.write(f"{row:06d}", {name: value[row] for name, value in fields.items()})
        return LatentSet.open(folder)

    @torch.no_grad()
    def _naive_latents(self) -> list[Tensor]:
        return [self.autoencoder.encode(images) for images in self.images]

    # ---------------------------------------------------------------- what is timed

    def naive_side(self, *, encoding: bool) -> Side:
        """As published; with `encoding`, both batches pass the encoder first."""

        def run() -> None:
            self.naive.iteration(*(self._naive_latents() if encoding else self.latents))

        return Side(run, self._naive_held, self.naive.forget_gradients)

    def _naive_held(self) -> Iterator[Tensor]:
        yield from self.naive.held()
        yield from self.autoencoder.state_dict().values()

    @property
    def our_side(self) -> Side:
        """What `Trainer.train` does between two batches of stored latents, dealing them out included."""
        batches = self._batches()
        return learning_side(self.trainer, lambda: self._iterate(batches))

    def _batches(self) -> Iterator[Batch]:
        return self.feed.batches(self.trainer.images_seen, self.chain.batch, 0, 1)

    def _iterate(self, batches: Iterator[Batch]) -> None:
        self.trainer.learn(ready(self.trainer, next(batches)))

    # ---------------------------------------------------------------- agreement

    def agree(self) -> str:
        """One iteration of both in float32, from equal weights; a UserError where they are more than 1e-5 apart.

        Energies are measured in units of the largest, weights and averages in those of their tensor. Adam's first
        step is the gradient's sign, so that weights are compared where their gradient is more than rounding: a
        thousandth of the largest of its tensor, and a millionth of the largest of all.
        """
        with full_precision(self.recipe, self.naive):
            loss, ended = self.naive.iteration(*self.latents)
            self.trainer.means.clear()
            start = self.recipe.transport(self.latents[0], next(self._batches()))
            worst = {"chains": apart(start.latents, ended)}
            self._iterate(self._batches())
            scale = self.trainer.means.means()
            energies = max(abs(scale["energy_target"]), abs(scale["energy_translated"]))
            worst["energies"] = abs(scale["loss"] - loss) / energies
        weights = self.naive.weights.items()
        gradients = {name: weight.grad.abs() for name, weight in weights if weight.grad is not None}
        largest = max(float(gradient.max()) for gradient in gradients.values())
        averaged = self.trainer.average and self.trainer.average.module
        assert isinstance(averaged, LatentEnergyRecipe)
        averages = dict(averaged.energy.named_parameters())
        worst["weights"] = worst["averages"] = 0.0
        compared = total = 0
        for name, ours in self.recipe.energy.named_parameters():
            clear = gradients[name] > max(1e-3 * float(gradients[name].max()), 1e-6 * largest)
            compared, total = compared + int(clear.sum()), total + clear.numel()
            for kind, plain, other in (
                ("weights", self.naive.weights[name], ours),
                ("averages", self.naive.averages[name], averages[name]),
            ):
                worst[kind] = max(worst[kind], apart(other[clear], plain[clear], plain))
        require_agreement(worst, TOLERANCE)
        if compared < 0.5 * total:
            raise UserError(f"only {compared} of {total} weights have a gradient that is more than rounding")
        return listed(worst)
