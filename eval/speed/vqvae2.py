"""a training iteration of VQ-VAE-2: as published against the trainer

As published is naive_vqvae2.py. Aims: 1.5 times the images a second, in at most 0.8 of the memory.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from functools import partial
from pathlib import Path

from speed.arguments import Rows, at_least_one


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--resolution", type=int, nargs="+", default=[256], metavar="PIXELS", help="default: 256")
    add("--channels", type=int, default=128, metavar="N", help="of the networks (default: 128, as published)")
    add("--batch", type=int, default=4, metavar="N", help="images an iteration (default: 4)")


def matches(args: argparse.Namespace) -> Rows:
    """A training iteration at each resolution."""
    at_least_one(args, "batch", "channels")
    from letit_dist.autoencoders.vqvae2 import VQVAE2Config
    from letit_dist.config import parse_config
    from letit_dist.evaluation.benchmark import Match
    from speed.agreement import listed
    from speed.vqvae2_sides import Vqvae2Sides

    sizes = {"channels": args.channels, "residual_channels": max(1, args.channels // 4)}
    configs = [parse_config(VQVAE2Config, {"resolution": side, **sizes}) for side in args.resolution]
    for config in configs:
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
