"""Where a run stops gaining from more ranks: the operations of a step against the gradients that ranks exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from letit_dist.recipes.base import Batch, Level, Recipe
from letit_dist.schemas import PretrainConfig
from letit_dist.training.exchange import exchanged_bytes
from letit_dist.training.optim import require_gradients

_COUNTED = 2  # images of the pass that is counted
_BUCKETS = (2**20, 25 * 2**20)  # bytes at which DDP closes its first bucket of gradients, and every other


@dataclass(frozen=True)
class Cluster:
    """What the model takes as given. Rates are sustained ones, of a GPU, in units a second."""

    operations: float = 3e13
    inside: float = 2e11  # bytes between GPUs of a machine
    between: float = 2e10  # bytes between machines, a GPU's share
    machine: int = 8  # GPUs in one
    latency: float = 2e-5  # seconds a collective takes, for each doubling of the ranks


@dataclass(frozen=True)
class PhaseCost:
    """One phase of one level."""

    name: str
    operations: float  # an image, forward and backward: a multiplication with its addition counts as two
    gradients: int  # bytes of the gradients that ranks exchange, once a step
    buckets: float = 1  # in which they go out, each a collective
    sums: float = 0  # bytes of the one exchange beside them: losses, flags, after the last phase the recipe's sums
    every: int = 1  # batches from one turn of this phase to the next

    @property
    def collectives(self) -> float:
        """A step's, in the mean."""
        return self.buckets + 1 / self.every


@dataclass(frozen=True)
class Efficiency:
    """A step on some ranks, in seconds; efficiency is the share of the time in which a rank computes."""

    ranks: int
    images: int  # a rank
    compute: float
    exchange: float

    @property
    def worst(self) -> float:
        """If no exchange is hidden behind the backward pass."""
        return self.compute / (self.compute + self.exchange)

    @property
    def best(self) -> float:
        """If all of it is."""
        return self.compute / max(self.compute, self.exchange)


class _Operations(TorchDispatchMode):
    """Sums what torch's own table says of each product; torch's counter of modules stumbles over inner gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def step_costs(build: Callable[[], Recipe], config: PretrainConfig, levels: Sequence[Level]) -> list[list[PhaseCost]]:
    """By level, the phases; counted by running them on tensors that have shapes and no memory.

    Convolutions and matrix products count, as everywhere; what is done elementwise does not.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        recipe = build()
    recipe.train()  # with all that is summed over the ranks
    wide = 8 if config.training.precision == "fp64" else 4
    groups = recipe.parameter_groups()
    costs: list[list[PhaseCost]] = []
    for level in levels:
        side = level.resolution or config.autoencoder.resolution
        with mode:
            images = torch.empty(_COUNTED, 3, side, side)
        batch = Batch({"images": images}, torch.arange(_COUNTED), level.start, _COUNTED)
        costs.append([])
        for phase in recipe.phases:
            require_gradients(groups, recipe.active_groups(phase, level.start))
            with mode, _Operations() as counter:
                recipe(phase.name, batch).loss.backward()
            recipe.zero_grad(set_to_none=True)
            gradients, buckets = exchanged((wide * p.numel(), p.requires_grad) for p in recipe.parameters())
            sums = exchanged_bytes(recipe.sums() if phase is recipe.phases[-1] else [])
            operations = counter.total / _COUNTED / phase.every
            shares = (gradients // phase.every, buckets / phase.every, sums / phase.every)
            costs[-1].append(PhaseCost(phase.name, operations, *shares, phase.every))
        recipe.discard()
    return costs


def exchanged(parameters: Iterable[tuple[int, bool]]) -> tuple[int, int]:
    """Bytes and buckets that DDP exchanges of gradients given as (bytes, used), in the order in which it wraps their
    parameters.

    It fills one bucket after the other, and a bucket goes out whole if any of it is used
    (`letit_dist.training.setup.exchange_used_gradients`).
    """
    first, limit = _BUCKETS
    total = buckets = held = 0
    needed = False
    closes = first
    for size, used in parameters:
        held += size
        needed |= used
        if held >= closes:
            total, buckets = total + held * needed, buckets + needed
            held, needed, closes = 0, False, limit
    return total + held * needed, buckets + needed


def efficiency(costs: Sequence[PhaseCost], batch: int, ranks: int, cluster: Cluster) -> Efficiency:
    """A step of `batch` images on `ranks`: for each phase a ring all-reduce of every bucket of its gradients, and the
    one of what ranks tell each other beside them (`letit_dist.training.exchange`)."""
    images = batch // ranks
    compute = sum(cost.operations for cost in costs) * images / cluster.operations
    rate = cluster.inside if ranks <= cluster.machine else cluster.between
    exchange = 0.0
    if ranks > 1:
        moved = 2 * (ranks - 1) / ranks * sum(cost.gradients + cost.sums for cost in costs)
        exchange = moved / rate + sum(cost.collectives for cost in costs) * cluster.latency * (ranks - 1).bit_length()
    return Efficiency(ranks, images, compute, exchange)
