"""Means of what the steps report, equal on every number of ranks, and one JSON line an interval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from letit_dist.files import write_atomically


class Means:
    """Sums and counts by name. Sums stay on the device until somebody asks, so that no step waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        # One tensor for all: beside a small network operations on single numbers would be most of a step.
        self._sums = torch.zeros(0, dtype=torch.float64, device=self.device)
        self._counts: dict[str, float] = {}  # by name, in the order of the sums
        self._places: dict[tuple[str, ...], Tensor] = {}  # of names that come together

    def add(self, metrics: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Add one value a name, each counting `weight` times."""
        if not metrics:
            return
        names = tuple(metrics)
        if names not in self._places:
            self._places[names] = self._find(names)
        values = [torch.as_tensor(value, device=self.device).detach() for value in metrics.values()]
        if any(value.dtype != values[0].dtype for value in values):
            values = [value.double() for value in values]
        self._sums.index_add_(0, self._places[names], torch.stack(values).double(), alpha=weight)
        for name in names:
            self._counts[name] += weight

    def _find(self, names: tuple[str, ...]) -> Tensor:
        """Where the sums of these names are; of new ones they begin at 0."""
        self._counts = {**self._counts, **{name: 0.0 for name in names if name not in self._counts}}
        self._sums = torch.cat([self._sums, self._sums.new_zeros(len(self._counts) - len(self._sums))])
        order = list(self._counts)
        return torch.tensor([order.index(name) for name in names], device=self.device)

    def synchronise(self) -> None:
        """Replace each rank's sums by the mean over the ranks (all ranks report the same names)."""
        if not self._counts or not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            return
        places = self._find(tuple(sorted(self._counts)))
        packed = self._sums[places]
        torch.distributed.all_reduce(packed)
        self._sums[places] = packed / torch.distributed.get_world_size()

    def means(self) -> dict[str, float]:
        """The mean of every name."""
        return {name: total / count for name, (total, count) in self.state().items()}

    def state(self) -> dict[str, list[float]]:
        """Sums and counts as JSON numbers, for a checkpoint."""
        pairs = zip(self._counts.items(), self._sums.tolist(), strict=True)
        return {name: [total, count] for (name, count), total in pairs}

    def load(self, state: dict[str, list[float]]) -> None:
        """The inverse of `state`."""
        self.clear()
        totals, counts = zip(*state.values(), strict=True) if state else ((), ())
        self._sums = torch.tensor(totals, dtype=torch.float64, device=self.device)
        self._counts = dict(zip(state, counts, strict=True))


class StatsFile:
    """stats.jsonl: appended line by line; a resumed run first drops the lines past its checkpoint."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, images_seen: int) -> None:
        """Drop what an interrupted run wrote after the checkpoint that is now resumed."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["images_seen"] <= images_seen:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill cut in half
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())

    def last(self) -> dict[str, Any]:
        """The newest line without what depends on the machine's clock; empty where there is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        record = json.loads(lines[-1]) if lines else {}
        return {name: value for name, value in record.items() if name != "images_per_second"}

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
