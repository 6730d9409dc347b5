"""the table for a GPU: VQ-VAE-2, ALAE at each level, beta-VAE, energies and decoding, against plain float32

Every row of the other benchmarks that belongs there, with --plain and --flops: images a second, memory and the share of
the device's peak, under what --bf16 and --compile say for ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from speed import alae, beta_vae, decode, energy, vqvae2
from speed.arguments import at_least_one

if TYPE_CHECKING:
    from letit_dist.evaluation.benchmark import Fact, Match

# Images an iteration at each level of ALAE: as many as float32 without recomputation puts into 80 GB, and to spare.
ALAE_BATCHES = {8: 128, 16: 128, 32: 128, 64: 64, 128: 32, 256: 16, 512: 8, 1024: 4}
PARTS = {"vqvae2": vqvae2, "alae": alae, "beta_vae": beta_vae, "energy": energy, "decode": decode}


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", choices=PARTS, nargs="+", default=tuple(PARTS), help="parts of the table (default: all)")
    add("--tiny", action="store_true", help="networks and images so small that a CPU goes through it in minutes")


def matches(args: argparse.Namespace) -> Iterator[Match | Fact]:
    """Every row of every part, under its name."""
    at_least_one(args, "repeats")
    args.plain = args.flops = True  # as this table is defined
    for command, words in _commands(args.tiny):
        if command in args.only:
            for found in PARTS[command].matches(_arguments(args, command, words)):
                name = f"{command}: {found.name}"
                yield replace(found, name=name, target=None) if hasattr(found, "target") else replace(found, name=name)


def _commands(tiny: bool) -> list[tuple[str, list[Any]]]:
    """(benchmark, its options) of each part."""
    if tiny:
        width = ["--width", "tiny", "--resolution"]
        return [
            ("vqvae2", ["--resolution", 32, "--channels", 8, "--batch", 2]),
            *[("alae", [*width, side, "--batch", 2]) for side in (8, 16)],
            ("beta_vae", ["--latent", 4, "--batch", 2]),
            ("energy", [*width, 32, "--batch", 2, "--steps", 2, "--no-encoding"]),
            ("decode", [*width, 64, "--batch", 1]),
        ]
    full = ["--width", "full", "--resolution"]
    return [
        ("vqvae2", ["--resolution", 256, "--batch", 64]),
        ("vqvae2", ["--resolution", 1024, "--batch", 4]),
        *[("alae", [*full, side, "--batch", batch]) for side, batch in ALAE_BATCHES.items()],
        ("beta_vae", []),
        ("energy", ["--no-encoding"]),
        ("decode", [*full, 1024, "--batch", 4]),
    ]


def _arguments(args: argparse.Namespace, command: str, words: list[object]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    PARTS[command].options(parser)
    found = vars(parser.parse_args([str(word) for word in words]))
    # Chains of energies are not compiled: they are the sampler's own operations.
    compiler = None if command == "energy" else args.compile
    return argparse.Namespace(**{**vars(args), **found, "command": command, "compile": compiler})
