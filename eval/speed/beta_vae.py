"""a training iteration of a beta-VAE: as published against the trainer

As published is naive_beta_vae.py, with its images, sizes and batch.
"""

from __future__ import annotations

import argparse

from speed.arguments import Rows, at_least_one


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--latent", type=int, default=32, metavar="N", help="dimensions of the latents (default: 32, as published)")
    add("--batch", type=int, default=64, metavar="N", help="images an iteration (default: 64, as published)")


def matches(args: argparse.Namespace) -> Rows:
    """A training iteration on images of 64 pixels."""
    at_least_one(args, "batch", "latent")
    from letit_dist.autoencoders.beta_vae import BetaVAEConfig
    from speed.beta_vae_sides import BetaVaeSides
    from speed.training_sides import training_match

    yield from training_match(BetaVaeSides, BetaVAEConfig(latent_dim=args.latent), args, exact_batch=8)
