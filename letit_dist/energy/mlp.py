"""A small energy of latents of any shape, whose gradients are taken in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from letit_dist.energy.models import EnergyConfig, EnergyModel
from letit_dist.registry import ENERGIES

_SLOPE = 0.2  # of LeakyReLU


class MLPEnergyConfig(EnergyConfig):
    """Paper, section 5: 512-2048-1 with LeakyReLU on ALAE latents."""

    kind: Literal["mlp"] = "mlp"
    layers: Literal[0, 1, 2] = Field(
        1, description="hidden layers; 0 = linear, whose Langevin chain adds the same vector to every sample"
    )
    hidden: PositiveInt = Field(2048, description="width of the hidden layers (no effect with layers 0)")
    activation: Literal["leaky_relu", "gelu"] = Field("leaky_relu", description="leaky_relu has slope 0.2")


@ENERGIES.register("mlp")
class MLPEnergy(EnergyModel):
    """Linear layers on flattened latents of any shape: L-1, L-h-1 or L-h-h-1."""

    config_class = MLPEnergyConfig
    tiny = MLPEnergyConfig(latent_shape=(16,), hidden=24)
    config: MLPEnergyConfig

    def __init__(self, config: MLPEnergyConfig):
        super().__init__(config)
        widths = [math.prod(self.latent_shape), *[config.hidden] * config.layers, max(1, len(config.conditions))]
        self.last = f"layers.{2 * config.layers}"
        self.layers = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            if i > 0:
                self.layers.append(nn.GELU() if config.activation == "gelu" else nn.LeakyReLU(_SLOPE))
            self.layers.append(nn.Linear(inputs, outputs))

    def forward(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._chosen(self.layers(latents.flatten(1) / self.unit), condition)

    def slope(self, condition: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Latents (B, *L) to dE/dlatents (B, *L), without a graph, for weights that do not change meanwhile.

        In closed form: a chain through narrow layers would spend its time in autograd's bookkeeping.
        """
        first, inner = self._inner_slope(condition)

        @torch.no_grad()
        def run(latents: Tensor) -> Tensor:
            gradient = inner(latents.flatten(1))
            if self.config.layers:
                gradient = gradient @ first
            if self.unit != 1:
                gradient = gradient / self.unit
            if gradient.shape == latents.shape and gradient.dtype == latents.dtype:
                return gradient
            return gradient.expand(len(latents), -1).reshape(latents.shape).to(latents.dtype)

        return run

    def descent(self, condition: Tensor | None = None) -> Callable[[Tensor, float, int], Tensor] | None:
        """(latents (B, *L), length, steps) to where `steps` steps by -length * dE/dlatents lead, as `slope`; None where
        that has no use.

        The last product of the slope and the step are one operation: narrow chains are bound by their number.
        """
        # Under autocast the step would be taken in the lower precision, with the whole path.
        if not self.config.layers or torch.is_autocast_enabled(next(self.parameters()).device.type):
            return None
        first, inner = self._inner_slope(condition)
        unit = self.unit

        @torch.no_grad()
        def run(latents: Tensor, length: float, steps: int) -> Tensor:
            flat = latents.flatten(1).clone()
            for _ in range(steps):
                flat.addmm_(inner(flat), first, alpha=-length / unit)
            return flat.view(latents.shape)

        return run

    def contrast(self, target: Tensor, translated: Tensor) -> tuple[Tensor, Tensor] | None:
        """Latents (B, *L) and (B', *L) to mean E(target) - mean E(translated), and both means (2,), detached; only the
        parameters get a gradient. None with conditions, under autocast and where latents want a gradient.

        The gradient is taken in closed form at once: for narrow layers most of a step would be autograd's.
        """
        lowered = torch.is_autocast_enabled(target.device.type)
        if self.config.conditions or lowered or target.requires_grad or translated.requires_grad:
            return None
        flat = torch.cat([target, translated]).flatten(1)
        parameters = [tensor for layer in self.layers[::2] for tensor in (layer.weight, layer.bias)]
        activation = self.layers[1] if self.config.layers else nn.Identity()
        flat = flat if self.unit == 1 else flat / self.unit
        return _Contrast.apply(flat, len(target), activation, self._bend, *parameters)

    @property
    def _bend(self) -> Callable[[Tensor, Tensor], Tensor]:
        return _through_gelu if self.config.activation == "gelu" else _through_leaky_relu

    def _inner_slope(self, condition: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The first layer's weight (h, L), and flat latents (B, L) to dE/d what that layer puts out (1 or B, h);
        without hidden layers to the last layer's weight."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        *hidden, (last, _) = [(layer.weight.detach(), layer.bias.detach()) for layer in linear]
        bend, unit = self._bend, self.unit
        activation = self.layers[1] if hidden else nn.Identity()
        # (1, h) or (B, h): without conditions the same for every row, until a slope is multiplied in
        last = last if condition is None else last[condition]

        def run(x: Tensor) -> Tensor:
            inputs = []
            if unit != 1:
                x = x / unit
            for layer, (weight, bias) in enumerate(hidden, 1):
                inputs.append(F.linear(x, weight, bias))
                if layer < len(hidden):
                    x = activation(inputs[-1])
            gradient = last
            for layer in range(len(hidden) - 1, -1, -1):
                gradient = bend(gradient, inputs[layer])
                if layer:
                    gradient = gradient @ hidden[layer][0]
            return gradient

        return (hidden[0][0] if hidden else last), run


class _Contrast(torch.autograd.Function):
    """Flat latents, those of the target first, to the difference of the two means of an MLP, and to both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        count: int,
        activation: nn.Module,
        bend: Callable[[Tensor, Tensor], Tensor],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights, biases = parameters[::2], parameters[1::2]
        inputs, before = [x], []
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            before.append(F.linear(inputs[-1], weight, bias))
            inputs.append(activation(before[-1]))
        values = F.linear(inputs[-1], weights[-1], biases[-1])
        means = torch.stack([part.mean() for part in values.tensor_split([count])])
        gradient = torch.full_like(values, 1 / count)
        gradient[count:].fill_(-1 / (len(values) - count))
        found: list[Tensor] = []
        for layer in range(len(weights) - 1, -1, -1):
            found[:0] = [gradient.t() @ inputs[layer], gradient.sum(0)]
            if layer:
                gradient = bend(gradient @ weights[layer], before[layer - 1])
        ctx.save_for_backward(*found)
        ctx.mark_non_differentiable(means)
        return means[0] - means[1], means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(gradient * found for found in ctx.saved_tensors)


def _through_leaky_relu(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient (1 or B, h) of what comes out at x (B, h), as one of what goes in."""
    return torch.ops.aten.leaky_relu_backward(gradient.expand_as(x), x, _SLOPE, False)


def _through_gelu(gradient: Tensor, x: Tensor) -> Tensor:
    # d/dx x Phi(x) = Phi(x) + x phi(x), as (1 + erf(u) + 2 u exp(-u^2) / sqrt(pi)) / 2 for u = x / sqrt(2), which is
    # the fewest operations. torch's own kernel takes three times as long on maps as narrow as these.
    u = x * math.sqrt(0.5)
    inner = torch.erf(u).addcmul_(u, torch.exp_((u * u).neg_()), value=2 / math.sqrt(math.pi))
    half = gradient * 0.5
    return torch.addcmul(half, half, inner)
