"""--check: what would refuse a run once it has its GPUs, and what it will take, are said before. Writes nothing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from letit_dist.config import to_yaml
from letit_dist.data import order
from letit_dist.data.foreign import expand, is_foreign
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.data.remote import BlockCache, is_url
from letit_dist.errors import UserError
from letit_dist.hub import is_hub_id
from letit_dist.memory import GIB
from letit_dist.recipes.base import Level, Recipe
from letit_dist.schemas import PretrainConfig, TrainEnergyConfig
from letit_dist.training.estimate import ALLOWANCE, Footprint, Rows, Sharding, footprint, images_of, pictures
from letit_dist.training.feeds import LatentFeed, open_images, require_side
from letit_dist.training.plan import BatchPlan, timetable
from letit_dist.training.run import nearest, require_claimable, require_unheld
from letit_dist.training.setup import read_deepspeed, require_trackers, require_usable_deepspeed


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.3g} GiB" if count > 0.1 * GIB else f"{count / 2**20:.3g} MiB"


@dataclass
class DryRun:
    """One run that will not happen. Its methods add to `lines`, for people, and to `problems`, for `finish`."""

    config: PretrainConfig | TrainEnergyConfig
    plans: Sequence[BatchPlan]
    levels: Sequence[Level] = (Level(),)
    run: Path | None = None
    deepspeed: Path | None = None
    gpu_memory: float | None = None  # GiB
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lines += timetable(self.levels, self.plans, self.config.training.images)
        with self._collected():
            require_trackers(self.config.training.trackers)
        with self._collected():
            if self.run is not None:
                require_claimable(self.run, self.config)
        with self._collected():
            if self.run is not None:
                require_unheld(self.run)

    @contextlib.contextmanager
    def _collected(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.problems.append(str(error))

    def images(self, begin: Callable[[str], dict[str, Any]], *, look: bool) -> None:
        """`data.train` and `start_from`, whose weights `begin` takes over; without `look` they are somewhere else."""
        config = self.config
        assert isinstance(config, PretrainConfig)
        if config.start_from is not None:
            self._start(config.start_from, begin, look)
        places = config.data.train
        if any(map(is_url, places)):
            with self._collected():
                self._cache(BlockCache(config.data.cache, int(config.data.cache_gib * GIB)), look)
        here = [path for path in places if look and not is_url(path)]
        for path in (path for path in places if path not in here):
            self.lines.append(f"data.train: {path} is {'on a server' if is_url(path) else 'elsewhere'}, not looked at")
        missing = [path for path in here if not is_foreign(path) and not Path(path).exists()]
        hint = "is not here (if it is on another machine: --without-data)"
        self.problems += [f"data.train: {path} {hint}" for path in missing]
        if missing or not look:
            return
        with self._collected():
            if any(map(is_foreign, places)):
                self._streamed(config, here)
            elif here:
                self._indexed(config, here)

    def _indexed(self, config: PretrainConfig, here: Sequence[str]) -> None:
        """Folders with an index, of which those in `here` are looked at."""
        whole = len(here) == len(config.data.train)
        feed = open_images(config if whole else _of_these(config, here))
        assert feed.dataset is not None
        if not whole:
            shards = sum(len(index.shards) for index in feed.dataset.indexes)
            self.lines.append(f"data: {len(feed.dataset)} images in {shards} shards here, beside those on a server")
            return
        for each in self.plans:
            feed.require_shares(each.batch, each.ranks)
        self.lines.append(_reading(feed.dataset, config, self.plans[-1]))

    def _streamed(self, config: PretrainConfig, here: Sequence[str]) -> None:
        """Tars without an index: how they are dealt, which needs no server, and the first images of those in `here`."""
        feed, plan = open_images(config), self.plans[-1]
        for each in self.plans:
            feed.require_shares(each.batch, each.ranks)
        if here and len(self.levels) == 1:  # a growing network reduces what it reads
            height, width = open_images(_of_these(config, here)).preview(1).data["images"].shape[2:]
            require_side((height, width), config.autoencoder.resolution)
        shards = len(expand(config.data.train))
        readers = plan.ranks * max(1, config.data.workers)
        least, most = shards // plan.ranks, -(-shards // plan.ranks)
        share = f"{least} to {most}" if most > least else f"{most}"
        self.lines.append(
            f"data: {shards} shards without an index, {share} a rank, dealt to {readers} readers; a resume is "
            "approximate"
        )

    def _start(self, folder: str, begin: Callable[[str], dict[str, Any]], look: bool) -> None:
        if not look or is_hub_id(folder):
            where = "an id on the Hub" if is_hub_id(folder) else "elsewhere"
            self.lines.append(f"start_from: {folder} is {where}, not looked at")
            return
        with self._collected():
            origin = begin(folder)
            self.lines.append(f"start_from: {origin['parent']}, fingerprint {origin['parent_fingerprint']}")

    def _cache(self, cache: BlockCache, look: bool) -> None:
        there = nearest(cache.folder)
        held = sum(path.stat().st_size for path in cache.folder.glob("*/[0-9]*")) if cache.folder.is_dir() else 0
        free = shutil.disk_usage(there).free + held
        self.lines.append(f"cache of remote shards: at most {gib(cache.limit)} in {cache.folder}; there: {gib(free)}")
        if look and free < cache.limit:
            raise UserError(
                f"data.cache_gib: the cache may take {gib(cache.limit)}, and {there} has {gib(free)} for it: lower it "
                "to less than that, or name another data.cache"
            )

    @contextlib.contextmanager
    def opening(self, recipe: type[Recipe], load: Callable[[], str]) -> Iterator[None]:
        """What opens the inputs of an energy; an error ends this with all that is wrong with them, and beside them.

        `load()` is the fingerprint of the autoencoder.
        """
        assert isinstance(self.config, TrainEnergyConfig)
        try:
            yield
        except UserError as error:
            self._sharding(recipe)
            fingerprint = None
            with self._collected():
                fingerprint = load()
            for folder in self.config.data.folders:
                with self._collected():
                    LatentSet.open(folder, autoencoder_fingerprint=fingerprint)
            if str(error) not in self.problems:
                self.problems.append(str(error))
            self.finish()

    def latents(self, feed: LatentFeed) -> None:
        """The domains of an energy."""
        for name, side in zip(feed.names, feed.domains, strict=True):
            size = sum(values.nbytes for values in side.fields.values())
            held = f"{gib(size)} in the memory of every rank" if side.fields else "read from disk: too large for memory"
            shards = "1 shard" if len(side.index.shards) == 1 else f"{len(side.index.shards)} shards"
            self.lines.append(f"data: {name}, {len(side)} latents in {shards}, all for every rank; {held}")

    def unseen(self, recipe: type[Recipe]) -> None:
        """An energy whose autoencoder and latents are somewhere else."""
        self._sharding(recipe)
        self.lines.append("autoencoder and latents: elsewhere, not looked at; so memory and disk are not known")
        if self.gpu_memory is not None:
            self.problems.append("--gpu-memory: memory is known only where the autoencoder and its latents are here")

    def network(
        self, build: Callable[[], Recipe], result: Callable[[Any], nn.Module], rows: Rows | None = None
    ) -> None:
        """Memory and disk of the recipe of `build()`; `result` of it is exported, `rows` are its batches (images)."""
        config = self.config
        if rows is None:
            assert isinstance(config, PretrainConfig)
            rows = images_of(config.autoencoder.resolution)
        with FakeTensorMode(allow_non_fake_inputs=True):
            sharding = self._sharding(build())
        found = footprint(build, config, self.levels, self.plans, rows=rows, result=result, sharding=sharding)
        self._memory(found, sharding)
        with self._collected():
            self._disk(found)

    def _sharding(self, recipe: Recipe | type[Recipe]) -> Sharding:
        """What --deepspeed asks for, which may not be for this recipe."""
        if self.deepspeed is None:
            return Sharding()
        several, inner = len(recipe.phases) > 1, recipe.inner_gradients
        with self._collected():
            tree = read_deepspeed(self.deepspeed)
            require_usable_deepspeed(tree, self.config.training, several_phases=several, inner_gradients=inner)
            return Sharding.of(tree)
        return Sharding()

    def _memory(self, found: Footprint, sharding: Sharding) -> None:
        named = {
            "weights": found.weights,
            "average": found.average,
            "frozen networks": found.frozen,
            "optimiser": found.optimizer,
            "ZeRO's copies": found.copies,
            "gradients on their way": found.exchange,
        }
        held = ", ".join(f"{name} {gib(size)}" for name, size in named.items() if size or name == "weights")
        beside = f"; in main memory {gib(found.host)}" if found.host else ""
        way = "one process" if sharding.stage is None and self.plans[0].ranks == 1 else sharding
        self.lines.append(f"{way}: a rank holds {found.parameters / 1e6:.2f} M parameters: {held}{beside}")
        for number, level in enumerate(self.levels):
            name = f"level {number} ({level.resolution} pixels)" if len(self.levels) > 1 else "the largest pass"
            size, on_gpu = found.rank(number), found.on_gpu(number)
            self.lines.append(
                f"{name}: {gib(found.passes[number])} more, {gib(size)} in all; on a GPU about {gib(on_gpu)}"
            )
        limit = self.gpu_memory
        if limit is None:
            return
        most = max(range(len(self.levels)), key=found.on_gpu)
        if found.on_gpu(most) > limit * GIB:
            name = f"level {most} ({self.levels[most].resolution} pixels)" if len(self.levels) > 1 else "a step"
            self.problems.append(
                f"--gpu-memory {limit:g}: {name} takes about {gib(found.on_gpu(most))} of a rank "
                f"({gib(found.rank(most))}, and {ALLOWANCE - 1:.0%} on the pass): "
                f"{self._less_memory(most, found, limit)}"
            )

    def _less_memory(self, level: int, found: Footprint, limit: float) -> str:
        training, count = self.config.training, self.plans[level].microbatch
        if found.rank(level) - found.passes[level] > limit * GIB:
            if found.exchange and self.deepspeed:
                return "no batch is small enough: lower zero_optimization.reduce_bucket_size, or use a larger GPU"
            return "no batch is small enough: use a larger GPU"
        if count > 1:
            return f"lower training.microbatch, there {count}"
        if isinstance(self.config, PretrainConfig) and training.recompute_from is None:
            side = self.levels[level].resolution or self.config.autoencoder.resolution
            return f"set training.recompute_from={max(1, side // 4)}, or use a larger GPU"
        return "use a larger GPU"

    def _disk(self, found: Footprint) -> None:
        config = self.config
        kept = config.intervals.keep + 1  # one more while it is written
        shown = pictures(config.intervals, config.training.images)
        parts = (kept * found.checkpoint, found.export, shown * found.picture)
        self.lines.append(f"a checkpoint: {gib(found.checkpoint)}; {kept} at most on disk: {gib(parts[0])}")
        self.lines.append(f"an export: {gib(parts[1])}; {shown} pictures at most: {gib(parts[2])}")
        if self.run is None:
            self.lines.append(f"disk: {gib(sum(parts))} at most; whether there is room: not checked without --run")
            return
        there = nearest(self.run)
        kinds = ("checkpoints/images-*", "export", "samples")  # not trackers' files, nor checkpoints set aside
        inside = (path for kind in kinds for folder in self.run.glob(kind) for path in folder.rglob("*"))
        held = sum(path.stat().st_size for path in inside if path.is_file())
        free, need = shutil.disk_usage(there).free, max(0, sum(parts) - held)
        beside = f", {gib(held)} of it there already" if held else ""
        short = " (NOT ENOUGH)" if free < need else ""
        self.lines.append(f"disk: {gib(sum(parts))} at most{beside}; free at {there}: {gib(free)}{short}")
        if short:
            raise UserError(
                f"--run {self.run}: {gib(need)} are needed for checkpoints, export and pictures, {gib(free)} are free: "
                "free some, name another --run, or lower intervals.keep"
            )

    def finish(self) -> int:
        """Print the configuration and the lines; UserError with all that would refuse the run."""
        print(to_yaml(self.config), end="")
        print("\n".join(f"# {line}" for line in self.lines))
        if self.problems:
            raise UserError("\n".join(self.problems))
        return 0


def _of_these(config: PretrainConfig, paths: Sequence[str]) -> PretrainConfig:
    """The configuration with these local `paths` alone in data.train."""
    data = config.data.model_copy(update={"train": tuple(paths), "cache": None})
    return config.model_copy(update={"data": data})


def _reading(dataset: ShardDataset, config: PretrainConfig, plan: BatchPlan) -> str:
    """What is read of indexed shards, and how often."""
    shards = [shard for index in dataset.indexes for shard in index.shards]
    size = sum(shard.bytes for shard in shards)
    touched = shards_of_a_rank([shard.samples for shard in shards], config.training.seed, plan)
    epochs = config.training.images / len(dataset)
    return (
        f"data: {len(dataset)} images in {len(shards)} shards, {gib(size)}; {epochs:.3g} epochs; "
        f"{'the rank' if plan.ranks == 1 else f'each of {plan.ranks} ranks'} reads {gib(size / plan.ranks)} an epoch, "
        f"from {touched} of the shards"
    )


def shards_of_a_rank(samples: Sequence[int], seed: int, plan: BatchPlan) -> int:
    """From how many shards, of so many `samples` each, the first rank reads in the first epoch."""
    ends = np.cumsum(samples)
    positions = np.arange(ends[-1])
    mine = positions[positions % plan.batch < plan.per_rank]
    found = order.sample_at(mine, seed, int(ends[-1]))
    return len(np.unique(np.searchsorted(ends, found, side="right")))
