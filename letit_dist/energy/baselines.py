"""What an energy must beat: adding the difference of the two domains' means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from letit_dist.errors import UserError

Batches = Tensor | Iterable[Tensor]


class MeanShift:
    """z + mean(target) - mean(source): the optimal transport between domains that differ by a shift alone.

    It is also all that a linear energy (kind mlp, layers 0) can express, there with a direction learnt by
    descent and a length set by steps and step_size.
    """

    def __init__(self, shift: Tensor):
        self.shift = shift  # (*L) or, by channel, (C, 1, ..., 1)

    @classmethod
    def fit(cls, source: Batches, target: Batches, *, by: Literal["entry", "channel"] = "entry") -> MeanShift:
        """From latents (N, *L) of each domain, or batches (B, *L) of them, each batch seen once.

        by="entry" shifts every number of the latents on its own; by="channel", for latents (C, H, W), shifts
        every channel by its mean over positions, which keeps layouts that differ between images. Raises
        UserError for empty domains, domains of different shapes, and channels of flat latents.
        """
        means = {"source": _mean(source, "source"), "target": _mean(target, "target")}
        shapes = {name: tuple(mean.shape) for name, mean in means.items()}
        if shapes["source"] != shapes["target"]:
            raise UserError(f"mean shift: source latents are {shapes['source']}, target latents {shapes['target']}")
        shift = means["target"] - means["source"]
        if by == "channel":
            if shift.ndim < 2:
                raise UserError(f"mean shift by channel needs latents (C, H, W), got {shapes['source']}")
            shift = shift.mean(dim=tuple(range(1, shift.ndim)), keepdim=True)
        return cls(shift.float())

    def translate(self, latents: Tensor, *, strength: float = 1.0) -> Tensor:
        """Latents (B, *L) moved by `strength` times the shift."""
        return latents + strength * self.shift.to(latents)


def _mean(batches: Batches, name: str) -> Tensor:
    """Mean over all rows, summed in float64: (*L)."""
    total, count = None, 0
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        rows = batch.sum(0, dtype=torch.float64)
        if total is not None and rows.shape != total.shape:
            raise UserError(f"mean shift: {name} latents of shapes {tuple(total.shape)} and {tuple(rows.shape)}")
        total = rows if total is None else total + rows
        count += len(batch)
    if total is None or count == 0:
        raise UserError(f"mean shift: no {name} latents")
    return total / count
