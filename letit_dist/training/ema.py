"""An average of the weights over images, the same for any batch size and number of ranks."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from letit_dist import schedule

M = TypeVar("M", bound=nn.Module)


class WeightAverage(Generic[M]):
    """An average over a whole recipe; buffers (codebooks, running means) are copied, not averaged: averaging would mix
    integer counters and codebooks that are averages already.

    torch's AveragedModel looks through all modules in every update, which takes longer than moving a small energy.
    """

    def __init__(self, recipe: M, half_life: float, warmup: float):
        self.half_life = half_life
        self.warmup = warmup
        self.module = copy.deepcopy(recipe).requires_grad_(False)  # the averaged recipe
        self._recipe = recipe
        self._averages: list[Tensor] = list(self.module.parameters())
        self._currents: list[Tensor] = list(recipe.parameters())
        both = zip(self.module.modules(), recipe.modules(), strict=True)
        self._buffers = [(ours._buffers, theirs._buffers) for ours, theirs in both if ours._buffers]

    @torch.no_grad()
    def update(self, recipe: nn.Module, batch: int, images_seen: int) -> None:
        """Move towards the weights after a batch that ended at `images_seen`."""
        assert recipe is self._recipe
        beta = schedule.average_beta(self.half_life, batch, images_seen, self.warmup)
        torch._foreach_lerp_(self._averages, self._currents, 1 - beta)
        for ours, theirs in self._buffers:
            for name, buffer in theirs.items():
                if (twin := ours[name]) is not None and buffer is not None:
                    twin.copy_(buffer)
