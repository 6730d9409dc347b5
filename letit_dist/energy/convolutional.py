"""The energy of the published code for maps: a residual convolutional network."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from letit_dist.energy.models import EnergyConfig, EnergyModel
from letit_dist.errors import UserError
from letit_dist.registry import ENERGIES

Weights = tuple[Tensor, Tensor]  # of one layer: weight, bias
Effective = tuple[Weights, list[tuple[Weights, ...]], tuple[Weights, ...]]  # stem, blocks, head


class ConvEnergyConfig(EnergyConfig):
    """The energy of the published code for VQ-VAE-2 latents."""

    kind: Literal["conv"] = "conv"
    multiplier: PositiveInt = Field(
        1, description="m: 32 m channels above 8 pixels, 64 m at 8 and 4; at most 512 below 64 pixels"
    )
    attention: bool = Field(False, description="self-attention after the block from 16 to 8 pixels")


# The published code's swish is x * sigmoid(x) / 1.1, whose slope is at most 1. The division, and that of a residual sum
# by sqrt(2), stand in the weights of the layers behind: maps are passed over once less.
_SWISH = 1 / 1.1


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution as a product of matrices, which a map in channels_last is: (B, C, S, S) -> (B, C', S, S)."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class EqualConv2d(nn.Module):
    """Equalised convolution: stored weights are N(0, 1), those that convolve are times sqrt(2 / fan_in).

    All layers then move at one rate under one optimiser setting, whatever their width.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = math.sqrt(2 / (inputs * kernel**2))

    def effective(self, scale: float = 1.0) -> Weights:
        """What convolves, for an input that was left `scale` times too small."""
        return (self.weight * (self.scale * scale)).contiguous(memory_format=torch.channels_last), self.bias

    def effective_pooled(self, scale: float = 1.0) -> Weights:
        """One convolution of stride 2 that equals this one followed by 2x2 average pooling.

        The average over four shifts of a k x k kernel is a (k+1) x (k+1) kernel: 16 products for each of a
        quarter of the pixels in place of 9 for each pixel.
        """
        weight = self.weight * (self.scale / 4 * scale)
        weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
        weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
        return weight.contiguous(memory_format=torch.channels_last), self.bias


class Block(nn.Module):
    """Residual block that halves the side: (B, C, S, S) -> (B, C', S/2, S/2), the latter divided by `OUT`."""

    OUT = _SWISH / math.sqrt(2)

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = EqualConv2d(inputs, outputs, 3)
        self.conv2 = EqualConv2d(outputs, outputs, 3)
        self.skip = EqualConv2d(inputs, outputs, 1)

    def effective(self, scale: float) -> tuple[Weights, ...]:
        weight, bias = self.skip.effective(scale / _SWISH)
        return self.conv1.effective(scale), self.conv2.effective_pooled(_SWISH), (weight, bias / _SWISH)

    @staticmethod
    def run(x: Tensor, conv1: Weights, conv2: Weights, skip: Weights) -> Tensor:
        y = F.silu(F.conv2d(x, *conv1, padding=1))
        y = F.silu(F.conv2d(y, *conv2, stride=2, padding=1))
        # A 1x1 convolution and pooling commute; pooling first leaves a quarter of the products.
        return y + _pointwise(F.avg_pool2d(x, 2), *skip)


class SelfAttention(nn.Module):
    """Dot-product attention among pixels, unscaled, added with a weight that starts at 0: (B, C, S, S) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        # (B, C, S, S) -> (B, 1, S*S, C): one head
        q, k, v = (f(x).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + self.gamma * attended.squeeze(1).transpose(1, 2).reshape(x.shape)


@ENERGIES.register("conv")
class ConvEnergy(EnergyModel):
    """Residual convolutional energy of latents (B, C, S, S), S a power of two, at least 8.

    1x1 convolution, blocks down to 4 pixels, 3x3 and 4x4 convolutions without a skip, one linear unit; swish
    throughout; equalised weights. Runs in channels_last, which is a quarter faster on a CPU.
    """

    config_class = ConvEnergyConfig
    tiny = ConvEnergyConfig(latent_shape=(4, 8, 8))
    config: ConvEnergyConfig
    last = "linear"

    def __init__(self, config: ConvEnergyConfig):
        super().__init__(config)
        shape = self.latent_shape
        size = shape[-1]
        if len(shape) != 3 or shape[1] != size or size < 8 or size & (size - 1):
            raise UserError(
                "energy of kind 'conv' needs latents (C, S, S) with S a power of two, at least 8; "
                f"the latents are {shape}: use kind 'mlp'"
            )
        if config.attention and size < 16:
            raise UserError(f"energy.attention acts between 16 and 8 pixels and has no effect on latents {shape}")
        sizes = [size >> i for i in range(size.bit_length() - 2)]  # size, ..., 8, 4
        widths = [self._channels(s) for s in sizes]
        self.stem = EqualConv2d(shape[0], widths[0], 1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
        self.attention = SelfAttention(widths[-2]) if config.attention else None
        self.conv1 = EqualConv2d(widths[-1], widths[-1], 3)
        self.conv2 = EqualConv2d(widths[-1], widths[-1], 4)
        self.linear = EqualConv2d(widths[-1], max(1, len(config.conditions)), 1)

    def _channels(self, size: int) -> int:
        channels = self.config.multiplier * (32 if size >= 16 else 64)
        return channels if size >= 64 else min(channels, 512)

    def _effective(self) -> Effective:
        scale, blocks = 1.0, []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            blocks.append(block.effective(scale))
            scale = 1.0 if self._attends_after(number) else Block.OUT
        head = (self.conv1.effective(scale), self.conv2.effective(_SWISH), self.linear.effective(_SWISH))
        return self.stem.effective(1 / self.unit), blocks, head

    def _attends_after(self, number: int) -> bool:
        return self.attention is not None and number == len(self.blocks) - 2  # at 8 pixels

    def _run(self, latents: Tensor, effective: Effective, condition: Tensor | None) -> Tensor:
        stem, blocks, (conv1, conv2, linear) = effective
        x = _pointwise(latents.contiguous(memory_format=torch.channels_last), *stem)
        for i, block in enumerate(blocks):
            x = Block.run(x, *block)
            if self.attention is not None and self._attends_after(i):
                x = self.attention(x * Block.OUT)
        x = F.silu(F.conv2d(x, *conv1, padding=1))
        x = F.silu(F.conv2d(x, *conv2))  # (B, C, 4, 4) -> (B, C, 1, 1)
        return self._chosen(_pointwise(x, *linear).flatten(1), condition)  # (B, conditions, 1, 1) -> (B,)

    def forward(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._run(latents, self._effective(), condition)

    def folded(self) -> Callable[..., Tensor]:
        effective = self._effective()
        return lambda latents, condition=None: self._run(latents, effective, condition)
