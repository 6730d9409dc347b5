#!/usr/bin/env python3
"""One rank of `throughput.py zero`: steps on random images, then OUT/RANK.json with what they took.

accelerate launch eval/speed/zero_rank.py OUT 10 configs/debug/vqvae2.yaml training.batch=8

OUT/checkpoints then has the weights after them.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.config import load_config
from letit_dist.memory import resident_bytes, resident_peak_of, return_freed_memory
from letit_dist.recipes.base import Batch, Recipe
from letit_dist.registry import RECIPES
from letit_dist.schemas import PretrainConfig
from letit_dist.training.setup import seed_weights
from letit_dist.training.trainer import Trainer
from speed.trainers import idle_trainer, ready

WARMUP = 2  # steps: in the first one everything is made that later ones keep
_BATCHES = 4  # that are drawn; then they come again


def configuration(path: str, overrides: Sequence[str]) -> PretrainConfig:
    """The file with its overrides; no shards are needed."""
    return load_config(PretrainConfig, path, ["data.train=[none]", *overrides])


def built(config: PretrainConfig) -> Recipe:
    """The recipe with the weights that a run begins with."""
    seed_weights(config.training.seed)
    recipe_class: Callable[..., Recipe] = RECIPES.get(config.recipe.kind)
    network = build_autoencoder(config.autoencoder)
    return recipe_class(config.recipe, network, seed=config.training.seed, precision=config.training.precision)


def _load_libraries(config: PretrainConfig) -> None:
    """One pass of a recipe that nobody keeps: code that it loads and compiles is no stage's memory."""
    recipe = built(config)
    recipe.to(memory_format=torch.channels_last if config.training.channels_last else torch.contiguous_format)
    side = config.autoencoder.resolution
    batch = Batch({"images": torch.zeros(1, 3, side, side)}, torch.arange(1), 0, 1)
    for phase in recipe.phases:
        recipe(phase.name, batch).loss.backward()


def _batches(trainer: Trainer, side: int) -> Iterator[Batch]:
    """This rank's parts of global batches that depend on nothing but their numbers."""
    plan, rank = trainer.plan, trainer.accelerator.process_index
    mine = slice(rank * plan.per_rank, (rank + 1) * plan.per_rank)
    drawn = []
    for number in range(_BATCHES):
        images = torch.rand(plan.batch, 3, side, side, generator=torch.Generator().manual_seed(number)) * 2 - 1
        drawn.append(images[mine])
    while True:
        seen = trainer.images_seen
        images = drawn[seen // plan.batch % _BATCHES]
        indices = torch.arange(seen, seen + plan.batch)[mine]
        yield ready(trainer, Batch({"images": images}, indices, seen, plan.batch))


def _steps(trainer: Trainer, batches: Iterator[Batch], steps: int) -> float:
    """Seconds of `steps` after those of the warm-up."""
    on_gpu = trainer.accelerator.device.type == "cuda"
    begun = 0.0
    for number in range(WARMUP + steps):
        if number == WARMUP:
            trainer.accelerator.wait_for_everyone()
            if on_gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
        trainer.learn(next(batches))
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measured(trainer: Trainer, side: int, steps: int) -> dict[str, object]:
    """Seconds, the peak of memory, and what this rank holds, by the kind of device where it lies; bytes.

    The peak is the allocator's on a GPU. On a CPU it is what is held before the first step and what the process grows
    by from there, None where the system does not tell.
    """
    batches = _batches(trainer, side)
    taken: list[float] = []
    peak: int | None = None

    def run() -> None:
        taken.append(_steps(trainer, batches, steps))

    if trainer.accelerator.device.type == "cuda":
        run()
        peak = torch.cuda.max_memory_allocated()
    else:
        average = list(trainer.average.module.state_dict().values()) if trainer.average else []
        held = sum(tensor.nbytes for kind in (*trainer.state.held().values(), average) for tensor in kind)
        return_freed_memory()
        before = resident_bytes()
        try:
            peak = held + resident_peak_of(run) - before
        except OSError:
            if not taken:
                run()
    found: dict[str, object] = {"seconds": taken[0], "images": steps * trainer.plan.batch, "peak": peak}
    for kind, tensors in trainer.state.held().items():
        places: Counter[str] = Counter()
        for tensor in tensors:
            places[tensor.device.type] += tensor.nbytes
        found[kind] = places
    return found


def main(out: str, steps: str, path: str, *overrides: str) -> int:
    config = configuration(path, overrides)
    _load_libraries(config)
    trainer = idle_trainer(built(config), Path(out), **dict(config.training))
    found = measured(trainer, config.autoencoder.resolution, int(steps))
    trainer.save()
    trainer.store.wait()
    rank = trainer.accelerator.process_index
    (Path(out) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
