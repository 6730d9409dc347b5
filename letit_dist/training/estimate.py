"""What a run will take, before any of it is taken: memory a rank and level, checkpoints, exports, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from letit_dist.memory import peak_bytes
from letit_dist.pictures import grid
from letit_dist.recipes.base import Batch, Level, Phase, Recipe
from letit_dist.schemas import IntervalsConfig, PretrainConfig, TrainEnergyConfig
from letit_dist.training.feeds import PREVIEW
from letit_dist.training.optim import require_gradients
from letit_dist.training.plan import BatchPlan

# On a GPU, over what a pass is seen to take: what convolutions borrow inside, and what an allocator keeps.
ALLOWANCE = 1.2


@dataclass(frozen=True)
class Sharding:
    """How a rank shares with the others: plain DDP, or DeepSpeed at a ZeRO stage."""

    stage: int | None = None  # None = DDP
    offload: bool = False  # the optimiser's state and step are on the CPU
    bucket: int = 0  # parameters whose gradients go out together
    buffers: int = 0  # of that size, allocated in full whatever the network

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Sharding:
        """That of a DeepSpeed JSON, absent keys as DeepSpeed fills them in."""
        zero = tree.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        buffers = 0
        if stage and (zero.get("contiguous_gradients", True) or (offload and stage < 3)):
            # The two of overlap_comm belong to stages 1 and 2.
            buffers = 2 if zero.get("overlap_comm", False) and stage < 3 else 1
        return cls(stage, offload, int(zero.get("reduce_bucket_size", 500_000_000)), buffers)

    def __str__(self) -> str:
        if self.stage is None:
            return "DDP"
        return f"DeepSpeed, ZeRO stage {self.stage}{', the optimiser on the CPU' if self.offload else ''}"


@dataclass(frozen=True)
class Footprint:
    """Bytes of what a run holds and writes; of a rank, on its GPU, where nothing else is said."""

    parameters: int  # a count, not bytes
    weights: int  # as they are stored; ZeRO-3 holds a share of them, and all of them while a pass runs
    average: int
    frozen: int  # networks that take part without learning
    optimizer: int
    copies: int  # ZeRO's own of the weights that this rank moves
    exchange: int  # gradients on their way
    host: int  # a rank's, in main memory
    passes: tuple[int, ...]  # by level, the largest of the phases: all tensors that live at once, gradients among them
    checkpoint: int
    export: int
    picture: int  # a file of samples/, at most

    def rank(self, level: int) -> int:
        """What one rank holds at the worst moment of a level."""
        held = (self.weights, self.average, self.frozen, self.optimizer, self.copies, self.exchange)
        return sum(held) + self.passes[level]

    def on_gpu(self, level: int) -> int:
        """The same with an allowance on the pass for what is not seen."""
        return self.rank(level) + round((ALLOWANCE - 1) * self.passes[level])


Rows = Callable[[int, int | None], dict[str, Tensor]]


def images_of(side: int) -> Rows:
    """Batches of images: `resolution` pixels a side, or `side` where a level names none."""

    def rows(count: int, resolution: int | None) -> dict[str, Tensor]:
        return {"images": torch.empty(count, 3, resolution or side, resolution or side)}

    return rows


def latents_of(shape: tuple[int, ...], several: bool) -> Rows:
    """Batches of latents (B, *shape) of both sides; of `several` domains with the number of their pair. Stored codes
    become latents first."""

    def rows(count: int, _: int | None) -> dict[str, Tensor]:
        data = {f"{side}.latent": torch.empty(count, *shape) for side in ("source", "target")}
        if several:
            with unset_fake_temporarily():  # which pair a sample is of is looked at
                data["pair"] = torch.zeros(count, dtype=torch.int64)
        return data

    return rows


def footprint(
    build: Callable[[], Recipe],
    config: PretrainConfig | TrainEnergyConfig,
    levels: Sequence[Level],
    plans: Sequence[BatchPlan],
    *,
    rows: Rows,
    result: Callable[[Any], nn.Module],
    sharding: Sharding | None = None,
) -> Footprint:
    """Run every phase of every level once on tensors that have shapes and no memory, with the recipe of `build()`.

    `rows(count, resolution)` are the data of a batch, `result(recipe)` what an export holds. What a convolution borrows
    inside is not seen, nor what an allocator keeps: `ALLOWANCE` is for them.
    """
    sharding = sharding or Sharding()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        recipe = build()
    recipe.eval()  # codebook statistics read numbers, and there are none
    wide = 8 if config.training.precision == "fp64" else 4
    ranks, stage = plans[0].ranks, sharding.stage or 0
    parameters = sum(parameter.numel() for parameter in recipe.parameters())
    weights = wide * sum(tensor.numel() for tensor in recipe.state_dict().values())
    average = weights if config.training.ema_half_life else 0
    moments = (2 if config.recipe.optimizer.kind == "adam" else 0) * wide * parameters
    own = -(-wide * parameters // ranks)  # a rank's share
    optimizer, copies = (-(-moments // ranks), own) if stage else (moments, 0)
    exchange = 0
    if sharding.stage is not None:
        size = min(sharding.bucket, parameters)
        exchange = wide * (sharding.bucket * sharding.buffers if sharding.buffers else size * (ranks > 1))
    elif ranks > 1:
        exchange = wide * parameters  # DDP's buckets
    if stage == 3:  # the stored share beside what a pass has gathered, and room for that of the gradients
        copies += -(-weights // ranks) + own * (not sharding.offload)
    host = 0
    if sharding.offload:
        host, optimizer, copies = optimizer + 2 * own, 0, copies - own
    passes = []
    for level, plan in zip(levels, plans, strict=True):
        with mode:
            data = rows(plan.microbatch, level.resolution)
        batch = Batch(data, torch.arange(plan.microbatch), level.start, plan.batch)
        # Stage 2 keeps a share of each gradient, where the optimiser is; stage 3 has room for it already.
        part = 1.0 if stage < 2 else 1 / ranks if stage == 2 and not sharding.offload else 0.0
        passes.append(max(_pass(recipe, phase, batch, mode, plan.accumulation, part) for phase in recipe.phases))
    return Footprint(
        parameters,
        weights,
        average,
        wide * sum(_numbers(companion) for companion in recipe.companions),
        optimizer,
        copies,
        exchange,
        host,
        tuple(size * wide // 4 for size in passes),
        weights + average + moments,
        wide * sum(tensor.numel() for tensor in result(recipe).state_dict().values()),
        _picture(recipe, Batch(_first(rows, levels[-1], mode), torch.arange(PREVIEW), levels[-1].start, PREVIEW), mode),
    )


def _numbers(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def _first(rows: Rows, level: Level, mode: FakeTensorMode) -> dict[str, Tensor]:
    with mode:
        return rows(PREVIEW, level.resolution)


def _pass(recipe: Recipe, phase: Phase, batch: Batch, mode: FakeTensorMode, accumulation: int, part: float) -> int:
    """Bytes of the microbatches of a phase, of their gradients the `part` that is kept."""
    require_gradients(recipe.parameter_groups(), recipe.active_groups(phase, batch.images_seen))
    kept: dict[Tensor, Tensor] = {}

    def share(parameter: Tensor) -> None:
        if part and parameter not in kept:
            kept[parameter] = parameter.new_empty(math.ceil(part * parameter.numel()))
        parameter.grad = None

    learns = [parameter for parameter in recipe.parameters() if parameter.requires_grad and part < 1]
    hooks = [parameter.register_post_accumulate_grad_hook(share) for parameter in learns]

    def run() -> None:
        for _ in range(min(accumulation, 2)):  # from the second on, gradients are there from the beginning
            recipe(phase.name, batch).loss.backward()
        recipe.zero_grad(set_to_none=True)

    with mode:
        size = peak_bytes(run)
    for hook in hooks:
        hook.remove()
    return size


def _picture(recipe: Recipe, batch: Batch, mode: FakeTensorMode) -> int:
    """Bytes of a sheet of `samples` without compression."""
    with mode, torch.no_grad():
        shapes = {name: images.shape for name, images in recipe.samples(batch).items()}
    blank = {name: torch.zeros(1, dtype=torch.uint8).expand(shape) for name, shape in shapes.items()}
    width, height = grid(blank).size
    return 3 * width * height


def pictures(intervals: IntervalsConfig, images: int) -> int:
    """How many files a run of so many images leaves in samples/, at most: one at the start, one at the end."""
    return 2 + images // intervals.samples
