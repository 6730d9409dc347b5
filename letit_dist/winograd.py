"""Convolutions on a CPU with fewer multiplications: Winograd's minimal filtering (Lavin and Gray, 1509.09308).

In one dimension y = gather((filter w) * (spread x)), all three of them linear maps; in two, each goes along both axes.
With it a tile of outputs takes fewer multiplications than outputs times weights, and the sum over channels is a product
of large matrices, torch's. Spreading and gathering are numba's, which fuses their passes over memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from letit_dist.compiled import kernel

TILE = 4  # outputs of a tile along one axis
_TILES = 64  # taken at once
# Where the polynomials of the scheme are evaluated, beside infinity: the choice that rounds least (4e-6 of the largest
# output for 128 channels in float32; plain sums 1e-6, with 2 in place of 1/2 9e-6).
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
# Its threads are then torch's own; others would fight with those for the cores.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
_threads = torch.get_num_threads()
numba.set_num_threads(1)  # the first call starts them, and sets the number of torch's to that of the cores
torch.set_num_threads(_threads)

Array = NDArray[np.floating]


class Scheme:
    """Tiles of 4 x 4 outputs of filters of `taps` x `taps`, on maps each position of which holds stride^2 pixels.

    Maps are (B, H, W, C), contiguous: fine ones are inputs of a strided filter, to be padded by 1, coarse ones what it
    puts out.
    """

    def __init__(self, taps: int, stride: int, dtype: torch.dtype):
        self.taps, self.stride = taps, stride
        self.reach = reach = TILE + taps - 1  # inputs of a tile along one axis, and points
        points = np.array(_POINTS[: reach - 1])

        def evaluated(size: int) -> Array:  # of polynomials with `size` coefficients: (reach, size)
            return np.vstack([np.vander(points, size, increasing=True), np.eye(size)[-1]])

        spread = np.linalg.inv(evaluated(reach)).T
        # In `_spread` the first coefficient of each row is 1/2 or -1/2, and all are then exact.
        first = (np.abs(spread) > 1e-9).argmax(1)
        one = evaluated(taps) * 2 * np.abs(spread[np.arange(reach), first])[:, None]
        # No tensor: made where nothing has data (FakeTensor), it would be kept without.
        self._filter, self._dtype = np.kron(one, one), dtype

    @property
    def filter(self) -> Tensor:
        """Of both axes: (points, taps^2)"""
        return torch.from_numpy(self._filter).to(self._dtype)

    def correlate(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) and a filter (C', C, k, k) to what it puts out: (B, C', H', W') in channels_last."""
        outputs, inputs = weight.shape[:2]
        taps, stride = self.taps, self.stride
        split = weight.reshape(outputs, inputs, taps, stride, taps, stride).permute(2, 4, 3, 5, 1, 0)
        filters = (self.filter @ split.reshape(taps**2, -1)).view(self.reach**2, -1, outputs)
        side = [size // stride for size in x.shape[1:3]]
        # Not a view: what a ReLU overwrites must not be one.
        y = torch.empty(len(x), outputs, *side, dtype=x.dtype, memory_format=torch.channels_last)
        coarse = y.permute(0, 2, 3, 1)
        added = x.new_zeros(outputs) if bias is None else bias
        for first, fine, found in self._pieces(coarse, filters.shape[1], outputs):
            spread(x, stride, self.reach, first, fine)
            torch.bmm(fine, filters, out=found)
            gather(found, self.reach, first, added, coarse)
        return y

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Maps (B, H, W, C) and the gradient (B, H', W', C') of what `correlate` puts out to that of its
        filter, (C', C, k, k)."""
        inputs, outputs, taps, stride = x.shape[3], gradient.shape[3], self.taps, self.stride
        total = x.new_zeros(self.reach**2, stride**2 * inputs, outputs)
        for first, fine, coarse in self._pieces(gradient, stride**2 * inputs, outputs):
            spread(x, stride, self.reach, first, fine)
            evaluate(gradient, self.reach, first, coarse)
            total.baddbmm_(fine.transpose(1, 2), coarse)
        found = (self.filter.t() @ total.flatten(1)).view(taps, taps, stride, stride, inputs, outputs)
        return found.permute(5, 4, 0, 2, 1, 3).reshape(outputs, inputs, taps * stride, taps * stride)

    def _pieces(self, coarse: Tensor, inputs: int, outputs: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The first tile of each piece, and room for its values at the points: (points, tiles, inputs) and
        (points, tiles, outputs), the same for every piece."""
        tiles = coarse.shape[:3].numel() // TILE**2
        points, most = self.reach**2, min(tiles, _TILES)
        room = [(coarse.new_empty(points * most * n), n) for n in (inputs, outputs)]
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        for first in range(0, tiles, most):
            size = min(most, tiles - first)
            fine, found = (part[: points * size * n].view(points, size, n) for part, n in room)
            yield first, fine, found


scheme = functools.lru_cache(Scheme)


# Each of the three maps along one axis takes the first axis of (n, m, channels) to the second of (m, n', channels), so
# that twice takes both. LLVM makes vector instructions of them where the lines m are a number that it knows, the same
# for all: some of them may hold nothing.
_scalars = njit(fastmath=True, error_model="numpy")
_along_one = kernel(fastmath=True, error_model="numpy")
_tiles = kernel(fastmath=True, error_model="numpy", parallel=True, nogil=True)


def _operation(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A kernel of arrays as an operation of torch, which also those find that run without data (FakeTensor)."""

    def register(kernel: Callable[..., None]) -> Callable[..., None]:
        def run(*given: Tensor | int) -> None:
            kernel(*(x.detach().numpy() if isinstance(x, Tensor) else x for x in given))

        name = f"letit_dist::{kernel.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "cpu", run)
        torch.library.register_fake(name, lambda *given: None)
        return getattr(torch.ops.letit_dist, kernel.__name__).default

    return register


@_scalars
def _spread5(a: Any, b: Any, c: Any, d: Any, e: Any, half: Any) -> Any:
    return half * (a - c) - b + d, half * (c - b) + d, half * (c - b) + c - d, half * (b - d), half * (b - d) - c + e


@_scalars
def _spread6(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, half: Any) -> Any:
    m, n, quarter = b - d, c - e, half * half
    return (
        half * (a + e - m) - quarter * m - c,
        half * (e - b) + quarter * (c + d) + d,
        quarter * (c - d) - half * (b + e) + c,
        half * m + quarter * n,
        half * m - n,
        half * (b + f - n) - quarter * n - d,
    )


@_along_one
def _spread(x: Array, y: Array) -> None:
    """The inputs of a tile, 5 or 6, to as many."""
    half = x.dtype.type(0.5)
    if len(x) == 5:
        for m in range(5):
            for k in range(x.shape[2]):
                y[m, 0, k], y[m, 1, k], y[m, 2, k], y[m, 3, k], y[m, 4, k] = _spread5(
                    x[0, m, k], x[1, m, k], x[2, m, k], x[3, m, k], x[4, m, k], half
                )
    else:
        for m in range(6):
            for k in range(x.shape[2]):
                y[m, 0, k], y[m, 1, k], y[m, 2, k], y[m, 3, k], y[m, 4, k], y[m, 5, k] = _spread6(
                    x[0, m, k], x[1, m, k], x[2, m, k], x[3, m, k], x[4, m, k], x[5, m, k], half
                )


@_scalars
def _values(a: Any, b: Any, c: Any, d: Any, half: Any, two: Any) -> Any:
    even, odd = a + c, b + d
    return a, even + odd, even - odd, a + half * (b + half * (c + half * d)), a - two * (b - two * (c - two * d)), d


@_along_one
def _evaluate(x: Array, y: Array) -> None:
    """Four coefficients of a polynomial to its values at 5 or 6 points."""
    half, two = x.dtype.type(0.5), x.dtype.type(2)
    if y.shape[1] == 5:
        for m in range(5):
            for k in range(x.shape[2]):
                y[m, 0, k], y[m, 1, k], y[m, 2, k], y[m, 3, k], _, y[m, 4, k] = _values(
                    x[0, m, k], x[1, m, k], x[2, m, k], x[3, m, k], half, two
                )
    else:
        for m in range(6):
            for k in range(x.shape[2]):
                y[m, 0, k], y[m, 1, k], y[m, 2, k], y[m, 3, k], y[m, 4, k], y[m, 5, k] = _values(
                    x[0, m, k], x[1, m, k], x[2, m, k], x[3, m, k], half, two
                )


@_scalars
def _coefficients(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, half: Any, two: Any) -> Any:
    even, odd, quarter, four = b + c, b - c, half * half, two * two
    return (
        a + even + d + e,
        odd + half * d - two * e,
        even + quarter * d + four * e,
        odd + half * quarter * d - two * four * e + f,
    )


@_along_one
def _gather(x: Array, y: Array) -> None:
    """The transpose of `_evaluate`."""
    half, two = x.dtype.type(0.5), x.dtype.type(2)
    if len(x) == 5:
        for m in range(5):
            for k in range(x.shape[2]):
                y[m, 0, k], y[m, 1, k], y[m, 2, k], y[m, 3, k] = _coefficients(
                    x[0, m, k], x[1, m, k], x[2, m, k], x[3, m, k], x.dtype.type(0), x[4, m, k], half, two
                )
    else:
        for m in range(6):
            for k in range(x.shape[2]):
                y[m, 0, k], y[m, 1, k], y[m, 2, k], y[m, 3, k] = _coefficients(
                    x[0, m, k], x[1, m, k], x[2, m, k], x[3, m, k], x[4, m, k], x[5, m, k], half, two
                )


@kernel()
def _place(tile: int, rows: int, columns: int) -> tuple[int, int, int]:
    """The sample, the row and the column of a tile."""
    return tile // (rows * columns), tile // columns % rows, tile % columns


@_operation("(Tensor x, int stride, int reach, int first, Tensor(a!) out) -> ()")
@_tiles
def spread(x: Array, stride: int, reach: int, first: int, out: Array) -> None:
    """The fine maps x (B, H, W, C) around the tiles from `first` on: out (points, tiles, stride^2 C)."""
    height, width, channels = x.shape[1:]
    for tile in prange(out.shape[1]):
        sample, row, column = _place(first + tile, height // (stride * TILE), width // (stride * TILE))
        window = np.empty((reach, reach, channels), x.dtype)
        half = np.empty((reach, reach, channels), x.dtype)
        for phase in range(stride * stride):
            for i in range(reach):
                down = (row * TILE + i) * stride + phase // stride - 1
                for j in range(reach):
                    right = (column * TILE + j) * stride + phase % stride - 1
                    if 0 <= down < height and 0 <= right < width:
                        for k in range(channels):
                            window[i, j, k] = x[sample, down, right, k]
                    else:
                        window[i, j] = 0
            _spread(window, half)
            _spread(half, window)
            for i in range(reach):
                for j in range(reach):
                    for k in range(channels):
                        out[i * reach + j, tile, phase * channels + k] = window[i, j, k]


@_operation("(Tensor y, int reach, int first, Tensor(a!) out) -> ()")
@_tiles
def evaluate(y: Array, reach: int, first: int, out: Array) -> None:
    """The coarse maps y (B, H, W, C) in the tiles from `first` on: out (points, tiles, C)."""
    height, width, channels = y.shape[1:]
    for tile in prange(out.shape[1]):
        sample, row, column = _place(first + tile, height // TILE, width // TILE)
        window = np.zeros((reach, reach, channels), y.dtype)
        half = np.empty((reach, reach, channels), y.dtype)
        for i in range(TILE):
            for j in range(TILE):
                for k in range(channels):
                    window[i, j, k] = y[sample, row * TILE + i, column * TILE + j, k]
        _evaluate(window, half)
        _evaluate(half, window)
        for i in range(reach):
            for j in range(reach):
                for k in range(channels):
                    out[i * reach + j, tile, k] = window[i, j, k]


@_operation("(Tensor found, int reach, int first, Tensor bias, Tensor(a!) y) -> ()")
@_tiles
def gather(found: Array, reach: int, first: int, bias: Array, y: Array) -> None:
    """Values at the points (points, tiles, C), and a bias (C,), to the tiles from `first` on of coarse maps."""
    height, width, channels = y.shape[1:]
    for tile in prange(found.shape[1]):
        sample, row, column = _place(first + tile, height // TILE, width // TILE)
        window = np.empty((reach, reach, channels), y.dtype)
        half = np.zeros((reach, reach, channels), y.dtype)
        for i in range(reach):
            for j in range(reach):
                for k in range(channels):
                    window[i, j, k] = found[i * reach + j, tile, k]
        _gather(window, half)
        _gather(half, window)
        for i in range(TILE):
            for j in range(TILE):
                for k in range(channels):
                    y[sample, row * TILE + i, column * TILE + j, k] = window[i, j, k] + bias[k]
