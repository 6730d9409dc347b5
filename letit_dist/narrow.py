"""A training step of a narrow energy on a CPU (eq. 2 and 6): chains, energies and gradients by kernels of numba.

In such a network an operation of torch takes longer to start than to compute. Products are sums over rows that stay in
the nearest cache; a chain is a straight line until one of its hidden units changes its sign, and only such units
correct its direction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letit_dist.compiled import kernel

LANES = 4  # numbers taken at once

Array = NDArray[np.floating]
# Branches on signs would be mispredicted: below, factors are chosen, and changes counted.
_kernel = kernel(error_model="numpy", fastmath={"contract", "nsz"})


def contrastive_step(
    source: Tensor,
    target: Tensor,
    first: Tensor,
    bias: Tensor,
    last: Tensor,
    *,
    slope: float,
    length: float,
    steps: int,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Of E(z) = last . a(first z + bias) for a LeakyReLU of `slope`, after chains of `steps` > 0 steps by -length dE/dz
    from `source` (B, L): ([mean E(target), mean E(translated), mean root mean square of the moves], gradients of
    mean E(target) - mean E(translated) by `first` (h, L), `bias` (h,) and `last` (h,)).

    `target` (B', L); L and h are multiples of 4; all on a CPU, row-major and of one dtype, float32 or float64.
    """
    numbers = torch.empty(3, dtype=source.dtype)
    gradients = torch.empty_like(first), torch.empty_like(bias), torch.empty_like(last)
    given = [tensor.detach().numpy() for tensor in (source, target, first, bias, last)]
    real = given[0].dtype.type
    found = [tensor.numpy() for tensor in (numbers, *gradients)]
    _step(*given, real(slope), real(length), steps, *found)
    return numbers, gradients


@_kernel
def _step(
    source: Array,
    target: Array,
    first: Array,
    bias: Array,
    last: Array,
    slope: Any,
    length: Any,
    steps: int,
    numbers: Array,
    of_first: Array,
    of_bias: Array,
    of_last: Array,
) -> None:
    units, size = first.shape
    across = np.empty((size, units), first.dtype)
    for unit in range(units):
        for column in range(size):
            across[column, unit] = first[unit, column]
    of_first[:] = 0
    of_bias[:] = 0
    of_last[:] = 0
    ended = source.copy()
    for side in range(2):
        points = ended if side else target
        rows = len(points)
        hidden = np.empty((rows, units), first.dtype)
        hidden[:] = bias
        _add_product(points, across, hidden)
        factors = np.empty_like(hidden)  # dE/dhidden
        _bend(hidden, last, slope, factors)
        if side:
            # One row more, of zeros, for a unit that does not change.
            gram = np.zeros((units + 1, units), first.dtype)
            _add_product(first, across, gram)
            total = np.zeros_like(hidden)
            _descend(hidden, factors, gram, last, slope, length, steps, total)
            _add_product(total, first, ended)
            numbers[2] = _distance(source, ended)
        share = (-1 if side else 1) / first.dtype.type(rows)
        numbers[side] = _add_means(hidden, factors, last, slope, share, of_bias, of_last)
        _add_outer(factors, points, of_first)


@_kernel
def _add_product(x: Array, matrix: Array, result: Array) -> None:
    """result (rows, n) += x (rows, m) @ matrix (m or more, n)"""
    for row in range(x.shape[0]):
        for i in range(0, x.shape[1], LANES):
            a, b, c, d = x[row, i], x[row, i + 1], x[row, i + 2], x[row, i + 3]
            for k in range(result.shape[1]):
                two = a * matrix[i, k] + b * matrix[i + 1, k]
                result[row, k] += two + (c * matrix[i + 2, k] + d * matrix[i + 3, k])


@_kernel
def _add_outer(x: Array, y: Array, result: Array) -> None:
    """result (m, n) += x.T (m, rows) @ y (rows, n)"""
    whole = x.shape[0] // LANES * LANES
    for row in range(0, whole, LANES):
        for i in range(x.shape[1]):
            a, b, c, d = x[row, i], x[row + 1, i], x[row + 2, i], x[row + 3, i]
            for k in range(y.shape[1]):
                two = a * y[row, k] + b * y[row + 1, k]
                result[i, k] += two + (c * y[row + 2, k] + d * y[row + 3, k])
    for row in range(whole, x.shape[0]):
        for i in range(x.shape[1]):
            for k in range(y.shape[1]):
                result[i, k] += x[row, i] * y[row, k]


@_kernel
def _bend(hidden: Array, last: Array, slope: Any, factors: Array) -> None:
    """dE/dhidden of each row."""
    one = last.dtype.type(1)
    for row in range(hidden.shape[0]):
        for k in range(hidden.shape[1]):
            factors[row, k] = last[k] * (one if hidden[row, k] > 0 else slope)


@_kernel
def _descend(
    hidden: Array, factors: Array, gram: Array, last: Array, slope: Any, length: Any, steps: int, total: Array
) -> None:
    """Hidden units and their factors to where the chains end; total += -length times the sum of the factors."""
    one = last.dtype.type(1)
    units = last.shape[0]
    speed = np.zeros_like(hidden)
    _add_product(factors, gram, speed)
    change, changed = np.zeros(units + 1, last.dtype), np.zeros(units + 1, np.int64)
    for row in range(hidden.shape[0]):
        for step in range(steps):
            for k in range(units):
                total[row, k] -= length * factors[row, k]
                hidden[row, k] -= length * speed[row, k]
                now = last[k] * (one if hidden[row, k] > 0 else slope)
                change[k] = now - factors[row, k]
                factors[row, k] = now
            if step + 1 == steps:
                break
            count = 0
            for k in range(units):
                changed[count] = k
                count += change[k] != 0
            changed[count] = units
            for place in range(0, count, 2):
                i, j = changed[place], changed[place + 1]
                a, b = change[i], change[j]
                for k in range(units):
                    speed[row, k] += a * gram[i, k] + b * gram[j, k]


@_kernel
def _add_means(
    hidden: Array, factors: Array, last: Array, slope: Any, share: Any, of_bias: Array, of_last: Array
) -> Any:
    """The mean energy of the rows. Factors become gradients of `share` times the sum of the rows' energies.

    Those of the bias and the last layer are added to what is there.
    """
    one = last.dtype.type(1)
    activations = np.zeros_like(last)
    for row in range(hidden.shape[0]):
        for k in range(hidden.shape[1]):
            activations[k] += hidden[row, k] * (one if hidden[row, k] > 0 else slope)
            factors[row, k] *= share
            of_bias[k] += factors[row, k]
    mean = last.dtype.type(0)
    for k in range(hidden.shape[1]):
        of_last[k] += share * activations[k]
        mean += last[k] * activations[k]
    return mean / hidden.shape[0]


@_kernel
def _distance(source: Array, ended: Array) -> float:
    """Mean over rows of the root mean square of their differences."""
    total = 0.0
    for row in range(source.shape[0]):
        squares = source.dtype.type(0)
        for k in range(source.shape[1]):
            squares += (ended[row, k] - source[row, k]) ** 2
        total += np.sqrt(squares / source.shape[1])
    return total / source.shape[0]
