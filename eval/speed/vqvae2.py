"""a training iteration of VQ-VAE-2: as published against the trainer

As published is naive_vqvae2.py. Aims: 1.5 times the images a second, in at most 0.8 of the memory.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from speed.arguments import Rows, at_least_one, without_effect

if TYPE_CHECKING:
    from letit_dist.autoencoders.vqvae2 import VQVAE2Config


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--resolution", type=int, nargs="+", default=[256], metavar="PIXELS", help="default: 256")
    add("--channels", type=int, default=128, metavar="N", help="of the networks (default: 128, as published)")
    add("--batch", type=int, default=4, metavar="N", help="images an iteration (default: 4)")
    add("--layers", action="store_true", help="only how fast each convolution is, in each direction, on the CPU")


def matches(args: argparse.Namespace) -> Rows:
    """A training iteration at each resolution."""
    at_least_one(args, "batch", "channels")
    if args.layers:
        yield from _layers(args)
        return
    from letit_dist.evaluation.benchmark import Match
    from speed.agreement import listed
    from speed.vqvae2_sides import Vqvae2Sides

    for config in _configs(args):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            exact = Vqvae2Sides(config, batch=1, run=run, precision="fp64").compare()
            loss = Vqvae2Sides(config, batch=args.batch, run=run).compare(weights=False)["loss"]
            gc.collect()
            precision = "bf16" if args.bf16 else "fp32"
            naive = "fp32" if args.plain else None
            sides = Vqvae2Sides(
                config, batch=args.batch, run=run, precision=precision, compiler=args.compile, naive_precision=naive
            )
            agree = f"float64: {listed(exact)}; float32: loss {loss:.0e}"
            name = f"{config.resolution} pixels"
            yield Match(name, sides.naive_side, sides.our_side, partial(str, agree), args.batch, 1.5)


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
