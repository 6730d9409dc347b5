"""an iteration of training an energy: as published, with and without encoding, against the trainer on stored latents

As published is naive_energy.py: both batches pass the frozen encoder anew, chains go through autograd, loss, Adam,
average. The published sampler freezes the parameters; the rows "all gradients" do not, as the plainest loop would not.
The energies: 512-2048-1 on ALAE's latents, 32-64-1 on a beta-VAE's, and the residual convolutional one on VQ-VAE-2's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed.arguments import WIDTHS, Rows, at_least_one, without_effect

if TYPE_CHECKING:
    from letit_dist.autoencoders.base import AutoencoderConfig
    from letit_dist.evaluation.benchmark import Fact
    from speed.energy_sides import Chain, EnergySides

KINDS = ("alae", "beta_vae", "vqvae2")
# Without the encoding: chains bound by matrix products, by overhead, and by convolutions; and with it.
TARGETS, ENCODED = {"alae": 1.4, "beta_vae": 4, "vqvae2": 1.6}, {"alae": 500}


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--on", choices=KINDS, nargs="+", default=KINDS, help="autoencoders on whose latents (default: all)")
    add("--resolution", type=int, default=256, metavar="PIXELS", help="of ALAE and VQ-VAE-2 (default: 256)")
    add("--width", choices=WIDTHS, default="full", help="of ALAE's networks (default: full, as published)")
    add("--multiplier", type=int, default=1, metavar="M", help="of the convolutional energy's channels (1)")
    add("--batch", type=int, metavar="N", help="images of each side (default: as published, 32, 128 and 8)")
    add("--steps", type=int, metavar="T", help="of a chain (default: as published, 20, 10 and 35)")
    add("--no-encoding", action="store_true", help="without the rows in which the naive side encodes")


def matches(args: argparse.Namespace) -> Rows:
    """Every energy without encoding, frozen and not; then with encoding, as published."""
    at_least_one(args, "batch", "steps", "multiplier")
    without_effect(args, "compile")
    from letit_dist.autoencoders.base import build_autoencoder
    from letit_dist.evaluation.benchmark import Match
    from letit_dist.training.setup import seed_weights
    from speed.energy_sides import EnergySides

    for kind in dict.fromkeys(args.on):
        seed_weights(1)
        config, chain = _setting(kind, args)
        autoencoder = build_autoencoder(config)
        for frozen in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                plain = "fp32" if args.plain else None
                sides = EnergySides(
                    chain, autoencoder, Path(folder), frozen=frozen, bf16=args.bf16, naive_precision=plain
                )
                name = kind if frozen else f"{kind}, all gradients"
                naive = sides.naive_side(encoding=False)
                yield Match(name, naive, sides.our_side, sides.agree, 2 * chain.batch, TARGETS[kind])
                if kind == "alae" and frozen:
                    yield _rate(chain, sides)
                if frozen and not args.no_encoding:
                    naive = sides.naive_side(encoding=True)
                    name, target = f"{kind}, encoding", ENCODED.get(kind)
                    yield Match(name, naive, sides.our_side, lambda: "as above", 2 * chain.batch, target)


def _setting(kind: str, args: argparse.Namespace) -> tuple[AutoencoderConfig, Chain]:
    """(config of an autoencoder, chain on its latents)"""
    from letit_dist.autoencoders.alae import ALAEConfig
    from letit_dist.autoencoders.beta_vae import BetaVAEConfig
    from letit_dist.autoencoders.vqvae2 import VQVAE2Config
    from letit_dist.config import parse_config
    from speed.energy_sides import published_chain

    start, most, latent, layers = WIDTHS[args.width]
    found: dict[str, tuple[type[AutoencoderConfig], dict[str, Any]]] = {
        "alae": (
            ALAEConfig,
            {
                "resolution": args.resolution,
                "start_channels": max(1, start * 256 // args.resolution),
                "max_channels": most,
                "latent_dim": latent,
                "mapping_layers": layers,
            },
        ),
        "beta_vae": (BetaVAEConfig, {}),
        "vqvae2": (VQVAE2Config, {"resolution": args.resolution}),
    }
    schema, numbers = found[kind]
    chain = published_chain(kind, latent=latent, multiplier=args.multiplier, batch=args.batch, steps=args.steps)
    return parse_config(schema, numbers), chain


def _rate(chain: Chain, sides: EnergySides) -> Fact:
    """The share of the rate of large matrix products that an iteration of the MLP comes to, its operations counted as
    published: a chain that takes fewer may come to more than all of it."""
    import statistics

    import torch

    from letit_dist.energy.mlp import MLPEnergyConfig
    from letit_dist.evaluation.benchmark import Fact, clock

    assert isinstance(chain.energy, MLPEnergyConfig)
    seconds = clock(sides.device)
    large = torch.randn(1024, 1024, device=sides.device)
    rate = 2 * 1024**3 / min(seconds(lambda: large @ large) for _ in range(10))
    # Operations of a batch in one product with the hidden layer's weights: a step of a published chain takes two
    # products, the update four (forward and weights' gradient, over both domains).
    one = 2 * sides.recipe.energy.latent_shape[0] * chain.energy.hidden * chain.batch
    run = sides.our_side.run
    run()
    took = statistics.median(seconds(run) for _ in range(5))
    share = one * (2 * chain.steps + 4) / took / rate
    return Fact("alae's share of the matrix rate", f"{share:.0%} of {rate / 1e9:.0f} GFLOP/s, products of 1024 x 1024")
