"""What an energy is shown beside: simpler ways of moving the same latents, and how near each comes to the target."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from letit_dist.energy import gaussian, light_bridge
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.gaussian import GaussianTransport
from letit_dist.energy.light_bridge import LightBridge
from letit_dist.evaluation.frechet import frechet_distance
from letit_dist.evaluation.latents import kernel_distance

Move = Callable[[Tensor, Tensor], Tensor]  # latents (B, *L) and the places (B,) of their samples -> latents
NAMES = ("mean shift", "Gaussian transport", "light bridge")
_STEPS, _BATCH = 400, 64  # of the light bridge: it starts near the mean shift, and little is left to learn
_MOST_NUMBERS = 1 << 27  # on a side of a distance between latents: 1 GiB in float64


@dataclass(frozen=True)
class Rival:
    """A fitted baseline."""

    move: Move
    fit_seconds: float


def fit_rivals(
    names: Sequence[str], source: Tensor, target: Tensor, *, seed: int = 0, say: Callable[[str], object] = print
) -> dict[str, Rival]:
    """Baselines on latents (N, *L) and (M, *L) of the two domains; `say` gets a line for each that is left out."""
    dims = math.prod(source.shape[1:])

    def mean_shift() -> Move:
        fitted = MeanShift.fit(source, target)
        return lambda z, _: fitted.translate(z)

    def transport() -> Move:
        fitted = GaussianTransport.fit(source, target)
        return lambda z, _: fitted.translate(z)

    def bridge() -> Move:
        fitted = LightBridge.fit(source, target, steps=_STEPS, batch=_BATCH, seed=seed)
        return lambda z, places: fitted.translate(z, places=places, seed=seed)

    # A map's Gaussian is diagonal, and of any size.
    largest = {"Gaussian transport": gaussian.LIMIT if source.ndim == 2 else dims, "light bridge": light_bridge.LIMIT}
    fits = dict(zip(NAMES, (mean_shift, transport, bridge), strict=True))
    rivals = {}
    for name in names:
        if dims > largest.get(name, dims):
            say(f"without {name}: latents of {dims} numbers, it takes at most {largest[name]}")
        elif name != "mean shift" and min(len(source), len(target)) < 2:
            say(f"without {name}: {len(source)} and {len(target)} training images, it takes at least 2 a side")
        else:
            begun = time.perf_counter()
            move = fits[name]()
            rivals[name] = Rival(move, round(time.perf_counter() - begun, 3))
    return rivals


class Nearness:
    """How far moved latents are from the target's, and from where they began.

    `latent_frechet` and `latent_kernel` are the distances to the target's training latents, `displacement` the root
    mean square way of an entry, all in units of the latents' spread: the energy's own `unit`, or what is given.
    """

    def __init__(self, source: Tensor, target: Tensor, unit: float, *, say: Callable[[str], object] = print):
        self.source, self.target, self.unit = source, target, unit
        largest = max(source.numel(), target.numel())
        self.distances = min(len(source), len(target)) > 1 and largest <= _MOST_NUMBERS
        if largest > _MOST_NUMBERS:
            say(f"without distances of latents: {largest:,} numbers on a side, at most {_MOST_NUMBERS:,}")

    @torch.no_grad()
    def of(self, moved: Tensor) -> dict[str, float]:
        """Of latents (N, *L) that were moved from `source`, in its order."""
        found = {"displacement": float((moved - self.source).double().square().mean().sqrt()) / self.unit}
        if self.distances:
            ends = moved / self.unit, self.target / self.unit
            found |= {"latent_frechet": frechet_distance(*ends), "latent_kernel": kernel_distance(*ends)}
        return found
