"""The running average of the weights, with a half-life in images and a warm-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from letit_dist import schedule

M = TypeVar("M", bound=nn.Module)
Tensors = tuple[Tensor, ...] | list[Tensor]


class _Average(AveragedModel):
    """torch's AveragedModel, which would look through all modules in every update, with pairs that are found once."""

    def __init__(self, model: nn.Module, multi_avg_fn: Callable[[Tensors, Tensors, Tensor | int], None]):
        super().__init__(model, multi_avg_fn=multi_avg_fn, use_buffers=False)
        self._averages: list[Tensor] = list(self.module.parameters())
        self._currents: list[Tensor] = list(model.parameters())
        # A buffer may be replaced by another tensor: only its place stays.
        places = zip(self.module.modules(), model.modules(), strict=True)
        self._places = [(ours, theirs, name) for ours, theirs in places for name in theirs._buffers]

    def update_parameters(self, model: nn.Module) -> None:
        assert self.multi_avg_fn is not None
        self.multi_avg_fn(self._averages, self._currents, self.n_averaged)
        for ours, theirs, name in self._places:
            if (current := theirs._buffers[name]) is not None:
                ours.get_buffer(name).copy_(current)
        self.n_averaged.add_(1)


class WeightAverage(Generic[M]):
    """torch's AveragedModel over a whole recipe; buffers (codebooks, running means) are copied, not averaged:
    averaging would mix integer counters and codebooks that are averages already."""

    def __init__(self, recipe: M, half_life: float, warmup: float):
        self.half_life = half_life
        self.warmup = warmup
        self._beta = 0.0
        self.model = _Average(recipe, self._lerp)
        self.model.requires_grad_(False)
        twin = self.model.module
        assert isinstance(twin, type(recipe))
        self._module: M = twin
        # A filled counter: AveragedModel's first update would copy instead of average.
        self.model.n_averaged.fill_(1)

    def _lerp(self, averages: Tensors, currents: Tensors, _count: Tensor | int) -> None:
        torch._foreach_lerp_(averages, [c.to(a.dtype) for a, c in zip(averages, currents, strict=True)], 1 - self._beta)

    @torch.no_grad()
    def update(self, recipe: nn.Module, batch: int, images_seen: int) -> None:
        """Move towards the weights after a batch that ended at `images_seen`."""
        self._beta = schedule.average_beta(self.half_life, batch, images_seen, self.warmup)
        self.model.update_parameters(recipe)

    @property
    def module(self) -> M:
        """The averaged recipe."""
        return self._module
