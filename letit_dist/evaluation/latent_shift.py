"""Which latent dimensions a translation moves (LETIT, section 4.2, figure 5).

The latent shift of a sample is the sum over the steps of its chain of |dE/du|, entry by entry, u = z / unit: what
`LangevinResult.shift` holds. A dimension that carries what both domains share should stay; one that tells them apart
should move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from letit_dist.config import as_tree
from letit_dist.data.latents import LatentSet
from letit_dist.data.progress import Progress
from letit_dist.data.transforms import to_pixels
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.energy_run import EnergyRun
from letit_dist.evaluation.latents import all_latents

NAMED = 10  # most and least moved dimensions that are told
_CHUNK, _NUMBERS = 256, 2**22  # latents at once, and fewer where these would be more numbers than that


@dataclass(frozen=True)
class Example:
    """One sample of map latents, on the CPU."""

    source: Tensor  # pixels (3, H, W), its latents decoded
    translated: Tensor  # pixels (3, H, W)
    shift: Tensor  # (h, w), mean over the channels


@dataclass(frozen=True)
class LatentShift:
    """The shift over N samples, on the CPU. The dimensions of map latents are their channels."""

    mean: Tensor  # float64 (*L), over the samples
    rows: Tensor  # (N, D), each sample's own; of maps the mean over positions
    stored: int  # how many latents the N were taken from
    examples: list[Example] = field(default_factory=list)

    @property
    def is_map(self) -> bool:
        return self.mean.ndim > 1

    @property
    def noun(self) -> str:
        return "channel" if self.is_map else "dimension"

    @property
    def vector(self) -> Tensor:
        """(D,): the mean shift of every dimension."""
        return self.mean.flatten(1).mean(1) if self.is_map else self.mean

    @property
    def positions(self) -> Tensor:
        """(h, w): the mean shift at every position of map latents, over the channels."""
        return self.mean.mean(0)

    def most_moved(self, count: int = NAMED) -> list[int]:
        """The dimensions that move most, the most moved first."""
        return self.vector.argsort(descending=True, stable=True)[:count].tolist()

    def least_moved(self, count: int = NAMED) -> list[int]:
        """The dimensions that move least, the least moved first."""
        return self.vector.argsort(stable=True)[:count].tolist()


def measure_shift(
    translator: Translator, side: LatentSet, *, count: int | None = None, seed: int = 0, examples: int = 0
) -> LatentShift:
    """The shift over `count` latents of the source (None = all), spread evenly over the domain.

    Of map latents also `examples` decoded images with their own shift. Raises UserError for a chain that leaves the
    finite numbers.
    """
    autoencoder = translator.autoencoder
    total = torch.zeros(autoencoder.latent_shape, dtype=torch.float64)
    is_map, rows = total.ndim > 1, []
    samples = len(side) if count is None else min(count, len(side))
    # A chain keeps what its gradient needs: many times the latents.
    at_once = max(1, min(_CHUNK, _NUMBERS // math.prod(autoencoder.latent_shape)))
    with Progress("measuring the shift", samples) as progress:
        for chunk in all_latents(autoencoder, side, most=count):
            for latents in chunk.split(at_once):
                places = range(progress.done, progress.done + len(latents))
                shift = translator.transport(latents, noise=translator.noise(seed, places)).shift
                assert shift is not None
                if not shift.isfinite().all():
                    raise UserError(f"the chain from latents of {side.folder} leaves the finite numbers")
                total += shift.sum(0, dtype=torch.float64).cpu()
                rows.append((shift.flatten(2).mean(2) if is_map else shift).cpu())
                progress.step(len(latents))
    shown = _examples(translator, side, examples, seed) if is_map and examples else []
    return LatentShift(total / samples, torch.cat(rows), len(side), shown)


def _examples(translator: Translator, side: LatentSet, count: int, seed: int) -> list[Example]:
    found: list[Example] = []
    for chunk in all_latents(translator.autoencoder, side, most=count):
        for latents in chunk.split(1):
            place = [len(found)]
            chain = translator.transport(latents, noise=translator.noise(seed, place))
            assert chain.shift is not None
            noise = translator.autoencoder.decoder_noise(seed, place)
            # One by one, and as pixels: at 1024 pixels a decoder's floats fill the memory of a laptop.
            before, after = (to_pixels(translator.decode(z, noise=noise))[0].cpu() for z in (latents, chain.latents))
            found.append(Example(before, after, chain.shift[0].mean(0).cpu()))
    return found


def correlation(one: LatentShift, other: LatentShift) -> float | None:
    """Pearson's, of the two mean shifts over the dimensions: near 1 where both directions move the same ones. None
    where one of them moves all dimensions alike."""
    vectors = torch.stack([one.vector, other.vector])
    if (vectors.std(dim=1) <= 1e-12 * vectors.abs().amax(dim=1)).any():
        return None
    return float(torch.corrcoef(vectors)[0, 1])


def shift_record(run: EnergyRun, shift: LatentShift, seed: int) -> dict[str, Any]:
    """The numbers of one direction for shift.json."""
    return {
        **run.record(seed),
        "langevin": as_tree(run.translator.sampler.config),
        "latent_unit": as_tree(run.translator.energy.config)["latent_unit"],
        "samples": len(shift.rows),
        "stored": shift.stored,
        "of": shift.noun,
        "most_moved": shift.most_moved(),
        "least_moved": shift.least_moved(),
        "mean_shift": [float(f"{value:.6g}") for value in shift.vector.tolist()],
    }
