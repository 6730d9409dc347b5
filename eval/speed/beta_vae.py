"""a training iteration of a beta-VAE: as published against the trainer

As published is naive_beta_vae.py, with its images, sizes and batch.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

from speed.arguments import Rows, at_least_one


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--latent", type=int, default=32, metavar="N", help="dimensions of the latents (default: 32, as published)")
    add("--batch", type=int, default=64, metavar="N", help="images an iteration (default: 64, as published)")


def matches(args: argparse.Namespace) -> Rows:
    """A training iteration on images of 64 pixels."""
    at_least_one(args, "batch", "latent")
    from letit_dist.autoencoders.beta_vae import BetaVAEConfig
    from letit_dist.evaluation.benchmark import Match
    from speed.agreement import listed
    from speed.beta_vae_sides import BetaVaeSides

    config = BetaVAEConfig(latent_dim=args.latent)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        exact = BetaVaeSides(config, batch=min(args.batch, 8), run=run, precision="fp64").compare()
        loss = BetaVaeSides(config, batch=args.batch, run=run).compare(weights=False)["loss"]
        gc.collect()
        precision = "bf16" if args.bf16 else "fp32"
        naive = "fp32" if args.plain else None
        sides = BetaVaeSides(
            config, batch=args.batch, run=run, precision=precision, compiler=args.compile, naive_precision=naive
        )
        agree = f"float64: {listed(exact)}; float32: loss {loss:.0e}"
        yield Match("64 pixels", sides.naive_side, sides.our_side, lambda: agree, images=args.batch)
