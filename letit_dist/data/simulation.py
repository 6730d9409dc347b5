"""What reading costs on any number of ranks, from the real order of samples and none of their bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from letit_dist.data import order
from letit_dist.data.index import Index
from letit_dist.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Samples of a data set: `sizes` (N,) in bytes, `shards` (N,) the number of the shard that holds each."""

    sizes: np.ndarray[Any, Any]
    shards: np.ndarray[Any, Any]

    @classmethod
    def like(cls, samples: int, size: int, shards: int, *, spread: float = 0.3, seed: int = 0) -> Layout:
        """`samples` of `size` bytes in the mean, log-normal with `spread`, in order over `shards` of equal counts."""
        if not 1 <= shards <= samples or size < 1:
            raise UserError(f"{samples} samples of {size} bytes in {shards} shards: at least 1 each, a sample a shard")
        drawn = np.random.default_rng(seed).lognormal(-(spread**2) / 2, spread, samples)
        return cls(np.maximum(1, drawn * size).astype(np.int64), np.arange(samples) * shards // samples)

    @classmethod
    def of(cls, index: Index) -> Layout:
        """That of packed shards; of images in several sizes, the largest file."""
        sizes = [max(size for _, size in index.files(sample).values()) for sample in range(len(index))]
        counts = [shard.samples for shard in index.shards]
        return cls(np.array(sizes, np.int64), np.repeat(np.arange(len(counts)), counts))


@dataclass(frozen=True)
class Reads:
    """One epoch on some ranks. Bytes and shards: of the rank that has least and of the one that has most."""

    ranks: int
    images: int  # a rank and step
    twice: int  # samples that came more than once
    never: int  # samples that did not come
    bytes: tuple[int, int]
    shards: tuple[int, int]
    straggler: float  # bytes of a step's busiest rank over those of the mean rank, mean over the steps
    place: float  # seconds from images_seen to the samples of a rank's next batch, with nothing kept from before


def simulate(layout: Layout, batch: int, ranks: int, *, epoch: int = 3, seed: int = 0) -> Reads:
    """Deal the batches of one epoch, in the middle of a run, to all ranks.

    Every step asks the reader's own functions for every rank's samples. Batches run across the ends of an epoch;
    counted are those of its samples that lie inside. Raises UserError where `batch` does not divide over `ranks`.
    """
    count, shards = len(layout.sizes), int(layout.shards[-1]) + 1
    begin, end = epoch * count, (epoch + 1) * count
    seen, taken = np.zeros(count, np.int64), np.zeros(ranks, np.int64)
    touched = np.zeros((ranks, shards), bool)
    straggling = []
    for step in range(begin // batch, -(-end // batch)):
        positions = np.stack([order.rank_positions(step * batch, batch, rank, ranks) for rank in range(ranks)])
        samples = order.sample_at(positions, seed, count)
        busy = layout.sizes[samples].sum(1)
        straggling.append(busy.max() / busy.mean())
        inside = (positions >= begin) & (positions < end)
        np.add.at(seen, samples[inside], 1)
        taken += np.where(inside, layout.sizes[samples], 0).sum(1)
        rank_of, _ = np.nonzero(inside)
        touched[rank_of, layout.shards[samples[inside]]] = True
    opened = touched.sum(1)
    return Reads(
        ranks,
        batch // ranks,
        int((seen > 1).sum()),
        int((seen == 0).sum()),
        (int(taken.min()), int(taken.max())),
        (int(opened.min()), int(opened.max())),
        float(np.mean(straggling)),
        _seconds_to_place(count, batch, ranks, seed),
    )


def _seconds_to_place(count: int, batch: int, ranks: int, seed: int) -> float:
    order.forget()
    images_seen = (37 * count + count // 2) // batch * batch
    begun = time.perf_counter()
    order.sample_at(order.rank_positions(images_seen, batch, ranks - 1, ranks), seed, count)
    return time.perf_counter() - begun
