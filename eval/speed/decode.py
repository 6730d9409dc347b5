"""decoding latents with frozen autoencoders: written plainly against `Translator.decode`

Written plainly is naive_autoencoders.py: row-major, without a graph. At 1024 pixels TAESD decodes in tiles by itself;
both sides take the whole image here.
"""

from __future__ import annotations

import argparse
from functools import partial

from speed.arguments import Rows, at_least_one, frozen_asked, frozen_options


def options(parser: argparse.ArgumentParser) -> None:
    frozen_options(parser)
    add = parser.add_argument
    add("--batch", type=int, default=4, metavar="N", help="images at once (default: 4)")


def matches(args: argparse.Namespace) -> Rows:
    """Each autoencoder at each resolution; a beta-VAE at its own."""
    at_least_one(args, "batch")
    from letit_dist.evaluation.benchmark import Match, Side
    from speed.agreement import full_precision, listed
    from speed.models import make_translator
    from speed.translate_sides import DecodeSides, device_of

    device = device_of()
    for kind, resolution in frozen_asked(args):
        translator = make_translator(kind, resolution, args.width)
        sides = DecodeSides(translator, device, batch=args.batch)
        with full_precision(translator, sides.naive):
            agree = listed(sides.compare())
        sides.prepare("bf16" if args.bf16 else "fp32", args.compile, plain=args.plain)
        naive = Side(sides.run_naive, sides.naive.held)
        ours = Side(sides.run_ours, sides.held)
        yield Match(f"{kind}, {resolution} pixels", naive, ours, partial(str, agree), images=args.batch)
