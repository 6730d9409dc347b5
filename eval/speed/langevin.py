"""chains down an energy, as training runs them: through autograd at every point, against our sampler

Latents are normal random numbers and energies have random weights. The published sampler freezes the parameters; the
rows "all gradients" do not, as the plainest loop would not. The energies are those of `energy`, whose iteration has a
chain inside it; here nothing learns.
"""

from __future__ import annotations

import argparse
from functools import partial

from letit_dist.errors import UserError
from speed.arguments import Rows, at_least_one, without_effect

KINDS = ("alae", "beta_vae", "vqvae2")


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--on", choices=KINDS, nargs="+", default=KINDS, help="autoencoders for whose latents (default: all)")
    add("--resolution", type=int, default=256, metavar="PIXELS", help="of VQ-VAE-2, whose maps are a quarter (256)")
    add("--multiplier", type=int, default=1, metavar="M", help="of the convolutional energy's channels (1)")
    add("--batch", type=int, metavar="N", help="chains at once (default: as published, 32, 128 and 8)")
    add("--steps", type=int, metavar="T", help="of a chain (default: as published, 20, 10 and 35)")


def matches(args: argparse.Namespace) -> Rows:
    """Every energy, its parameters frozen in the naive chain and not."""
    at_least_one(args, "batch", "steps", "multiplier")
    without_effect(args, "compile")
    if args.resolution < 16 or args.resolution & (args.resolution - 1):
        raise UserError(f"--resolution {args.resolution}: must be a power of two from 16 on")
    from letit_dist.evaluation.benchmark import Match
    from speed.chain_sides import ChainSides
    from speed.energy_sides import published_chain
    from speed.translate_sides import device_of

    side = args.resolution // 4
    shapes: dict[str, tuple[int, ...]] = {"alae": (512,), "beta_vae": (32,), "vqvae2": (64, side, side)}
    for kind in dict.fromkeys(args.on):
        chain = published_chain(kind, multiplier=args.multiplier, batch=args.batch, steps=args.steps)
        for frozen in (True, False):
            sides = ChainSides(chain, shapes[kind], device_of(), frozen=frozen)
            agreement = sides.agree()
            sides.precisions("bf16" if args.bf16 else "fp32", plain=args.plain)
            name = kind if frozen else f"{kind}, all gradients"
            yield Match(name, sides.naive_side, sides.our_side, partial(str, agreement), chain.batch)
