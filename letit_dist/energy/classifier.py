"""A linear classifier of latents: has a chain arrived in the target domain?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from letit_dist.errors import UserError

_GRID = 8  # maps are averaged to at most so many positions a side: where things are must not need many samples
_STRENGTHS = 10.0 ** torch.arange(-4, 3, dtype=torch.float64)  # of the ridge, in units of the mean variance


@dataclass(frozen=True)
class LatentClassifier:
    """score(z) = w . (features - mean), above 0 on the target's side."""

    weight: Tensor  # (F,)
    mean: Tensor  # (F,)
    accuracy: float  # share of the samples that it gets right when they are left out of the fit

    @classmethod
    def fit(cls, source: Iterable[Tensor], target: Iterable[Tensor]) -> LatentClassifier:
        """Ridge regression to -1 and 1 from latents in batches (B, *L), each domain with the same weight.

        In closed form, with the ridge that predicts samples best which are left out one at a time. Takes memory for
        a few thousand samples. Raises UserError for fewer than two a domain.
        """
        sides = [[_features(part).double() for part in side] for side in (source, target)]
        counts = [sum(map(len, side)) for side in sides]
        if min(counts) < 2:
            raise UserError(f"a latent classifier needs two samples of each domain, got {counts[0]} and {counts[1]}")
        x = torch.cat([part for side in sides for part in side])  # (N, F)
        goal = torch.cat([x.new_full((count,), value) for count, value in zip(counts, (-1.0, 1.0), strict=True)])
        # Centred between the domains, not on the mean of all samples: neither side then counts more.
        mean = (x[: counts[0]].mean(0) + x[counts[0] :].mean(0)) / 2
        x = x - mean
        # In the dual, (N, N): the features are often more than the samples.
        gram = x @ x.t()
        values, vectors = torch.linalg.eigh(gram)
        scale = float(gram.diagonal().mean())
        if scale == 0:
            raise UserError("a latent classifier cannot tell apart domains whose latents are all equal")
        best: tuple[float, float, Tensor] | None = None
        for strength in _STRENGTHS.tolist():
            inverse = (vectors / (values.clamp_min(0) + strength * scale)) @ vectors.t()
            dual = inverse @ goal
            left_out = dual / inverse.diagonal()  # goal - prediction, each without the sample itself
            error = float(left_out.square().mean())
            if best is None or error < best[0]:
                right = ((goal - left_out) * goal > 0).double()
                accuracy = float((right[: counts[0]].mean() + right[counts[0] :].mean()) / 2)
                best = (error, accuracy, dual)
        assert best is not None
        _, accuracy, dual = best
        return cls((x.t() @ dual).float(), mean.float(), accuracy)

    def score(self, latents: Tensor) -> Tensor:
        """(B, *L) to (B,), above 0 for the target."""
        return (_features(latents) - self.mean.to(latents)) @ self.weight.to(latents)

    def is_target(self, latents: Tensor) -> Tensor:
        """(B, *L) to (B,) bool: what `LangevinSampler.sample` takes as `until`."""
        return self.score(latents) > 0


def _features(latents: Tensor) -> Tensor:
    """(B, *L) to (B, F)."""
    if latents.ndim == 4 and latents.shape[-1] > _GRID:
        latents = F.adaptive_avg_pool2d(latents, _GRID)
    return latents.flatten(1)
