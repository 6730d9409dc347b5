"""a training iteration of VQ-VAE-2: as published against the trainer

As published is naive_vqvae2.py. Aims: 1.5 times the images a second, in at most 0.8 of the memory.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from speed.arguments import Rows, at_least_one, without_effect

if TYPE_CHECKING:
    from letit_dist.autoencoders.vqvae2 import VQVAE2Config


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--resolution", type=int, nargs="+", default=[256], metavar="PIXELS", help="default: 256")
    add("--channels", type=int, default=128, metavar="N", help="of the networks (default: 128, as published)")
    add("--batch", type=int, default=8, metavar="N", help="images an iteration (default: 8)")
    add("--layers", action="store_true", help="only how fast each convolution is, in each direction, on the CPU")


def matches(args: argparse.Namespace) -> Rows:
    """A training iteration at each resolution."""
    at_least_one(args, "batch", "channels")
    if args.layers:
        yield from _layers(args)
        return
    from speed.training_sides import training_match
    from speed.vqvae2_sides import Vqvae2Sides

    for config in _configs(args):
        yield from training_match(Vqvae2Sides, config, args, exact_batch=1, target=1.5)


def _configs(args: argparse.Namespace) -> list[VQVAE2Config]:
    from letit_dist.autoencoders.vqvae2 import VQVAE2Config
    from letit_dist.config import parse_config

    sizes = {"channels": args.channels, "residual_channels": max(1, args.channels // 4)}
    return [parse_config(VQVAE2Config, {"resolution": side, **sizes}) for side in args.resolution]


def _layers(args: argparse.Namespace) -> Rows:
    without_effect(args, "bf16", "compile")
    from letit_dist.autoencoders.vqvae2 import VQVAE2
    from letit_dist.training.setup import seed_weights
    from speed.vqvae2_layers import rates

    for config in _configs(args):
        seed_weights(0)
        yield from rates(VQVAE2(config), args.batch, args.repeats)
