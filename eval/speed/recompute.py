"""a training iteration of VQ-VAE-2 that keeps all results against one that computes some again

"Naive" keeps them, "ours" has training.recompute_from. Both are the trainer's. A ratio below 1 is the price in time,
the two peaks are what it buys.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from speed.arguments import Rows, at_least_one, without_effect

if TYPE_CHECKING:
    from letit_dist.autoencoders.vqvae2 import VQVAE2Config
    from letit_dist.training.trainer import Trainer


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--resolution", type=int, default=1024, metavar="PIXELS", help="default: 1024")
    add("--from", dest="sides", type=int, nargs="+", default=[512], metavar="PIXELS", help="a row each (default: 512)")
    add("--channels", type=int, default=128, metavar="N", help="of the networks (default: 128, as published)")
    add("--batch", type=int, default=1, metavar="N", help="images an iteration (default: 1)")


def matches(args: argparse.Namespace) -> Rows:
    """A row for each size from which on layers compute again, after weights and loss were found equal."""
    at_least_one(args, "batch", "channels", "resolution")
    without_effect(args, "bf16", "compile", "plain")
    from letit_dist.autoencoders.vqvae2 import VQVAE2Config
    from letit_dist.config import parse_config
    from letit_dist.evaluation.benchmark import Match
    from speed.trainers import learning_side

    sizes = {"channels": args.channels, "residual_channels": max(1, args.channels // 4)}
    config = parse_config(VQVAE2Config, {"resolution": args.resolution, **sizes})
    for side in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            found = agreement(config, Path(folder), args.batch, side)
            pair = [_trainer(config, Path(folder), args.batch, part) for part in (None, side)]
            sides = [learning_side(trainer, partial(_learn, trainer, args.batch, args.resolution)) for trainer in pair]
            name = f"{args.resolution} pixels, again from {side}"
            yield Match(name, sides[0], sides[1], partial(str, found), args.batch)


def agreement(config: VQVAE2Config, folder: Path, batch: int, side: int) -> str:
    """How far apart one iteration leaves the weights of both, of the largest; UserError beyond 1e-5."""
    from speed.agreement import apart, full_precision, listed, require_agreement

    both = [_trainer(config, folder, batch, part) for part in (None, side)]
    for trainer in both:
        with full_precision(trainer.recipe):
            _learn(trainer, batch, config.resolution)
    kept, again = (trainer.recipe.state_dict() for trainer in both)
    found = {"weights": max(apart(again[n], kept[n]) for n in kept if kept[n].is_floating_point())}
    losses = [trainer.means.means()["loss"] for trainer in both]
    found["loss"] = abs(losses[1] - losses[0]) / abs(losses[0])
    require_agreement(found, 1e-5)
    return f"float32: {listed(found)}"


def _trainer(config: VQVAE2Config, folder: Path, batch: int, side: int | None) -> Trainer:
    from letit_dist.autoencoders.vqvae2 import VQVAE2
    from letit_dist.recipes.base import OptimizerConfig
    from letit_dist.recipes.vqvae2 import VQVAE2Recipe, VQVAE2RecipeConfig
    from letit_dist.training.setup import seed_weights
    from speed.trainers import idle_trainer

    seed_weights(0)
    network = VQVAE2(config)
    network.recompute(side)
    settings = VQVAE2RecipeConfig(optimizer=OptimizerConfig(learning_rate=3e-4))
    recipe = VQVAE2Recipe(settings, network, seed=0, precision="fp32")
    return idle_trainer(recipe, folder, batch=batch)


def _learn(trainer: Trainer, count: int, side: int) -> None:
    import torch

    from letit_dist.recipes.base import Batch
    from speed.trainers import ready

    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trainer.learn(ready(trainer, Batch({"images": images}, torch.arange(count), 0, count)))
