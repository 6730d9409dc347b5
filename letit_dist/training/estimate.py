"""What a run will take, before any of it is taken: memory a rank and level, checkpoints, disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from letit_dist.data.foreign import is_foreign
from letit_dist.data.reader import ShardDataset
from letit_dist.data.remote import is_url
from letit_dist.memory import GIB, peak_bytes
from letit_dist.recipes.base import Batch, Level, Recipe
from letit_dist.schemas import PretrainConfig
from letit_dist.training.plan import BatchPlan


@dataclass(frozen=True)
class Footprint:
    """Bytes of what a run holds and writes. Of a pass: all tensors that live at once, gradients among them."""

    parameters: int  # a count, not bytes
    weights: int
    average: int
    optimizer: int  # on one rank
    passes: tuple[int, ...]  # by level, the largest of the phases
    checkpoint: int

    def rank(self, level: int) -> int:
        """What one rank holds at the worst moment of a level."""
        return self.weights + self.average + self.optimizer + self.passes[level]


def footprint(
    build: Callable[[], Recipe],
    config: PretrainConfig,
    levels: Sequence[Level],
    plans: Sequence[BatchPlan],
    *,
    shards_optimizer: bool = False,
) -> Footprint:
    """Run every phase of every level once on tensors that have shapes and no memory, with the recipe of `build()`.

    What a convolution borrows inside is not seen, nor what an allocator keeps: on a GPU expect a fifth more.
    `shards_optimizer` is ZeRO's: each rank holds its share of the optimiser's state.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        recipe = build()
    recipe.eval()  # codebook statistics read numbers, and there are none
    wide = 8 if config.training.precision == "fp64" else 4
    parameters = sum(parameter.numel() for parameter in recipe.parameters())
    weights = wide * sum(tensor.numel() for tensor in recipe.state_dict().values())
    average = weights if config.training.ema_half_life else 0
    optimizer = (2 if config.recipe.optimizer.kind == "adam" else 0) * wide * parameters
    passes = []
    for level, plan in zip(levels, plans, strict=True):
        side = level.resolution or config.autoencoder.resolution
        passes.append(max(_pass(recipe, phase.name, level.start, plan, side, mode) for phase in recipe.phases))
    return Footprint(
        parameters,
        weights,
        average,
        -(-optimizer // plans[0].ranks) if shards_optimizer else optimizer,
        tuple(size * wide // 4 for size in passes),
        weights + average + optimizer,
    )


def _pass(recipe: Recipe, phase: str, start: int, plan: BatchPlan, side: int, mode: FakeTensorMode) -> int:
    count = plan.microbatch
    positions = torch.arange(count)
    with mode:
        images = torch.empty(count, 3, side, side)
        batch = Batch({"images": images}, positions, start, plan.batch)

        def run() -> None:
            recipe(phase, batch).loss.backward()
            recipe.zero_grad(set_to_none=True)

        return peak_bytes(run)


def report(found: Footprint, config: PretrainConfig, levels: Sequence[Level], run: Path | None) -> list[str]:
    """Lines for people; `run` is where the checkpoints would go. The last one says so if there is no room for them."""

    def gib(count: float) -> str:
        return f"{count / GIB:.3g} GiB"

    held = f"weights {gib(found.weights)}, average {gib(found.average)}, optimiser {gib(found.optimizer)}"
    lines = [f"a rank holds {found.parameters / 1e6:.2f} M parameters: {held}"]
    for number, level in enumerate(levels):
        name = f"level {number} ({level.resolution} pixels)" if len(levels) > 1 else "the largest pass"
        lines.append(f"{name}: {gib(found.passes[number])} more, {gib(found.rank(number))} in all")
    kept = config.intervals.keep + 1  # one more while it is written
    need = kept * found.checkpoint
    lines.append(f"a checkpoint: {gib(found.checkpoint)}; {kept} at most on disk: {gib(need)}")
    if run is not None:
        there = next(folder for folder in (run, *run.resolve().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        lines.append(f"free at {there}: {gib(free)}" + (" (NOT ENOUGH)" if free < need else ""))
    return lines


def start_lines(config: PretrainConfig, begin: Callable[[str], dict[str, Any]]) -> list[str]:
    """Whose weights the run would begin with, by `begin`, which takes them; UserError if they do not fit."""
    if config.start_from is None:
        return []
    if not Path(config.start_from).exists():
        return [f"start_from: {config.start_from} is not here, not looked at"]
    origin = begin(config.start_from)
    return [f"start_from: {origin['parent']}, fingerprint {origin['parent_fingerprint']}"]


def data_lines(config: PretrainConfig, ranks: int) -> list[str]:
    """What of `data.train` is here, and how often it is seen."""
    if remote := [path for path in config.data.train if is_url(path)]:
        return [f"data.train: {path} is on a server, not looked at" for path in remote]
    missing = [path for path in config.data.train if not Path(path).exists()]
    lines = [f"data.train: {path} is not here" for path in missing]
    if missing or any(is_foreign(path) for path in config.data.train):
        return lines
    dataset = ShardDataset(config.data.train)
    shards = [shard for index in dataset.indexes for shard in index.shards]
    size = sum(shard.bytes for shard in shards)
    epochs = config.training.images / len(dataset)
    return [
        f"data: {len(dataset)} images in {len(shards)} shards, {size / GIB:.3g} GiB; {epochs:.3g} epochs; "
        f"each of {ranks} ranks reads {size / ranks / GIB:.3g} GiB an epoch, of all shards"
    ]
