"""Which sample comes when: a pure function of (seed, epoch), blind to ranks, workers and shards.

The training stream is endless. Stream position p lies in epoch p // N, slot p % N, and its sample is
permutation(seed, epoch)[slot], so each sample comes once an epoch and batches run across epoch ends.
Where a run is, is one integer: images_seen, the position of its next image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np

from letit_dist.errors import UserError


def _splitmix64(counter: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """SplitMix64's output function (Steele et al. 2014): uint64 (N,) -> uint64 (N,), arithmetic modulo 2**64."""
    x = counter * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@cache
def _orders(seed: int, count: int, purpose: str) -> Callable[[int], np.ndarray[Any, Any]]:
    # The two epochs that one batch can touch.
    return lru_cache(maxsize=2)(lambda epoch: _permutation(seed, epoch, count, purpose))


def forget() -> None:
    """Drop the orders that are kept, as in a process that has just started."""
    _orders.cache_clear()


def permutation(seed: int, epoch: int, count: int, purpose: str = "order") -> np.ndarray[Any, Any]:
    """The order of one epoch: read-only int64 (count,), the same on every platform and NumPy version."""
    return _orders(seed, count, purpose)(epoch)


def _permutation(seed: int, epoch: int, count: int, purpose: str) -> np.ndarray[Any, Any]:
    # NumPy promises no stable stream for its Generator, and a resumed run may have another NumPy.
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=8).digest()
    start = np.uint64(int.from_bytes(digest, "little"))
    order = np.argsort(_splitmix64(np.arange(count, dtype=np.uint64) + start), kind="stable")
    order = order.astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def sample_at(positions: np.ndarray[Any, Any], seed: int, count: int, purpose: str = "order") -> np.ndarray[Any, Any]:
    """Samples (int64, same shape) at stream positions of a data set with `count` samples."""
    positions = np.asarray(positions, dtype=np.int64)
    epochs, slots = np.divmod(positions, count)
    if positions.size and (epoch := int(epochs.min())) == epochs.max():
        return permutation(seed, epoch, count, purpose)[slots]
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        samples[inside] = permutation(seed, epoch, count, purpose)[slots[inside]]
    return samples


def rank_positions(images_seen: int, batch: int, rank: int, world: int) -> np.ndarray[Any, Any]:
    """Stream positions of one rank's contiguous slice of the global batch at images_seen: int64 (batch/world,)."""
    if batch % world:
        raise UserError(f"a batch of {batch} cannot be dealt to {world} ranks: make it a multiple of {world}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    share = batch // world
    first = images_seen + rank * share
    return np.arange(first, first + share, dtype=np.int64)
