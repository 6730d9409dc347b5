"""What a trainer needs to know of a method: its networks, its phases, its losses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from letit_dist import schedule
from letit_dist.autoencoders.base import AutoencoderConfig
from letit_dist.config import OneOrMany, StrictConfig, by_level
from letit_dist.errors import UserError
from letit_dist.schemas import TrainingConfig

M = TypeVar("M", bound=nn.Module)


class OptimizerConfig(StrictConfig):
    """One optimiser; the rate is a pure function of images_seen."""

    kind: Literal["adam", "sgd"] = "adam"
    learning_rate: OneOrMany[PositiveFloat] = Field(description="a list has one for each level of a growing network")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adam only")
    eps: float = Field(1e-8, gt=0, description="adam only")
    warmup: int = Field(0, ge=0, description="images over which the rate rises from 0")
    decay: tuple[int, int] | None = Field(
        None, description="half cosine to 0 between these two counts of images; null = constant"
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        if self.kind == "sgd" and {"betas", "eps"} & self.model_fields_set:
            defaults = (self.betas, self.eps) == ((0.9, 0.999), 1e-8)
            if not defaults:
                raise ValueError("betas and eps have no effect with kind sgd: remove them")
        if self.decay is not None and not 0 <= self.decay[0] < self.decay[1]:
            raise ValueError(f"decay needs 0 <= first < second, got {self.decay}")
        return self

    def rate_at(self, images_seen: int, level: int = 0) -> float:
        """The learning rate of the batch that starts at `images_seen`, at a level of a growing network."""
        base = self.learning_rate[level] if isinstance(self.learning_rate, tuple) else self.learning_rate
        return schedule.learning_rate(base, images_seen, warmup=self.warmup, decay=self.decay)


@dataclass(frozen=True)
class Level:
    """A stage of a growing network: from `start` images on it learns from images of side `resolution`."""

    start: int = 0
    resolution: int | None = None  # None = as they are stored


class RecipeConfig(StrictConfig):
    """Base of every recipe's schema."""

    kind: str
    optimizer: OptimizerConfig

    def levels(self, autoencoder: AutoencoderConfig | None) -> list[Level]:
        """The levels over which this recipe grows a network of that config; a single one if it does not grow."""
        return [Level()]

    def problems(self, autoencoder: AutoencoderConfig | None, training: TrainingConfig) -> list[str]:
        """What is wrong between this section, the network's and `training`, one line each."""
        found = []
        values = {
            "training.batch": training.batch,
            "training.microbatch": training.microbatch,
            "recipe.optimizer.learning_rate": self.optimizer.learning_rate,
        }
        for key, value in values.items():
            try:
                by_level(value, len(self.levels(autoencoder)), key)
            except UserError as error:
                found.append(str(error))
        return found


@dataclass(frozen=True)
class Phase:
    """One loss with the networks that learn from it; `every` counts batches."""

    name: str
    modules: tuple[str, ...]
    every: int = 1


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that always learn together; `rate` multiplies the learning rate."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    rate: float = 1.0


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank. `data` holds tensors whose rows are samples."""

    data: dict[str, Tensor]
    positions: Tensor  # (B,) int64, global sample index: the key of all per-sample randomness
    images_seen: int  # images before the global batch that this belongs to
    global_batch: int  # images in that global batch, over all ranks and microbatches
    bad: tuple[tuple[str, str], ...] = ()  # (key, reason) of samples that could not be read and were replaced
    problem: str | None = None  # of the data, found by this rank, which ends the run on all of them

    @property
    def size(self) -> int:
        return len(self.positions)

    def split(self, size: int) -> list[Batch]:
        """Consecutive microbatches of `size` samples."""
        if self.size <= size:
            return [self]
        return [
            replace(
                self,
                data={name: value[i : i + size] for name, value in self.data.items()},
                positions=self.positions[i : i + size],
            )
            for i in range(0, self.size, size)
        ]

    def to(self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> Batch:
        """Moved to a device; floating-point rows also take the dtype and, where they are maps, the format."""

        def move(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value.to(device, non_blocking=True)
            layout = memory_format if value.ndim == 4 else torch.preserve_format
            return value.to(device, dtype, non_blocking=True, memory_format=layout)

        data = {name: move(value) for name, value in self.data.items()}
        return replace(self, data=data, positions=self.positions.to(device))

    @property
    def slots(self) -> Tensor:
        """(B,) each sample's place inside the global batch."""
        return self.positions - self.images_seen


def child_groups(module: nn.Module) -> list[ParameterGroup]:
    """One group for each child of `module` that can learn, named after it."""
    children = {
        name: tuple(p for p in child.parameters() if p.requires_grad) for name, child in module.named_children()
    }
    return [ParameterGroup(name, parameters) for name, parameters in children.items() if parameters]


@dataclass
class StepResult:
    """A scalar loss, and detached scalars to report (means over the microbatch)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Recipe(nn.Module):
    """The one module handed to `accelerator.prepare`; its children are the networks that learn.

    `companions` are frozen networks that take part without learning (an autoencoder, a perceptual loss): they
    are moved with the recipe, and neither averaged nor saved with it.
    """

    config_class: ClassVar[type[RecipeConfig]]
    phases: tuple[Phase, ...]
    # Whether a step itself takes gradients through the networks, as Langevin chains and R1 do.
    inner_gradients: ClassVar[bool] = False
    # A loss beyond this, of either sign, is refused like a non-finite one. None = only non-finite losses are.
    loss_limit: float | None = None
    divergence_hint = ""  # what else helps, appended to the message of such a loss

    def __init__(self, config: RecipeConfig, *, seed: int, precision: str):
        super().__init__()
        self.config = config
        self.seed = seed
        self.precision = precision
        self._companions: tuple[nn.Module, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        """A copy of the networks that learn (for their average); companions are frozen, so they are shared."""
        memo.update({id(companion): companion for companion in self._companions})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def companions(self) -> tuple[nn.Module, ...]:
        return self._companions

    def add_companion(self, module: M) -> M:
        """Freeze a network and keep it beside the recipe, outside its parameters and state."""
        module.requires_grad_(False).eval()
        self._companions = (*self._companions, module)
        return module

    def forward(self, phase: str, batch: Batch) -> StepResult:
        """One microbatch of one phase, under the run's precision."""
        if self.precision != "bf16":
            return self.step(phase, batch)
        with torch.autocast(batch.positions.device.type, dtype=torch.bfloat16):
            return self.step(phase, batch)

    def step(self, phase: str, batch: Batch) -> StepResult:
        """The loss of `phase`; no `.item()` here, so that a GPU is never waited for."""
        raise NotImplementedError

    def closed_step(self, phase: str, batch: Batch) -> StepResult | None:
        """`step` for recipes that have its gradients in closed form, which become the parameters' `grad` at once.

        Asked first where nothing else waits for autograd: one process, one microbatch. None: `step` it is.
        """
        return None

    def sums(self) -> list[Tensor]:
        """What `after_batch` goes by, as sums over this rank's part of the batch. Once all phases have run forward, the
        trainer puts the sums over all ranks in their place."""
        return []

    def after_batch(self, batch: Batch) -> Mapping[str, Tensor | float]:
        """Called once a global batch, after every phase has stepped, on every rank (codebooks move here)."""
        return {}

    def status(self, images_seen: int) -> dict[str, float]:
        """What stands beside the means in a report: where the batch that started at `images_seen` stood."""
        return {}

    def discard(self) -> None:
        """Forget what this batch has accumulated: its loss was refused."""

    def rate_at(self, images_seen: int) -> float:
        """The learning rate for the batch that starts at `images_seen`."""
        return self.config.optimizer.rate_at(images_seen, self.level_at(images_seen))

    @property
    def levels(self) -> list[Level]:
        """The levels over which the network grows; a single one if it does not. Each starts without optimiser state."""
        return [Level()]

    def level_at(self, images_seen: int) -> int:
        """The level of the batch that starts at `images_seen`."""
        return sum(level.start <= images_seen for level in self.levels) - 1

    def parameter_groups(self) -> list[ParameterGroup]:
        """The groups of the optimiser; here one for each child network, named after it."""
        return child_groups(self)

    def active_groups(self, phase: Phase, images_seen: int) -> set[str]:
        """Names of the groups that learn in `phase` of the batch that starts at `images_seen`: exactly those whose
        parameters take part in its loss."""
        return set(phase.modules)

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of where the run is: row name -> images (B, 3, H, W). Runs without gradient."""
        raise NotImplementedError

    def save(self, folder: str | Path, **extra: Any) -> None:
        """Write what the run is for (an autoencoder, an energy) as a pretrained folder."""
        raise NotImplementedError
