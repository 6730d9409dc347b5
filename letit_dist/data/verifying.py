"""Whether shards still have the bytes that their index was made of, found out while a run learns from them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from letit_dist.data.index import Index
from letit_dist.ranks import place_on_machine

# Seconds that a run may be held up by it at its start: a small set is known to be whole before anything is learnt.
PATIENCE = 1.0


class Verification:
    """Hashes every local shard of some folders once, in a thread of low priority.

    They are dealt over the ranks of this machine, since its copy may be its own; with `place`, (rank, ranks) of the
    whole world, over all of these, for storage that all machines share. Shards on a server are hashed by remote.py.
    """

    def __init__(self, indexes: Sequence[Index], place: tuple[int, int] | None = None):
        rank, ranks = place or place_on_machine()
        shards = [(index, shard) for index in indexes if isinstance(index.folder, Path) for shard in index.shards]
        self._mine = shards[rank::ranks]
        self._first = rank == 0
        self._total = f"{len(shards)} shards ({sum(shard.bytes for _, shard in shards) / 1e9:.3g} GB)"
        self._hashed = 0
        self._problem: str | None = None
        self._said: str | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)
        self._thread.start()
        self._thread.join(PATIENCE)
        if self._first and self._thread.is_alive():
            print(f"data.verify: {self._total} are hashed in the background", flush=True)

    def _hash(self) -> None:
        begun = time.monotonic()
        with contextlib.suppress(OSError):  # a thread's own, on Linux: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        for index, shard in self._mine:
            try:
                self._problem = index.hash_problem(shard)
            except Exception as error:  # else it would end this thread, and nobody would hear of it
                said = " ".join(f"{type(error).__name__}: {error}".split())
                self._problem = f"{index.folder / shard.name}: could not be hashed: {said}: remove the cause"
            if self._problem:
                return
            self._hashed += 1
        seconds = time.monotonic() - begun
        if self._first and seconds > PATIENCE:
            self._said = f"data.verify: the shards of this rank have the bytes of their index ({seconds:.0f} s)"

    def check(self) -> str | None:
        """What to say of a shard that has been found to differ; prints once that all were hashed."""
        if self._said:
            # Not by the thread: loader processes may be forked while it prints, and stdout would be locked in them.
            print(self._said, flush=True)
            self._said = None
        return f"{self._problem}, then the same command continues" if self._problem else None

    @property
    def unfinished(self) -> str | None:
        """What to say of a run that ends now: how many of this rank's shards were hashed, None if all were."""
        if self._hashed == len(self._mine):
            return None
        return f"data.verify: {self._hashed} of {len(self._mine)} shards were hashed, the others may have changed"
