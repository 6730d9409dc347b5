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
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Add one value a name, each counting `weight` times."""
        if not metrics:
            return
        # All at once: beside a small network the operations on single numbers would be most of a step.
        values = [torch.as_tensor(value, device=self.device).detach() for value in metrics.values()]
        if any(value.dtype != values[0].dtype for value in values):
            values = [value.double() for value in values]
        added = (torch.stack(values).double() * weight).unbind()
        for name, value in zip(metrics, added, strict=True):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0.0) + weight

    def synchronise(self) -> None:
        """Replace each rank's sums by the mean over the ranks (all ranks report the same names)."""
        if not self._sums or not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            return
        names = sorted(self._sums)
        packed = torch.stack([self._sums[name] for name in names])
        torch.distributed.all_reduce(packed)
        packed /= torch.distributed.get_world_size()
        self._sums = dict(zip(names, packed.unbind(), strict=True))

    def means(self) -> dict[str, float]:
        """The mean of every name."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()

    def state(self) -> dict[str, list[float]]:
        """Sums and counts as JSON numbers, for a checkpoint."""
        return {name: [float(total), self._counts[name]] for name, total in self._sums.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """The inverse of `state`."""
        self._sums = {n: torch.tensor(v[0], dtype=torch.float64, device=self.device) for n, v in state.items()}
        self._counts = {name: value[1] for name, value in state.items()}


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

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
