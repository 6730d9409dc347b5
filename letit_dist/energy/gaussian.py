"""Optimal transport between the Gaussians fitted to two domains: what an energy must beat beyond the mean shift."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from letit_dist.errors import UserError

LIMIT = 2048  # dimensions of a full covariance: its roots take cubic time
_LEAST = 1e-10  # of the largest variance: directions below do not vary, and nothing is stretched there

Batches = Tensor | Iterable[Tensor]


class GaussianTransport:
    """T(z) = m_t + A (z - m_s) with A = C_s^(-1/2) (C_s^(1/2) C_t C_s^(1/2))^(1/2) C_s^(-1/2), the optimal map for the
    squared distance between N(m_s, C_s) and N(m_t, C_t) (Peyre and Cuturi, 1803.00567, remark 2.31).

    For latents that are maps the covariances are diagonal, and A is the ratio of standard deviations.
    """

    def __init__(self, source_mean: Tensor, target_mean: Tensor, stretch: Tensor):
        self.source_mean, self.target_mean = source_mean, target_mean  # (*L)
        self.stretch = stretch  # (D, D), or (*L) where it is diagonal

    @property
    def diagonal(self) -> bool:
        """Whether every entry is transported on its own."""
        return self.stretch.shape == self.source_mean.shape

    @classmethod
    def fit(cls, source: Batches, target: Batches, *, diagonal: bool | None = None) -> GaussianTransport:
        """From latents (N, *L) of each domain, or batches of them.

        `diagonal` is True for maps if it is not given. A full covariance of no more samples than dimensions is
        shrunk towards a multiple of the identity by as much as Ledoit and Wolf (2004) find best. Raises UserError for
        empty domains, different shapes, one sample, and more dimensions than a full covariance may have.
        """
        x, y = _rows(source, "source"), _rows(target, "target")
        shape = x.shape[1:]
        if shape != y.shape[1:]:
            raise UserError(f"Gaussian transport: source latents are {tuple(shape)}, target {tuple(y.shape[1:])}")
        if min(len(x), len(y)) < 2:
            raise UserError(f"Gaussian transport: needs 2 samples a side, got {len(x)} and {len(y)}")
        source_mean, target_mean = (rows.mean(0, dtype=torch.float64).float() for rows in (x, y))
        if diagonal is None:
            diagonal = len(shape) > 1
        if diagonal:
            spread, wanted = (rows.double().std(0) for rows in (x, y))
            stretch = torch.where(spread > _LEAST**0.5 * spread.max(), wanted / spread, 0.0)
        elif math.prod(shape) > LIMIT:
            raise UserError(f"Gaussian transport: {math.prod(shape)} dimensions, a full covariance has at most {LIMIT}")
        else:
            stretch = _stretch(*(covariance(rows.flatten(1)) for rows in (x, y)))
        return cls(source_mean, target_mean, stretch.float())

    def translate(self, latents: Tensor, *, strength: float = 1.0) -> Tensor:
        """Latents (B, *L), moved by `strength` times the way to their image (McCann's interpolation)."""
        source, target, stretch = (part.to(latents) for part in (self.source_mean, self.target_mean, self.stretch))
        centred = latents - source
        moved = centred * stretch if self.diagonal else (centred.flatten(1) @ stretch).view_as(latents)
        return latents.lerp(moved + target, strength)


def _rows(batches: Batches, name: str) -> Tensor:
    parts = [batches] if isinstance(batches, Tensor) else list(batches)
    if not parts or not sum(map(len, parts)):
        raise UserError(f"Gaussian transport: no {name} latents")
    return torch.cat(parts)


def covariance(rows: Tensor) -> Tensor:
    """Unbiased, of (N, D) in float64; shrunk where N is at most D."""
    rows = rows.double() - rows.mean(0, dtype=torch.float64)
    count, dims = rows.shape
    plain = rows.t() @ rows / count
    if count > dims:
        return plain * count / (count - 1)
    # Ledoit and Wolf 2004, lemma 3.2 to 3.4: m, d^2, b^2 and the convex combination of m I and the plain estimate.
    scale = plain.diagonal().mean()
    identity = torch.eye(dims, dtype=plain.dtype, device=plain.device)
    distance = (plain - scale * identity).square().sum()
    error = (rows.square().sum(1).square().sum() / count - plain.square().sum()) / count
    share = (error / distance.clamp_min(torch.finfo(plain.dtype).tiny)).clamp(0, 1)
    return (share * scale * identity + (1 - share) * plain) * count / (count - 1)


def _stretch(source: Tensor, target: Tensor) -> Tensor:
    """A of (D, D) covariances."""
    values, axes = torch.linalg.eigh(source)
    keep = values > _LEAST * values.max()
    roots = torch.where(keep, values, 0.0).sqrt()
    inverse = torch.where(keep, 1 / roots, 0.0)
    root, unroot = ((axes * diagonal) @ axes.t() for diagonal in (roots, inverse))
    inner, turned = torch.linalg.eigh(root @ target @ root)
    return unroot @ ((turned * inner.clamp_min(0).sqrt()) @ turned.t()) @ unroot
