"""The arithmetic of batches: how many images a step, over how many ranks, at which level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from letit_dist.config import by_level
from letit_dist.errors import UserError
from letit_dist.recipes.base import Level
from letit_dist.schemas import TrainingConfig


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread: `batch = ranks x microbatch x accumulation`."""

    batch: int
    ranks: int
    microbatch: int

    @property
    def per_rank(self) -> int:
        return self.batch // self.ranks

    @property
    def accumulation(self) -> int:
        return self.per_rank // self.microbatch

    def __str__(self) -> str:
        ranks = "rank" if self.ranks == 1 else "ranks"
        return f"{self.batch} = {self.ranks} {ranks} x {self.microbatch} images x {self.accumulation} accumulation"


def plan_batch(batch: int, microbatch: int | None, ranks: int) -> BatchPlan:
    """The arithmetic of a batch, or a UserError with the nearest counts that divide.

    `microbatch` is an upper limit: a rank takes the largest divisor of its share, so that another number of ranks
    needs no other configuration.
    """
    if batch % ranks:
        lower = batch // ranks * ranks
        near = " or ".join(str(n) for n in (lower, lower + ranks) if n > 0)
        raise UserError(f"training.batch: {batch} images do not divide over {ranks} ranks (try {near})")
    per_rank = batch // ranks
    limit = min(microbatch or per_rank, per_rank)
    return BatchPlan(batch, ranks, max(n for n in range(1, limit + 1) if per_rank % n == 0))


def plan_batches(training: TrainingConfig, ranks: int, levels: int = 1) -> list[BatchPlan]:
    """The arithmetic of every level of a growing network (one level if it does not grow)."""
    sizes = by_level(training.batch, levels, "training.batch")
    limits = by_level(training.microbatch, levels, "training.microbatch")
    return [plan_batch(size, limit, ranks) for size, limit in zip(sizes, limits, strict=True)]


def timetable(levels: Sequence[Level], plans: Sequence[BatchPlan], images: int) -> list[str]:
    """What a run of so many images will do, a line a level and one for all."""
    lines, steps = [], 0
    images_seen = 0
    for number, (level, plan) in enumerate(zip(levels, plans, strict=True)):
        end = min(levels[number + 1].start, images) if number + 1 < len(levels) else images
        # The last batch of a level may reach into the next one.
        count = max(0, -(-(end - images_seen) // plan.batch))
        if len(levels) > 1:
            lines.append(
                f"level {number}: {level.resolution} pixels from {images_seen} images on, batch: {plan}, "
                f"{count} steps, {count * plan.batch} images"
            )
        images_seen, steps = images_seen + count * plan.batch, steps + count
    return [*(lines or [f"batch: {plans[0]}"]), f"steps: {steps}, {images_seen} images"]
