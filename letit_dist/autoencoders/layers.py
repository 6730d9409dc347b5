"""Building blocks of the VQ-VAE-2: residual blocks, layer noise, the strided encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from letit_dist.autoencoders.convolution import Conv2d, ConvTranspose2d


class LayerNoise(nn.Module):
    """x + weight * noise with one learnt scalar a layer, zero at the start (LETIT; one a channel in StyleGAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """x (B, C, H, W) and N(0, 1) noise (B, 1, H, W) to (B, C, H, W)."""
        # Under autocast the float32 weight would widen everything after it.
        return x + (self.weight * noise).to(x.dtype)


class ResidualBlock(nn.Module):
    """ReLU, 3x3 conv, ReLU, 1x1 conv, plus the skip.

    The block opens with a ReLU on its input. With `relu_skip` the skip carries ReLU(x), as in LETIT's code,
    whose in-place ReLU overwrites x before the sum; without it x itself, as in rosinality's code and in the
    description of VQ-VAE (1711.00937, section 4.1).
    """

    def __init__(self, channels: int, hidden: int, *, relu_skip: bool, noise: bool = False):
        super().__init__()
        self.relu_skip = relu_skip
        self.conv1 = Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)
        self.noise1 = LayerNoise() if noise else None
        self.noise2 = LayerNoise() if noise else None

    def forward(self, x: Tensor, noise: Iterator[Tensor] | None = None) -> Tensor:
        """(B, C, H, W) to the same shape; takes two maps from `noise` where the block has noise layers."""
        h, start = self.conv1.after_relu(x, overwrite=self.relu_skip)
        if self.noise1 is not None and noise is not None:
            h = self.noise1(h, next(noise))
        h = self.conv2(F.relu(h, inplace=True))
        if self.noise2 is not None and noise is not None:
            h = self.noise2(h, next(noise))
        return h + (start if self.relu_skip else x)


class StridedEncoder(nn.Module):
    """Images or maps (B, inputs, H, W) to (B, channels, H / stride, W / stride), stride 4 or 2."""

    def __init__(self, inputs: int, channels: int, blocks: int, hidden: int, *, stride: int, relu_skip: bool) -> None:
        super().__init__()
        half = channels // 2
        widths = {4: [inputs, half, channels], 2: [inputs, half]}[stride]
        convs = [Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths)]
        self.convs = nn.ModuleList([*convs, Conv2d(widths[-1], channels, 3, padding=1)])
        self.blocks = nn.ModuleList(ResidualBlock(channels, hidden, relu_skip=relu_skip) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, channels, H / stride, W / stride), not negative."""
        first, second, *others = (conv for conv in self.convs if isinstance(conv, Conv2d))
        inputs, x = x, first(x)
        # Of images it is the largest map, and the cheapest to compute.
        again = (lambda: first(inputs)) if x.numel() > inputs.numel() else None
        x, _ = second.after_relu(x, overwrite=True, again=again)
        for conv in others:
            x, _ = conv.after_relu(x, overwrite=True)
        for block in self.blocks:
            x = block(x)
        return F.relu(x)


class StridedDecoder(nn.Module):
    """Maps (B, inputs, h, w) to (B, outputs, h * stride, w * stride), stride 4 or 2.

    With `noise` (stride 4 only) a noise layer follows both convolutions of each block and the first
    transposed convolution: two maps of (B, 1, h, w) a block, then one of (B, 1, 2h, 2w).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        channels: int,
        blocks: int,
        hidden: int,
        *,
        stride: int,
        relu_skip: bool,
        noise: bool = False,
    ) -> None:
        super().__init__()
        assert stride == 4 or not noise, "layer noise belongs to the bottom decoder"
        self.conv = Conv2d(inputs, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, hidden, relu_skip=relu_skip, noise=noise) for _ in range(blocks)
        )
        widths = {4: [channels, channels // 2, outputs], 2: [channels, outputs]}[stride]
        self.ups = nn.ModuleList(ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.noise = LayerNoise() if noise else None

    def forward(self, x: Tensor, noise: Iterator[Tensor] | None = None) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h * stride, w * stride); takes its maps from `noise` in order."""
        x = self.conv(x)
        for block in self.blocks:
            x = block(x, noise)
        *ups, last = (up for up in self.ups if isinstance(up, ConvTranspose2d))
        for up in ups:
            x, _ = up.after_relu(x, overwrite=True)
            if self.noise is not None and noise is not None:
                x = self.noise(x, next(noise))
        return last.after_relu(x, overwrite=True)[0]
