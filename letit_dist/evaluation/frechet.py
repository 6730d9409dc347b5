"""The Frechet distance between two sets of vectors, fast where there are fewer of them than dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from letit_dist.errors import UserError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians fitted to (N, *L) and (M, *L), in float64 (1706.08500, eq. 6).

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), with unbiased covariances. The last trace is the sum of
    the singular values of X Y', X and Y being the centred rows over the roots of N - 1 and M - 1: its squares are the
    eigenvalues of X Y'Y X', those of C_a C_b that are not zero. So the matrix has min(N, D) rows and min(M, D)
    columns, and no covariance of D x D is made where there are few rows. Needs two rows a side.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    if a.shape[1] != b.shape[1]:
        raise UserError(f"Frechet distance: {a.shape[1]} dimensions on one side, {b.shape[1]} on the other")
    if min(len(a), len(b)) < 2:
        raise UserError(f"Frechet distance: needs 2 samples a side, got {len(a)} and {len(b)}")
    gap = (a.mean(0) - b.mean(0)).square().sum()
    x, y = _spread(a), _spread(b)
    shared = torch.linalg.svdvals(_short(x) @ _short(y).t()).sum()
    return float(gap + x.square().sum() + y.square().sum() - 2 * shared)


def _spread(rows: Tensor) -> Tensor:
    """Rows (N, D) whose plain sum of outer products is the covariance."""
    return (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5


def _short(x: Tensor) -> Tensor:
    """(min(N, D), D) with the same X'X."""
    return x if len(x) <= x.shape[1] else torch.linalg.qr(x, mode="r").R
