"""What a configuration file of either stage may hold: the sections and their keys, with what each one means.

Nothing here imports torch: see letit_dist/config.py, which loads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator

from letit_dist.config import Count, Kind, OneOrMany, StrictConfig
from letit_dist.registry import AUTOENCODERS, ENERGIES, RECIPES

# What a section holds once it is loaded, for a type checker; those modules import torch.
if TYPE_CHECKING:
    from letit_dist.autoencoders.base import AutoencoderConfig as Autoencoder
    from letit_dist.energy.models import EnergyConfig as Energy
    from letit_dist.recipes.base import RecipeConfig as Recipe
else:
    Autoencoder = Annotated[SerializeAsAny[StrictConfig], Kind(AUTOENCODERS)]
    Energy = Annotated[SerializeAsAny[StrictConfig], Kind(ENERGIES)]
    Recipe = Annotated[SerializeAsAny[StrictConfig], Kind(RECIPES)]


class TrainingConfig(StrictConfig):
    """How long and how: every count is in images, so that no number depends on the machine."""

    images: int = Field(gt=0, description="length of the run, in images")
    batch: OneOrMany[Count] = Field(
        description="images a step over all ranks; a list has one for each level of a growing network"
    )
    microbatch: OneOrMany[Count] | None = Field(
        None,
        description="images a rank pushes through at once, at most (memory only, never the result); null = all; "
        "a list as for batch",
    )
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="bf16 = autocast around the networks; fp64 = for equality checks"
    )
    channels_last: bool = True
    ema_half_life: float | None = Field(
        None, gt=0, description="half-life of the weight average, in images; null = no average"
    )
    recompute_from: Count | None = Field(
        None,
        description="layers at so many pixels a side or more compute their results again in the backward pass instead "
        "of keeping them (memory and time only, never the result); null = none",
    )
    timeout: float = Field(
        600.0, gt=0, description="seconds after which a rank that waits for the others gives up and says where"
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="also send the numbers of stats.jsonl there, through accelerate; stats.jsonl is always written"
    )
    ema_warmup: float = Field(
        0.05, ge=0, description="the half-life is at most this share of images_seen; 0 = no warm-up"
    )


class IntervalsConfig(StrictConfig):
    """What happens every so many images."""

    report: int = Field(gt=0, description="a line in stats.jsonl")
    samples: int = Field(gt=0, description="a picture in samples/")
    checkpoint: int = Field(gt=0)
    keep: int = Field(3, ge=2, description="checkpoints kept")


class ImagesConfig(StrictConfig):
    """Shards of images."""

    train: tuple[str, ...] = Field(
        min_length=1, description="shard folders (each with index.json), here or as https://, s3://, ...; or tar files"
    )
    cache: str | None = Field(
        None, description="local folder for blocks of remote shards ($LETIT_CACHE, or ~/.cache/letit_dist/shards)"
    )
    cache_gib: float = Field(50, ge=0.1, description="what it may take, for all processes of a machine together")
    workers: int = Field(2, ge=0, description="loader processes a rank")
    verify: Literal["hashes", "once", "sizes"] = Field(
        "hashes",
        description="hashes: local shards are hashed in the background, by every machine, since each may have a copy "
        "of its own, and one that is not as its index says ends the run; once: by all machines together, for storage "
        "that they share; sizes: only their sizes are looked at",
    )
    flip: bool = True
    grayscale: float = Field(0.0, ge=0, le=1, description="probability of turning an image grey")
    scaled_decode: bool = Field(
        False,
        description="decode JPEGs of 2, 4 or 8 times a level's size at that size: faster, other pixels (about 55 dB)",
    )
    max_bad_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="unreadable samples are replaced and counted; past this share the run stops",
    )


class LatentsConfig(StrictConfig):
    """Encoded domains, as launch/encode_latents.py writes them: a source and a target, or several domains."""

    source: str | None = None
    target: str | None = None
    domains: tuple[str, ...] = Field(
        (), description="two or more, for one energy that goes from each to each other (energy.condition_on)"
    )
    balance: Literal["equal", "size"] = Field(
        "equal",
        description="of several domains: every pair of them equally often, or as often as it has pairs of images, so "
        "that a larger domain is seen more",
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> LatentsConfig:
        missing = [name for name in ("source", "target") if getattr(self, name) is None]
        if not self.domains and missing:
            raise ValueError(f"{' and '.join(missing)} required and not given (or give domains)")
        if self.domains and len(missing) < 2:
            raise ValueError("give either source and target, or domains")
        if len(self.domains) == 1:
            raise ValueError(f"two or more domains are needed, got only {self.domains[0]}")
        if len(set(self.folders)) < len(self.folders):
            raise ValueError(f"the same folder twice: {', '.join(map(str, self.folders))}")
        if self.balance != "equal" and not self.domains:
            raise ValueError("balance has no effect on a source and a target, which come in pairs: leave it out")
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """All of them: source and target, or the domains."""
        return self.domains or tuple(folder for folder in (self.source, self.target) if folder is not None)


class PretrainConfig(StrictConfig):
    """launch/pretrain.py: stage 1, the autoencoder."""

    autoencoder: Autoencoder
    start_from: str | None = Field(
        None,
        description="begin with the weights of this autoencoder (a folder, a run, an id on the Hub), codebooks "
        "included, and a fresh optimiser; read only where the run has no checkpoint yet; null = random weights",
    )
    recipe: Recipe
    data: ImagesConfig
    training: TrainingConfig
    intervals: IntervalsConfig


class TrainEnergyConfig(StrictConfig):
    """launch/train_energy.py: stage 2, the energy on the latents of a frozen autoencoder."""

    autoencoder: str = Field(description="folder with config.json and model.safetensors")
    energy: Energy
    recipe: Recipe
    data: LatentsConfig
    training: TrainingConfig
    intervals: IntervalsConfig

    @model_validator(mode="after")
    def _conditions(self) -> TrainEnergyConfig:
        if self.training.recompute_from is not None:
            raise ValueError("training.recompute_from has no effect on an energy: remove it")
        conditioned = self.energy.condition_on is not None
        if self.data.domains and not conditioned:
            raise ValueError("data.domains needs energy.condition_on (target or pair)")
        if conditioned and not self.data.domains:
            raise ValueError("energy.condition_on needs data.domains in place of data.source and data.target")
        return self
