"""Convolutions whose gradients a CPU takes as products of matrices, and a ReLU that leaves nothing behind.

On a GPU, under autocast and for shapes that do not suit they are torch's own. On a CPU maps go through in
channels_last, where torch's forward pass and gradient of the input come near the rate of large products, and its
gradient of the weights to a third of it. That one, and the other two where there are many channels, are taken by
Winograd's minimal filtering (Lavin and Gray, 1509.09308, as a bilinear form): a tile of outputs takes fewer
multiplications than outputs times weights, and the sum over channels is a product of large matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

_TILES = 128  # taken at once: their transforms, about 2 MiB at 128 channels, then stay in the cache
_NARROW = 16  # channels below which torch's own gradients are as fast
_WIDE = 64  # channels on both sides from which the transforms cost less than the products they save
# Where the polynomials of the scheme are evaluated, beside infinity: the choice that rounds least (4e-6 of the largest
# output for 128 channels in float32; plain sums 1e-6, with 2 in place of 1/2 9e-6).
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
_TILE = 4  # outputs of a tile along one axis
Convolution = nn.Conv2d | nn.ConvTranspose2d


class _Scheme:
    """Tiles of 4 x 4 outputs of filters of `taps` x `taps`, on maps of which each position holds stride x stride pixels.

    In one dimension y = gather^T [(filter w) * (spread x)]; in two, with the Kronecker squares of these matrices.
    Maps are (B, H, W, C): fine ones are padded inputs of a strided filter, coarse ones what it puts out.
    """

    def __init__(self, taps: int, stride: int, dtype: torch.dtype):
        self.taps, self.stride = taps, stride
        self.reach = reach = _TILE + taps - 1  # inputs of a tile along one axis, and points
        points = torch.tensor(_POINTS[: reach - 1], dtype=torch.float64)

        def evaluated(size: int) -> Tensor:  # of polynomials with `size` coefficients: (reach, size)
            at_infinity = F.one_hot(torch.tensor([size - 1]), size)
            return torch.cat([torch.vander(points, size, increasing=True), at_infinity])

        spread = torch.linalg.inv(evaluated(reach)).T
        scale = spread.abs().amax(1, keepdim=True)
        self.spread, self.filter, self.gather = (
            torch.kron(one, one).to(dtype) for one in (spread / scale, evaluated(taps) * scale, evaluated(_TILE))
        )

    def correlate(self, x: Tensor, weight: Tensor) -> Tensor:
        """Padded maps (B, H, W, C) and a filter (C', C, k, k) to the maps (B, H', W', C') that it puts out."""
        outputs, inputs = weight.shape[:2]
        taps, stride = self.taps, self.stride
        split = weight.reshape(outputs, inputs, taps, stride, taps, stride).permute(2, 4, 3, 5, 1, 0)
        filters = (self.filter @ split.reshape(taps**2, -1)).view(self.reach**2, -1, outputs)
        side = [size // stride - taps + 1 for size in x.shape[1:3]]
        y = x.new_empty(len(x), *side, outputs)
        for fine, coarse in self._pieces(x, y):
            found = self.gather.t() @ torch.bmm(self._spread(fine), filters).flatten(1)
            batch, high, wide, channels = coarse.shape
            tiles = found.view(_TILE, _TILE, batch, high // _TILE, wide // _TILE, channels)
            coarse.unflatten(2, (-1, _TILE)).unflatten(1, (-1, _TILE)).copy_(tiles.permute(2, 3, 0, 4, 1, 5))
        return y

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Padded maps (B, H, W, C) and the gradient (B, H', W', C') of what `correlate` puts out to that of its
        filter, (C', C, k, k)."""
        inputs, outputs, taps, stride = x.shape[3], gradient.shape[3], self.taps, self.stride
        total = x.new_zeros(self.reach**2, stride**2 * inputs, outputs)
        for fine, coarse in self._pieces(x, gradient):
            tiles = coarse.unflatten(2, (-1, _TILE)).unflatten(1, (-1, _TILE)).permute(2, 4, 0, 1, 3, 5)
            spread = (self.gather @ tiles.reshape(_TILE**2, -1)).view(self.reach**2, -1, outputs)
            total.baddbmm_(self._spread(fine).transpose(1, 2), spread)
        found = (self.filter.t() @ total.flatten(1)).view(taps, taps, stride, stride, inputs, outputs)
        return found.permute(5, 4, 0, 2, 1, 3).reshape(outputs, inputs, taps * stride, taps * stride)

    def _spread(self, fine: Tensor) -> Tensor:
        """(B, H, W, C) to (points, tiles, stride^2 C)"""
        stride, reach = self.stride, self.reach
        windows = fine.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))
        windows = windows.unfold(1, reach, _TILE).unfold(3, reach, _TILE).permute(6, 7, 0, 1, 3, 2, 4, 5)
        spread = self.spread @ windows.reshape(reach**2, -1)
        return spread.view(reach**2, -1, stride**2 * fine.shape[3])

    def _pieces(self, fine: Tensor, coarse: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Both maps in pieces of about `_TILES` tiles: some samples, or some rows of one."""
        rows, columns = coarse.shape[1] // _TILE, coarse.shape[2] // _TILE
        samples, rows = max(1, _TILES // (rows * columns)), min(rows, max(1, _TILES // columns))
        for first in range(0, len(coarse), samples):
            for top in range(0, coarse.shape[1], rows * _TILE):
                bottom = min(top + rows * _TILE, coarse.shape[1])
                inputs = slice(top * self.stride, (bottom + self.taps - 1) * self.stride)
                yield fine[first : first + samples, inputs], coarse[first : first + samples, top:bottom]


_scheme = functools.lru_cache(_Scheme)


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 1, 1, 1))


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
        coarse = x.shape[2:] if self.transposed else [side // self.stride for side in x.shape[2:]]
        whole = all(side > 0 and side % _TILE == 0 for side in coarse)
        exact = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
        return plain and whole and exact and min(weight.shape[:2]) >= _NARROW

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.transposed:
            return F.conv_transpose2d(x, weight, bias, self.stride, 1)
        if self._by_scheme(weight):
            y = _scheme(3, 1, x.dtype).correlate(_padded(_rows_of(x)), weight)
            return y.add_(bias).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, self.stride, 1)

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.transposed:
            return F.conv2d(gradient, weight, None, self.stride, 1)
        if self._by_scheme(weight):
            turned = weight.flip(2, 3).transpose(0, 1)
            return _scheme(3, 1, x.dtype).correlate(_padded(_rows_of(gradient)), turned).permute(0, 3, 1, 2)
        return conv2d_input(x.shape, weight, gradient, self.stride, 1)

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        fine, coarse = (gradient, x) if self.transposed else (x, gradient)
        scheme = _scheme(weight.shape[2] // self.stride, self.stride, x.dtype)
        return scheme.weight_gradient(_padded(_rows_of(fine)), _rows_of(coarse))

    def _by_scheme(self, weight: Tensor) -> bool:
        return self.stride == 1 and min(weight.shape[:2]) >= _WIDE


class _Convolve(torch.autograd.Function):
    """(x, weight, bias) to the convolution of x; with `relu` to (the convolution of ReLU(x), ReLU(x))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: _Layer, relu: bool, overwrite: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.layer, ctx.relu = layer, relu
        ctx.set_materialize_grads(False)
        if relu and overwrite:
            ctx.mark_dirty(x)
            start = x.relu_()
        else:
            start = x.relu() if relu else x
        ctx.save_for_backward(start, weight)
        y = layer.forward(start, weight, bias)
        return (y, start) if relu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, beside: Tensor | None = None) -> tuple[Tensor | None, ...]:
        layer, (start, weight) = ctx.layer, ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if gradient is not None:
            gradient = gradient.contiguous(memory_format=torch.channels_last)
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
        return of_x, of_weight, of_bias, None, None, None


def convolve(layer: Convolution, x: Tensor) -> Tensor:
    """`layer(x)`, for (B, C, H, W)."""
    plan = _Layer(layer.stride[0], layer.transposed)
    if not plan.suits(x, layer.weight):
        return layer(x)
    return _Convolve.apply(x, layer.weight, layer.bias, plan, False, False)


def rectify_and_convolve(layer: Convolution, x: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """(layer(ReLU(x)), ReLU(x)) for x (B, C, H, W). With `overwrite`, ReLU(x) takes the place of x."""
    plan = _Layer(layer.stride[0], layer.transposed)
    if not plan.suits(x, layer.weight):
        start = F.relu(x, inplace=overwrite)
        return layer(start), start
    return _Convolve.apply(x, layer.weight, layer.bias, plan, True, overwrite)
