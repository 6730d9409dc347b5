"""How near translated latents are to the target's, beside the baselines, without decoding anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from letit_dist.autoencoders.base import Autoencoder
from letit_dist.data.latents import LatentSet
from letit_dist.errors import UserError

_CHUNK = 256  # latents, and fewer where that would be more than 2^26 numbers


def all_latents(autoencoder: Autoencoder, side: LatentSet, *, most: int | None = None) -> Iterator[Tensor]:
    """Latents (B, *L) of a stored domain in chunks, in order, where and in the precision that the autoencoder is;
    `most` samples spread evenly over it."""
    like = next(autoencoder.parameters())
    count = len(side) if most is None else min(most, len(side))
    chosen = torch.arange(count) * len(side) // count
    for rows in chosen.split(max(1, min(_CHUNK, 2**26 // math.prod(autoencoder.latent_shape)))):
        fields = {name: values.to(like.device) for name, values in side.take(rows).items()}
        with torch.no_grad():
            yield fields["latent"].to(like) if "latent" in fields else autoencoder.latents_from_codes(fields)


def measure_unit(autoencoder: Autoencoder, *sides: LatentSet, most: int = 512) -> float:
    """The standard deviation of all entries of the latents of these domains, to three digits.

    Three digits are plenty for a unit, and keep it the same number on every machine. Raises UserError if all
    entries are equal.
    """
    # Chunk by chunk: all of it at once would be 34 GB for VQ-VAE-2 at 1024 pixels.
    count, total, squares = 0, 0.0, 0.0
    for side in sides:
        for part in all_latents(autoencoder, side, most=most):
            count += part.numel()
            total += float(part.double().sum())
            squares += float(part.double().square().sum())
    unit = float(f"{max(squares / count - (total / count) ** 2, 0) ** 0.5:.3g}")
    if unit == 0:
        raise UserError("every entry of the latents is the same number: the autoencoder has not learnt anything yet")
    return unit


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy between latents (N, *L) and (M, *L), in float64.

    The kernel is KID's, (x.y / d + 1)^3 (1801.01401), on the latents themselves: 0 in expectation when both
    come from one distribution, and slightly negative by chance. Needs two samples a side.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.t() / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def compare(
    energy: Callable[[Tensor], Tensor],
    methods: dict[str, Callable[[Tensor], Tensor]],
    source: Iterator[Tensor],
    target: Iterator[Tensor],
    unit: float,
) -> list[dict[str, Any]]:
    """One row a method: mean energy, and kernel distance to half of the target in units of the latents' spread.

    The other half of the target stands in the last row: nothing can be expected to be nearer than that.
    """
    starts = list(source)
    goal = torch.cat(list(target))
    reference, held_out = goal[::2], goal[1::2]
    rows = []
    for name, method in methods.items():
        moved = torch.cat([method(chunk) for chunk in starts])
        rows.append(_row(name, energy, moved, reference, unit))
    rows.append(_row("target itself", energy, held_out, reference, unit))
    return rows


@torch.no_grad()
def _row(
    name: str, energy: Callable[[Tensor], Tensor], latents: Tensor, reference: Tensor, unit: float
) -> dict[str, Any]:
    mean = torch.cat([energy(chunk) for chunk in latents.split(_CHUNK)]).mean()
    return {
        "method": name,
        "energy": float(mean),
        "kernel_distance": kernel_distance(latents / unit, reference / unit),
        "samples": len(latents),
    }
