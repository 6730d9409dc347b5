"""Randomness that does not know about ranks, workers or batches.

Every draw is a function of (seed, purpose, index), where index is the global sample index (what belongs to
one sample) or the global batch index (what is shared by a batch). The same run therefore makes the same
draws on any number of ranks, and a resumed run needs no saved generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def seed_for(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed, a pure function of its arguments on every platform."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator for one (seed, purpose, index)."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, index))


def _indices(indices: Tensor | Iterable[int]) -> list[int]:
    return indices.tolist() if isinstance(indices, Tensor) else [int(index) for index in indices]


def normal(
    shape: Sequence[int],
    seed: int,
    purpose: str,
    indices: Tensor | Iterable[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    drawn_on: torch.device | str = "cpu",
) -> Tensor:
    """N(0, 1) draws, one row an index: (len(indices), *shape). Drawn in float32 on the CPU, then moved.

    `drawn_on` draws where the tensor is needed: for large draws, whose values then depend on the kind of device.
    """
    rows = [
        torch.randn(
            tuple(shape),
            generator=torch.Generator(drawn_on).manual_seed(seed_for(seed, purpose, i)),
            device=drawn_on,
        )
        for i in _indices(indices)
    ]
    return torch.stack(rows).to(device=device, dtype=dtype)


def uniform(seed: int, purpose: str, indices: Tensor | Iterable[int]) -> Tensor:
    """U[0, 1) draws, one an index: (len(indices),) float64 on the CPU."""
    # The upper 53 bits are exact in float64; all 63 could round up to 1.
    draws = [(seed_for(seed, purpose, i) >> 10) / 2**53 for i in _indices(indices)]
    return torch.tensor(draws, dtype=torch.float64)
