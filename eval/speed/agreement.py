"""How far apart two results are, and full precision to find it in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from letit_dist.errors import UserError


@torch.no_grad()
def apart(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference, in units of the largest entry of `scale` (of `expected` if None)."""
    if not found.numel():
        return 0.0
    return float((found - expected).abs().max() / (expected if scale is None else scale).abs().max())


def require_agreement(found: dict[str, float], tolerance: float) -> None:
    """UserError for the first kind of result whose difference is beyond the tolerance, or no number."""
    for kind, difference in found.items():
        if not difference <= tolerance:
            raise UserError(f"the two sides disagree: {kind} by {difference:.2g}, allowed are {tolerance:g}")


def listed(found: dict[str, float]) -> str:
    """The differences in words, for a table."""
    return ", ".join(f"{kind} {difference:.0e}" for kind, difference in found.items())


def compile_methods(model: object, *names: str, backend: str) -> None:
    """By torch.compile, in place."""
    for name in names:
        setattr(model, name, torch.compile(getattr(model, name), backend=backend))


class HasPrecision(Protocol):
    precision: Any  # a word, of few or of many


@contextlib.contextmanager
def full_precision(*models: HasPrecision) -> Iterator[None]:
    """No autocast in any of the models, nor the shortened products that a GPU takes by default."""
    products: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    shortened = [flags.allow_tf32 for flags in products]
    precisions = [model.precision for model in models]
    try:
        for flags in products:
            flags.allow_tf32 = False
        for model in models:
            model.precision = "fp32"
        yield
    finally:
        for flags, value in zip(products, shortened, strict=True):
            flags.allow_tf32 = value
        for model, precision in zip(models, precisions, strict=True):
            model.precision = precision
