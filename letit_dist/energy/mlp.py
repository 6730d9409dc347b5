"""A small energy of latents of any shape, whose gradients are taken in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from letit_dist.compiled import has_numba
from letit_dist.energy.descent import Descent, OneHiddenLayer, layer_by_layer
from letit_dist.energy.models import EnergyConfig, EnergyModel
from letit_dist.registry import ENERGIES

_SLOPE = 0.2  # of LeakyReLU
# Weights and units of a layer, and rows, that torch takes longer to start than to compute.
_FEW, _NARROW, _ROWS = 1 << 14, 256, 512
_leaky_relu_backward = torch.ops.aten.leaky_relu_backward.default


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
        # Found once: beside narrow layers looking for them would take as long as their products.
        self._linear = tuple(layer for layer in self.layers if isinstance(layer, nn.Linear))

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
            gradient = gradient @ first if self.config.layers else gradient / self.unit
            if gradient.shape == latents.shape and gradient.dtype == latents.dtype:
                return gradient
            return gradient.expand(len(latents), -1).reshape(latents.shape).to(latents.dtype)

        return run

    @torch.no_grad()
    def descent(self, condition: Tensor | None = None) -> Callable[[Tensor, float, int], Tensor] | None:
        """(latents (B, *L), length, steps) to where `steps` steps by -length * dE/dlatents lead, as `slope`; None where
        that has no use."""
        # Under autocast the step would be taken in the lower precision, with the whole path.
        if not self.config.layers or torch.is_autocast_enabled(self._linear[0].weight.device.type):
            return None
        chosen: Descent
        if self.config.layers == 1:
            first, last = self._linear
            chosen = OneHiddenLayer(
                first.weight if self.unit == 1 else first.weight / self.unit,
                first.bias,
                last.weight if condition is None else last.weight[condition],
                self._bend,
                straight=self.config.activation == "leaky_relu",
            ).descend
        else:
            chosen = layer_by_layer(*self._inner_slope(condition))

        @torch.no_grad()
        def run(latents: Tensor, length: float, steps: int) -> Tensor:
            return chosen(latents.flatten(1), length, steps).view(latents.shape)

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
        parameters = [tensor for layer in self._linear for tensor in (layer.weight, layer.bias)]
        flat = flat if self.unit == 1 else flat / self.unit
        return _Contrast.apply(flat, len(target), self._activate, self._bend, *parameters)

    def closed_step(self, source: Tensor, target: Tensor, step_size: float, steps: int) -> Tensor | None:
        """Noise-free chains of eq. (6) from `source` (B, *L), then gradients of mean E(target) - mean E(translated).

        They become the parameters' `grad`. Returns mean E(target), mean E(translated), and the mean over chains of the
        root mean square of their move (3,); None for networks and devices for which there are no kernels of this.
        """
        weight = self._linear[0].weight
        alike = source.dtype == target.dtype == weight.dtype in (torch.float32, torch.float64)
        if not (self.is_narrow and alike and steps > 0 and len(source) + len(target) <= 2 * _ROWS):
            return None
        from letit_dist.narrow import contrastive_step

        first, last = self._linear
        begun, goals = ((x if self.unit == 1 else x / self.unit).flatten(1).contiguous() for x in (source, target))
        numbers, found = contrastive_step(
            begun,
            goals,
            first.weight,
            first.bias,
            last.weight[0],
            slope=_SLOPE,
            length=step_size / 2,  # of latents / unit
            steps=steps,
        )
        first.weight.grad, first.bias.grad = found[:2]
        last.weight.grad, last.bias.grad = found[2][None], torch.zeros_like(last.bias)  # which cancels in the loss
        with torch.no_grad():
            numbers[:2] += last.bias
            numbers[2] *= self.unit
        return numbers

    @property
    def is_narrow(self) -> bool:
        """Whether `closed_step` has kernels for this network, where it is."""
        config, inputs = self.config, math.prod(self.latent_shape)
        plain = config.layers == 1 and config.activation == "leaky_relu" and not config.conditions
        small = inputs * config.hidden <= _FEW and config.hidden <= _NARROW
        fours = inputs % 4 == config.hidden % 4 == 0  # narrow.LANES, of which numba must be there to know
        return plain and small and fours and self._linear[0].weight.device.type == "cpu" and has_numba()

    @property
    def _activate(self) -> Callable[[Tensor], Tensor]:
        return F.gelu if self.config.activation == "gelu" else partial(F.leaky_relu, negative_slope=_SLOPE)

    @property
    def _bend(self) -> Callable[[Tensor, Tensor], Tensor]:
        return _through_gelu if self.config.activation == "gelu" else _through_leaky_relu

    def _inner_slope(self, condition: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The first layer's weight (h, L) for latents as they are, and flat latents (B, L) to dE/d what that layer puts
        out (1 or B, h); without hidden layers twice the last layer's weight, in the energy's unit."""
        *hidden, (last, _) = [(layer.weight.detach(), layer.bias.detach()) for layer in self._linear]
        # (1, h) or (B, h): without conditions the same for every row, until a slope is multiplied in
        last = last if condition is None else last[condition]
        activate, bend = self._activate, self._bend
        # Once here, and not for every point.
        if self.unit != 1 and hidden:
            hidden[0] = hidden[0][0] / self.unit, hidden[0][1]

        def run(x: Tensor) -> Tensor:
            inputs = []
            for layer, (weight, bias) in enumerate(hidden, 1):
                inputs.append(F.linear(x, weight, bias))
                if layer < len(hidden):
                    x = activate(inputs[-1])
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
        activate: Callable[[Tensor], Tensor],
        bend: Callable[[Tensor, Tensor], Tensor],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        *hidden, (last, offset) = zip(parameters[::2], parameters[1::2], strict=True)
        inputs, before = [x], []
        for weight, bias in hidden:
            before.append(F.linear(inputs[-1], weight, bias))
            inputs.append(activate(before[-1]))
        # The last layer is linear: its value at the mean is the mean of its values, and its bias cancels.
        shares, signs = _shares(count, len(x), x.dtype, x.device)
        middles = shares @ inputs[-1]  # (2, h)
        means = F.linear(middles, last, offset).squeeze(1)
        found = [middles[:1] - middles[1:], torch.zeros_like(offset)]
        gradient = last  # of each row's energy; what a row counts for comes in at the end
        for layer in range(len(hidden) - 1, -1, -1):
            gradient = bend(gradient, before[layer])
            found[:0] = [gradient.t() @ (signs.t() * inputs[layer]), (signs @ gradient).squeeze(0)]
            if layer:
                gradient = gradient @ hidden[layer][0]
        ctx.save_for_backward(*found)
        ctx.mark_non_differentiable(means)
        return means[0] - means[1], means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *torch._foreach_mul(ctx.saved_tensors, gradient)


@lru_cache(maxsize=8)
def _shares(count: int, total: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What rows (2, total) times (total, h) make the means of the first `count` rows and of the others of, and the
    difference of these rows (1, total)."""
    shares = torch.zeros(2, total, dtype=dtype, device=device)
    shares[0, :count], shares[1, count:] = 1 / count, 1 / (total - count)
    return shares, shares[:1] - shares[1:]


def _through_leaky_relu(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient (1 or B, h) of what comes out at x (B, h), as one of what goes in."""
    return _leaky_relu_backward(gradient, x, _SLOPE, False)


def _through_gelu(gradient: Tensor, x: Tensor) -> Tensor:
    # d/dx x Phi(x) = Phi(x) + x phi(x), as (1 + erf(u) + 2 u exp(-u^2) / sqrt(pi)) / 2 for u = x / sqrt(2), which is
    # the fewest operations. torch's own kernel takes three times as long on maps as narrow as these.
    u = x * math.sqrt(0.5)
    inner = torch.erf(u).addcmul_(u, torch.exp_((u * u).neg_()), value=2 / math.sqrt(math.pi))
    half = gradient * 0.5
    return torch.addcmul(half, half, inner)
