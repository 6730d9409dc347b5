"""Building blocks of style-based networks: equalised layers, blur, layer noise, instance norm and style.

Formulas are those of ALAE's implementation (2004.04467), which follow StyleGAN's (1812.04948, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
FUSED_FROM = 128  # pixels: from here on the published networks resample inside a strided convolution
# Pixels: from here on we do. Below, the spread kernel is larger than the map, and a copy of it lives until backward.
STRIDED_FROM = 16
_BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16


class Equalized(nn.Module):
    """A layer with an equalised learning rate in the implicit form of ALAE's code.

    Weights start as N(0, gain^2 / fan_in) and are used as they are; it is the optimiser's step that is scaled,
    by `rates`: gain / sqrt(fan_in) * lrmul for the weight and lrmul for the bias. StyleGAN stores unit weights
    and scales them in every forward pass instead; the two agree up to Adam's eps, this one costs nothing.
    """

    def __init__(
        self, shape: tuple[int, ...], fan_in: int, *, bias: int, gain: float = math.sqrt(2), lrmul: float = 1.0
    ):
        super().__init__()
        std = gain / math.sqrt(fan_in)
        self.weight = nn.Parameter(torch.randn(shape) * std)
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None
        self.rates = {"weight": std * lrmul, "bias": lrmul}


class EqualizedLinear(Equalized):
    """(B, inputs) to (B, outputs)."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = math.sqrt(2), lrmul: float = 1.0):
        super().__init__((outputs, inputs), inputs, bias=outputs, gain=gain, lrmul=lrmul)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) to (B, outputs)."""
        return F.linear(x, self.weight, self.bias)


class EqualizedConv(Equalized):
    """(B, inputs, H, W) to (B, outputs, H', W') with a 1x1 or 3x3 kernel; `resample` "up" doubles, "down" halves.

    `fused` says in which form the checkpoints hold a resampling kernel. Plain: nearest x2 before a convolution,
    or 2x2 means after one. Fused: the kernel of a strided (transposed) convolution, spread over 4x4 by summing
    its four shifts. Both are the same sum; the strided form, with 2.25 times fewer products, is taken for both
    where the map is not tiny.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        bias: bool = False,
        gain: float = math.sqrt(2),
        resample: str = "",
        fused: bool = False,
    ):
        # A transposed convolution keeps its inputs first.
        shape = (inputs, outputs) if resample == "up" and fused else (outputs, inputs)
        super().__init__((*shape, kernel, kernel), inputs * kernel**2, bias=outputs if bias else 0, gain=gain)
        self.resample = resample
        self.fused = fused

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W), (..., 2H, 2W) or (..., H/2, W/2).

        `bias` (1, outputs, 1, 1) belongs to the caller and is added here, where it costs no pass of its own.
        """
        bias = self.bias if bias is None else bias.flatten()
        if self.resample == "up":
            if not self.fused and 2 * x.shape[-1] < STRIDED_FROM:
                return F.conv2d(double(x), self.weight, bias, padding=1)
            # A transposed convolution keeps its inputs first, and runs its kernel backwards.
            weight = self.weight if self.fused else _swapped(self.weight.flip(2, 3))
            return F.conv_transpose2d(x, spread(weight), bias, stride=2, padding=1)
        if self.resample == "down":
            if not self.fused and x.shape[-1] < STRIDED_FROM:
                return halve(F.conv2d(x, self.weight, bias, padding=1))
            return F.conv2d(x, spread(self.weight, quarter=True), bias, stride=2, padding=1)
        return F.conv2d(x, self.weight, bias, padding=self.weight.shape[-1] // 2)


def spread(kernel: Tensor, *, quarter: bool = False) -> Tensor:
    """A 3x3 kernel (A, B, 3, 3) to the sum of its four shifts (A, B, 4, 4), or a quarter of it."""
    # Sums over 2x2 windows of the padded kernel: one operation, where shifting and adding took ten times as long.
    return F.avg_pool2d(kernel, 2, stride=1, padding=1, divisor_override=4 if quarter else 1)


def _swapped(kernel: Tensor) -> Tensor:
    """(A, B, 3, 3) to (B, A, 3, 3), copied: as a view it would be in no memory format, and read at half the speed."""
    last = kernel.is_contiguous(memory_format=torch.channels_last)
    return kernel.transpose(0, 1).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _Blur(torch.autograd.Function):
    """The kernel is symmetric, so the gradient is blurred in turn, and nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # up to ten times as fast as means here
            return F.conv2d(x, _BLUR.to(x.dtype).expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])
        # Two 2x2 means in a row are that kernel.
        return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=1), 2, stride=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Blur.apply(gradient)


def blur(x: Tensor) -> Tensor:
    """(B, C, H, W) smoothed by [1 2 1] x [1 2 1] / 16 with zeros outside."""
    return _Blur.apply(x)


def double(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 2H, 2W), each pixel repeated."""
    return F.interpolate(images, scale_factor=2, mode="nearest")


def halve(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, H/2, W/2), means of 2x2."""
    return F.avg_pool2d(images, 2)


class _Moments(torch.autograd.Function):
    """Written out because the gradient of `torch.var_mean` takes the mean again and several passes; this one is one.
    The map itself is kept, which LeakyReLU keeps anyway, and no copy in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if x.device.type == "cpu":  # var_mean's single pass is not vectorised: it takes five times as long
            mean = x.mean((2, 3), keepdim=True, dtype=dtype)
            variance = (x - mean).square_().mean((2, 3), keepdim=True)
        else:
            variance, mean = torch.var_mean(x.to(dtype), (2, 3), correction=0, keepdim=True)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        slope = of_variance * (2 / pixels)
        # of_mean / N + of_variance * 2 (x - mean) / N
        return torch.addcmul((of_mean / pixels - slope * mean).to(x.dtype), x, slope.to(x.dtype))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the pixels of each channel, (B, C, 1, 1) each, at least in float32."""
    return _Moments.apply(x)


class Styled(nn.Module):
    """noise, bias, LeakyReLU, instance norm, style: what follows each convolution of the generator."""

    def __init__(self, channels: int, latent_dim: int, level: int):
        super().__init__()
        self.level = level
        self.noise = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.style = EqualizedLinear(latent_dim, 2 * channels, gain=1.0)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x (B or 1, C, H, W), w (B, latent_dim) and noise (B or 1, 1, H, W) to (B, C, H, W)."""
        if noise is None:
            # The published stand-in for noise, by which its pictures without noise were made: not zero noise.
            s = math.sqrt(self.level + 1)
            x = x + torch.exp(x * x * (-0.5 / s**2)) * (0.8 * s / math.sqrt(2 * math.pi))
        else:
            # In one pass. Their product alone would be a row-major map, and the sum with it slow.
            x = torch.addcmul(x, self.noise.to(x.dtype), noise.to(x.dtype))
        x = F.leaky_relu(x.add_(self.bias.to(x.dtype)), SLOPE, inplace=True)
        scale, shift = self.style(w)[:, :, None, None].chunk(2, 1)
        mean, variance = moments(x)
        # instance norm (eps 1e-8), then x * (1 + scale) + shift, as one product and one sum
        scale = (1 + scale) * (variance + 1e-8).rsqrt()
        return torch.addcmul((shift - mean * scale).to(x.dtype), x, scale.to(x.dtype))


class GeneratorBlock(nn.Module):
    """One resolution of the generator; level 0 starts from a constant, the others double the map below."""

    def __init__(self, inputs: int, outputs: int, latent_dim: int, level: int):
        super().__init__()
        fused = 4 << level >= FUSED_FROM
        self.conv1 = EqualizedConv(inputs, outputs, 3, resample="up", fused=fused) if level else None
        self.styled1 = Styled(outputs, latent_dim, level)
        self.conv2 = EqualizedConv(outputs, outputs, 3)
        self.styled2 = Styled(outputs, latent_dim, level)

    def forward(self, x: Tensor, styles: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
        """(B, inputs, h, h), styles (B, 2, latent_dim) and two maps of noise to (B, outputs, 2h, 2h); level 0 keeps
        its size."""
        first, second = (None, None) if noise is None else noise
        if self.conv1 is not None:
            x = blur(self.conv1(x))
        x = self.styled1(x, styles[:, 0], first)
        return self.styled2(self.conv2(x), styles[:, 1], second)


class EncoderBlock(nn.Module):
    """One resolution of the style encoder: halves the map, and reads two styles off it."""

    def __init__(self, inputs: int, outputs: int, latent_dim: int, level: int):
        super().__init__()
        fused = 4 << level >= FUSED_FROM
        self.conv1 = EqualizedConv(inputs, inputs, 3)
        self.bias1 = nn.Parameter(torch.zeros(1, inputs, 1, 1))
        self.style1 = EqualizedLinear(2 * inputs, latent_dim)
        self.conv2 = EqualizedConv(inputs, outputs, 3, resample="down", fused=fused)
        self.bias2 = nn.Parameter(torch.zeros(1, outputs, 1, 1))
        self.style2 = EqualizedLinear(2 * outputs, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, inputs, 2h, 2h) to (B, outputs, h, h) and the sum of both styles (B, latent_dim)."""
        x, first = _normalise(self.conv1(x, self.bias1))
        x, second = _normalise(self.conv2(blur(x), self.bias2))
        return x, self.style1(first) + self.style2(second)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """LeakyReLU, then instance norm (eps 1e-5): the map, and the (mean, std) it had (B, 2C)."""
    x = F.leaky_relu(x, SLOPE, inplace=True)
    mean, variance = moments(x)
    # The published std has no eps, so the gradient of a constant channel is infinite; the floor changes no other.
    std = variance.clamp_min(1e-24).sqrt()
    scale = (variance + 1e-5).rsqrt()
    styles = torch.cat([mean, std], 1)[:, :, 0, 0]
    return torch.addcmul((-mean * scale).to(x.dtype), x, scale.to(x.dtype)), styles
