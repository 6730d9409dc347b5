"""Whether shards still have the bytes that their index was made of, found out while a run learns from them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from letit_dist.data.index import Index

# Seconds that a run may be held up by it at its start: a small set is known to be whole before anything is learnt.
PATIENCE = 1.0


def place_on_machine() -> tuple[int, int]:
    """(this rank's number on its machine, ranks there) as launchers tell it; (0, 1) where none does."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE", "")
    rank = os.environ.get("LOCAL_RANK", "")
    return (int(rank), int(ranks)) if rank.isdigit() and ranks.isdigit() and int(rank) < int(ranks) else (0, 1)


class Verification:
    """Hashes every local shard of some folders once, each on one rank of a machine, in a thread of low priority.

    Every machine reads all of them, since its copy may be its own. Shards on a server are hashed by remote.py.
    """

    def __init__(self, indexes: Sequence[Index]):
        rank, ranks = place_on_machine()
        shards = [(index, shard) for index in indexes if isinstance(index.folder, Path) for shard in index.shards]
        self._mine = shards[rank::ranks]
        self._first = rank == 0
        self._total = f"{len(shards)} shards ({sum(shard.bytes for _, shard in shards) / 1e9:.3g} GB)"
        self._problem: str | None = None
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
            if problem := index.hash_problem(shard):
                self._problem = problem
                return
        seconds = time.monotonic() - begun
        if self._first and seconds > PATIENCE:
            print(f"data.verify: the shards of this rank have the bytes of their index ({seconds:.0f} s)", flush=True)

    @property
    def problem(self) -> str | None:
        """What to say of a shard that has been found to differ."""
        if not self._problem:
            return None
        return f"{self._problem}: it is not as it was packed; copy it again, then the same command continues"
