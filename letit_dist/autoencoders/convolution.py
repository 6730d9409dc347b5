"""Convolutions that learn faster on a CPU, and a ReLU that leaves nothing behind.

On a GPU, under autocast, where nothing learns, for shapes that do not suit and without numba they are torch's own. On a
CPU maps go through in channels_last, where torch's forward pass and gradient of the input come near the rate of large
products, and its gradient of the weights to a third of it. That one, and the other two where there are many channels,
are taken by Winograd's minimal filtering (letit_dist/winograd.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from letit_dist.compiled import has_numba

if TYPE_CHECKING:
    from letit_dist.winograd import Scheme

_LEAST = 1 << 24  # multiplications of a direction below which its many small operations cost more than they save
_NARROW = 16  # channels below which torch's own gradients are as fast
_WIDE = 64  # channels on both sides from which the transforms cost less than the products they save
_TILE = 4  # sides of coarse maps must be multiples of it


def _rows_of(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W, C); a view of maps in channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


class _Layer(NamedTuple):
    """Kernels of 3 with stride 1 or of 4 with stride 2, padding 1."""

    stride: int
    transposed: bool

    def suits(self, x: Tensor, weight: Tensor) -> bool:
        """Whether gradients are taken here: where that is faster."""
        plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        # numba compiles for some 20 seconds, once on a machine: not for a program that translates a few images.
        learning = torch.is_grad_enabled() and has_numba()
        coarse = x.shape[2:] if self.transposed else [side // self.stride for side in x.shape[2:]]
        whole = all(side > 0 and side % _TILE == 0 for side in coarse)
        large = len(x) * math.prod(coarse) * weight.numel() >= _LEAST
        known = (self.stride, *weight.shape[2:]) in ((1, 3, 3), (2, 4, 4))
        return (
            plain
            and learning
            and known
            and whole
            and large
            and x.dtype == weight.dtype
            and x.dtype in (torch.float32, torch.float64)
        )

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.transposed:
            return F.conv_transpose2d(x, weight, bias, self.stride, 1)
        if self._by_scheme(weight):
            return self._correlate(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, 1)

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.transposed and self._by_scheme(weight):
            return self._correlate(gradient, weight)
        if self.transposed:
            return F.conv2d(gradient, weight, None, self.stride, 1)
        if self.stride == 1 and self._by_scheme(weight):
            return self._correlate(gradient, weight.flip(2, 3).transpose(0, 1))
        return conv2d_input(x.shape, weight, gradient, self.stride, 1)

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        fine, coarse = (gradient, x) if self.transposed else (x, gradient)
        if min(weight.shape[:2]) < _NARROW:
            return conv2d_weight(fine, weight.shape, coarse, self.stride, 1)
        return self._scheme(weight).weight_gradient(_rows_of(fine), _rows_of(coarse))

    def _correlate(self, fine: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._scheme(weight).correlate(_rows_of(fine), weight, bias)

    def _scheme(self, weight: Tensor) -> Scheme:
        from letit_dist.winograd import scheme

        return scheme(weight.shape[2] // self.stride, self.stride, weight.dtype)

    def _by_scheme(self, weight: Tensor) -> bool:
        # With stride 2 a tile saves less, and four times the channels are transformed.
        return weight.shape[0] >= _WIDE * self.stride and weight.shape[1] >= _WIDE


class _Convolve(torch.autograd.Function):
    """(x, weight, bias) to the convolution of x; with `relu` to (the convolution of ReLU(x), ReLU(x))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        layer: _Layer,
        relu: bool,
        overwrite: bool,
        again: Callable[[], Tensor] | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.layer, ctx.relu, ctx.again = layer, relu, again
        ctx.set_materialize_grads(False)
        if relu and overwrite:
            ctx.mark_dirty(x)
            start = x.relu_()
        else:
            start = x.relu() if relu else x
        ctx.save_for_backward(None if again else start, weight)
        y = layer.forward(start, weight, bias)
        return (y, start) if relu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, beside: Tensor | None = None) -> tuple[Tensor | None, ...]:
        layer, (start, weight) = ctx.layer, ctx.saved_tensors
        if ctx.again:
            with torch.no_grad():
                start = ctx.again().relu_()
        of_x = of_weight = of_bias = None
        if gradient is not None:
            if ctx.needs_input_grad[1]:
                of_weight = layer.weight_gradient(gradient, start, weight)
            if ctx.needs_input_grad[2]:
                of_bias = gradient.sum((0, 2, 3))
            if ctx.needs_input_grad[0]:
                of_x = layer.input_gradient(gradient, start, weight)
        if ctx.needs_input_grad[0] and beside is not None:
            of_x = beside.clone() if of_x is None else of_x.add_(beside)
        if ctx.relu and of_x is not None:
            # In place, which a ReLU by itself cannot do: nobody else has this gradient.
            torch.ops.aten.threshold_backward.grad_input(of_x, start, 0, grad_input=of_x)
        return of_x, of_weight, of_bias, None, None, None, None


def _after_relu(
    layer: nn.Conv2d | nn.ConvTranspose2d,
    x: Tensor,
    *,
    overwrite: bool = False,
    again: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(the convolution of ReLU(x), ReLU(x)) for x (B, C, H, W). With `overwrite`, ReLU(x) takes the place of x.

    `again` computes x another time: on a CPU the backward pass calls it, and ReLU(x) is not kept for that.
    """
    plan = _Layer(layer.stride[0], layer.transposed)
    if plan.suits(x, layer.weight):
        return _Convolve.apply(x, layer.weight, layer.bias, plan, True, overwrite, again)
    start = F.relu(x, inplace=overwrite)
    return layer(start), start


class Conv2d(nn.Conv2d):
    """torch's, faster on a CPU."""

    after_relu = _after_relu

    def forward(self, input: Tensor) -> Tensor:
        plan = _Layer(self.stride[0], False)
        if plan.suits(input, self.weight):
            return _Convolve.apply(input, self.weight, self.bias, plan, False, False, None)
        return super().forward(input)


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch's, faster on a CPU."""

    after_relu = _after_relu

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        plan = _Layer(self.stride[0], True)
        if output_size is None and plan.suits(input, self.weight):
            return _Convolve.apply(input, self.weight, self.bias, plan, False, False, None)
        return super().forward(input, output_size)


class JoinedConv2d(nn.Conv2d):
    """A pointwise convolution of several maps as if they were one, which then need not be made or kept."""

    def forward(self, *maps: Tensor) -> Tensor:
        """(B, C1, H, W), (B, C2, H, W), ... with sum C = in_channels to (B, out_channels, H, W)."""
        parts = self.weight.split([x.shape[1] for x in maps], 1)
        found = F.conv2d(maps[0], parts[0], self.bias)
        for x, part in zip(maps[1:], parts[1:], strict=True):
            found = found + F.conv2d(x, part)
        return found
