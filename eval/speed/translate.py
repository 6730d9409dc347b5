"""translating a folder of pictures, files to files: plainly, one at a time, against launch/translate.py's pipeline

Plainly is naive_autoencoders.py and the chain of naive_energy.py through autograd, parameters' gradients included. With
--plain that side stays in float32 without a compiler.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from speed.arguments import Rows, at_least_one, frozen_asked, frozen_options


def options(parser: argparse.ArgumentParser) -> None:
    frozen_options(parser)
    add = parser.add_argument
    add("--images", type=int, default=8, metavar="N", help="of a timed run (default: 8)")
    add("--batch", type=int, default=4, metavar="N", help="images at once of ours (default: 4)")
    add("--steps", type=int, metavar="T", help="of a chain (default: as published, 20, 10, 35 and 35)")


def matches(args: argparse.Namespace) -> Rows:
    """Each autoencoder at each resolution; then where the time of ours goes."""
    at_least_one(args, "batch", "images", "steps")
    from letit_dist.evaluation.benchmark import Fact, Match, Side
    from speed.agreement import listed
    from speed.models import make_translator
    from speed.translate_sides import TranslateSides, device_of

    for kind, resolution in frozen_asked(args):
        translator = make_translator(kind, resolution, args.width, steps=args.steps)
        with tempfile.TemporaryDirectory() as folder:
            sides = TranslateSides(
                translator, Path(folder), device_of(), images=args.images, batch=min(args.batch, args.images)
            )
            agree = listed(sides.compare())
            sides.prepare("bf16" if args.bf16 else "fp32", args.compile, plain=args.plain)
            name = f"{kind}, {resolution} pixels"
            naive, ours = Side(sides.run_naive, sides.held_naive), Side(sides.run_ours, sides.held)
            yield Match(name, naive, ours, partial(str, agree), images=args.images)
            seconds = sides.shares(args.repeats)
        total = sum(seconds.values())
        parts = ", ".join(f"{part} {1000 * spent:.3g} ms ({spent / total:.1%})" for part, spent in seconds.items())
        target = " (target of the chain: below 1 %)" if resolution == 1024 else ""
        yield Fact(name, f"an image of ours takes {parts}{target}, beside reading and writing")
