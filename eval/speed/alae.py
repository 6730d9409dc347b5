"""a training iteration of ALAE (three phases, their steps, the average): as published against the trainer

As published is naive_alae.py. With --lazy N a second row, in which R1 is evaluated in one batch of N, with N times its
weight: the expected gradient is the same (1912.04958, appendix B).
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

from letit_dist.errors import UserError
from speed.arguments import WIDTHS, Rows, at_least_one

EXACT, LAZY = 1.0, 1.4  # targets of naive / ours


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--resolution", type=int, nargs="+", default=[64, 128, 256], metavar="PIXELS", help="default: 64 128 256")
    add("--width", choices=WIDTHS, default="small", help="of the networks (default: small)")
    add("--full", dest="width", action="store_const", const="full", help="the published widths: --width full")
    add("--batch", type=int, default=4, metavar="N", help="images an iteration (default: 4, as published for a GPU)")
    add("--lazy", type=int, metavar="N", help="also with R1 in one batch of N alone (default: without this row)")


def matches(args: argparse.Namespace) -> Rows:
    """A training iteration at each resolution; a smaller one has the layers that the network for 256 has there."""
    from letit_dist.autoencoders.alae import ALAEConfig
    from letit_dist.config import parse_config
    from letit_dist.evaluation.benchmark import Match
    from speed.alae_sides import AlaeSides, Tolerance
    from speed.training_sides import Setting

    at_least_one(args, "batch")
    if args.lazy is not None and args.lazy < 2:
        raise UserError(f"--lazy {args.lazy}: must be at least 2, for 1 is the row without it")
    start, most, latent, layers = WIDTHS[args.width]
    sizes = {"max_channels": most, "latent_dim": latent, "mapping_layers": layers}
    configs = [
        parse_config(ALAEConfig, {"resolution": side, "start_channels": max(1, start * 256 // side), **sizes})
        for side in args.resolution
    ]
    for config in configs:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            # Where LeakyReLU's kink lies within rounding of an activation, gradients jump, and with them R1: only
            # float64 can tell a wrong formula. With an eps of nothing, its place in Adam makes no difference.
            double = AlaeSides(config, run, Setting(min(args.batch, 2), "fp64"), eps=1e-30)
            exact = double.compare(Tolerance()).found
            del double
            gc.collect()
            sides = AlaeSides(config, run, Setting.asked(args))

            def agree(sides: AlaeSides = sides, exact: dict[str, float] = exact) -> str:
                loose = Tolerance(loss=1e-3, gradient=float("inf"), weight=float("inf"), average=float("inf"))
                found = sides.compare(loose).found
                return (
                    f"float64: losses {exact['loss']:.0e}, gradients {exact['gradient']:.0e}, "
                    f"weights {exact['weight']:.0e}; float32: losses {found['loss']:.0e}"
                )

            name = f"{config.resolution} pixels"
            yield Match(name, sides.naive_side, sides.our_side, agree, args.batch, EXACT)
            if args.lazy:
                naive, ours = sides.in_turns(args.lazy)
                name, images = f"{name}, R1 in one batch of {args.lazy}", args.batch * args.lazy
                yield Match(name, naive, ours, lambda: "in expectation only", images, LAZY)
