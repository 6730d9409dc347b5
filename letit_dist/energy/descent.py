"""Noise-free chains of an MLP energy without autograd, each of eq. (6)'s steps in as few or as small operations as the
energy allows. All ways give the same points up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Flat latents (B, L), the factor of a step on dE/dlatents, the number of steps -> where they lead (B, L)
Descent = Callable[[Tensor, float, int], Tensor]

# A hidden layer so narrow that the number of operations counts; weights so many that their products do.
_NARROW, _WIDE = 512, 1 << 18


def layer_by_layer(first: Tensor, inner: Callable[[Tensor], Tensor]) -> Descent:
    """For any depth: `inner` maps latents to dE/d what the first layer, of weight `first` (h, L), puts out (B, h)."""

    def run(latents: Tensor, length: float, steps: int) -> Tensor:
        latents = latents.clone()
        for _ in range(steps):
            # The last product of the slope and the step are one operation.
            latents.addmm_(inner(latents), first, alpha=-length)
        return latents

    return run


@dataclass(frozen=True)
class OneHiddenLayer:
    """The energy a(h) v + c of h = W z + b."""

    first: Tensor  # W (h, L)
    bias: Tensor  # b (h,)
    last: Tensor  # v (1 or B, h)
    bend: Callable[[Tensor, Tensor], Tensor]  # (v, h) to v a'(h) = dE/dh (B, h)
    straight: bool  # whether `a` is made of straight pieces

    def descend(self, latents: Tensor, length: float, steps: int) -> Tensor:
        """A `Descent`."""
        outputs, inputs = self.first.shape
        if outputs <= min(_NARROW, 2 * inputs, len(latents) * steps / 2):
            return self.in_hidden_units(latents, length, steps)
        if self.straight and steps > 1 and outputs * inputs >= _WIDE and latents.device.type == "cpu":
            return self.by_changes(latents, length, steps)
        return layer_by_layer(self.first, self._inner)(latents, length, steps)

    def _inner(self, latents: Tensor) -> Tensor:
        return self.bend(self.last, F.linear(latents, self.first, self.bias))

    def in_hidden_units(self, latents: Tensor, length: float, steps: int) -> Tensor:
        """The chain of h, whose step is one product, with W W^T; z follows from the sum of its slopes.

        Half as many operations, with which the time of narrow layers goes.
        """
        hidden, gram = F.linear(latents, self.first, self.bias), self.first @ self.first.t()
        slope = total = self.bend(self.last, hidden)
        for _ in range(steps - 1):
            hidden.addmm_(slope, gram, alpha=-length)
            slope = self.bend(self.last, hidden)
            total = total + slope
        return torch.addmm(latents, total, self.first, alpha=-length)

    def by_changes(self, latents: Tensor, length: float, steps: int) -> Tensor:
        """A chain is a straight line until a unit changes its sign: only such units, few of all, correct its direction.

        Of a step's two products one nearly vanishes. Which units they are is asked of the device in every step: for a
        CPU, where that waits for nothing.
        """
        hidden = F.linear(latents, self.first, self.bias)
        slope = self.bend(self.last, hidden)
        gradient = slope @ self.first  # dE/dz (B, L)
        speed = gradient @ self.first.t()  # of h
        latents = torch.sub(latents, gradient, alpha=length)
        for _ in range(steps - 1):
            hidden.sub_(speed, alpha=length)
            before, slope = slope, self.bend(self.last, hidden)
            change = slope - before
            units = change.any(0).nonzero().squeeze(1)
            if 2 * len(units) > len(self.first):
                correction = change @ self.first
            elif len(units):
                correction = change[:, units] @ self.first[units]
            if len(units):
                gradient.add_(correction)
                speed.addmm_(correction, self.first.t())
            latents.sub_(gradient, alpha=length)
        return latents
