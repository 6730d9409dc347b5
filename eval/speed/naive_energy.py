"""An iteration of training an energy of latents as it was published, written plainly: one side of a benchmark.

A residual convolutional energy normalises its weights in every call, pools after its convolutions and works on
row-major maps; chains go through autograd at every point; optimiser and average loop over parameters. It shares no code
with `letit_dist`, so that agreement means something. The sign is the paper's: E is low on the target (the published
code trains -E).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from letit_dist.energy.models import EnergyModel


class NaiveEnergy:
    """A letit energy without conditions, as functions of copies of its parameters under the same names."""

    def __init__(
        self,
        energy: EnergyModel,
        *,
        steps: int,
        step_size: float,
        rate: float,
        betas: tuple[float, float],
        eps: float,
        decay: float,
        frozen: bool,
    ):
        """`decay` is of the average, per iteration. With `frozen`, as published, chains run on parameters that
        require no gradient; without, each of their backward passes makes those of the parameters too."""
        self.config: Any = energy.config  # of either kind
        self.steps, self.step_size, self.decay, self.frozen = steps, step_size, decay, frozen
        plain = {"memory_format": torch.contiguous_format}
        self.weights = {n: p.detach().clone(**plain).requires_grad_() for n, p in energy.named_parameters()}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=rate, betas=betas, eps=eps, foreach=False)
        self.precision = "fp32"

    # ---------------------------------------------------------------- energies

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, *L) to (B,)"""
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self._mlp(latents) if self.config.kind == "mlp" else self._convolutional(latents)

    def _mlp(self, latents: Tensor) -> Tensor:
        x = latents.flatten(1)
        for layer in range(self.config.layers + 1):
            x = F.linear(x, self.weights[f"layers.{2 * layer}.weight"], self.weights[f"layers.{2 * layer}.bias"])
            if layer < self.config.layers:
                x = F.leaky_relu(x, 0.2)
        return x.squeeze(1)

    def _convolutional(self, latents: Tensor) -> Tensor:
        x = self._convolve("stem", latents)
        block = 0
        while x.shape[-1] > 4:
            y = self._swish(self._convolve(f"blocks.{block}.conv1", x, padding=1))
            y = self._swish(F.avg_pool2d(self._convolve(f"blocks.{block}.conv2", y, padding=1), 2))
            x = (y + F.avg_pool2d(self._convolve(f"blocks.{block}.skip", x), 2)) / math.sqrt(2)
            block += 1
        x = self._swish(self._convolve("conv1", x, padding=1))
        x = self._swish(self._convolve("conv2", x))
        return self._convolve("linear", x).flatten()

    def _convolve(self, name: str, x: Tensor, padding: int = 0) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        weight = weight * math.sqrt(2 / math.prod(weight.shape[1:]))
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], padding=padding)

    @staticmethod
    def _swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) / 1.1

    # ---------------------------------------------------------------- training

    def chain(self, start: Tensor) -> Tensor:
        """`steps` steps down the energy (eq. 6 without noise) from (B, *L); no graph."""
        for weight in self.weights.values():
            weight.requires_grad_(not self.frozen)
        z = start.clone()
        for _ in range(self.steps):
            z = z.detach().requires_grad_()
            self(z).sum().backward()
            assert z.grad is not None
            z = z - self.step_size / 2 * z.grad
        for weight in self.weights.values():
            weight.requires_grad_(True)
        return z.detach()

    def iteration(self, source: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """The loss (eq. 2) and where the chains ended, after a step of the optimiser and of the average."""
        translated = self.chain(source)
        self.forget_gradients()
        loss = self(target).mean() - self(translated).mean()
        value = loss.item()
        if not abs(value) < 1e5:
            raise ValueError(f"the naive loss is {value:g}")
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.averages[name].mul_(self.decay).add_(weight, alpha=1 - self.decay)
        return value, translated

    def held(self) -> list[Tensor]:
        """What lives between two iterations."""
        slots = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [*self.weights.values(), *self.averages.values(), *slots]

    def forget_gradients(self) -> None:
        """As zero_grad."""
        self.optimizer.zero_grad(set_to_none=True)
