"""Options that several benchmarks share, and their checks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

from letit_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from letit_dist.evaluation.benchmark import Fact, Match, Row

Rows: TypeAlias = "Iterator[Match | Fact | Row]"  # what a benchmark yields

# Of a network for 256 pixels: channels there, at most, of the latent, and mapping layers. "full" is as published.
WIDTHS = {"tiny": (2, 8, 8, 2), "small": (8, 64, 64, 8), "medium": (16, 128, 128, 8), "full": (64, 512, 512, 8)}

FROZEN = ("vqvae2", "alae", "beta_vae", "taesd")  # autoencoders that translate


def frozen_options(parser: argparse.ArgumentParser) -> None:
    """Which frozen autoencoders, and how large."""
    add = parser.add_argument
    add("--on", choices=FROZEN, nargs="+", default=FROZEN, help="autoencoders (default: all)")
    add("--resolution", type=int, nargs="+", default=[256, 1024], metavar="PIXELS", help="default: 256 1024")
    add("--width", choices=WIDTHS, default="full", help="of the networks (default: full, as published)")


def frozen_asked(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Each autoencoder at each resolution; a beta-VAE at its own."""
    for kind in dict.fromkeys(args.on):
        for resolution in [64] if kind == "beta_vae" else args.resolution:
            yield kind, resolution


def without_effect(args: argparse.Namespace, *names: str) -> None:
    """UserError for options that are given and mean nothing to this benchmark."""
    if given := [f"--{name}" for name in names if getattr(args, name)]:
        raise UserError(f"{' and '.join(given)} has no effect on {args.command}: leave it out")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """UserError where an option that counts something is below 1."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
