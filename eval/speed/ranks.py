"""the same pretraining by one process and by several, each on a core of its own: images a second"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from speed.arguments import Rows, at_least_one, without_effect


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--launch", type=Path, default=Path("launch/accelerate/cpu2.yaml"), metavar="FILE", help="of accelerate (cpu2)")
    add("--config", type=Path, default=Path("configs/debug/vqvae2.yaml"), metavar="FILE", help="of pretrain.py")
    add("--images", type=int, default=512, metavar="N", help="of a timed interval; a run has four (512)")
    add("overrides", nargs="*", metavar="key=value", help="of the configuration")


def matches(args: argparse.Namespace) -> Rows:
    """One process and several, in turns."""
    at_least_one(args, "images")
    without_effect(args, "bf16", "compile", "plain", "flops", "threads")
    import statistics

    from letit_dist.evaluation.benchmark import Fact
    from speed.rank_speed import RankSpeed

    with tempfile.TemporaryDirectory() as folder:
        speed = RankSpeed(Path(folder), args.config, args.launch, images=args.images, overrides=args.overrides)
        pairs = [(speed.rate(several=False), speed.rate(several=True)) for _ in range(args.repeats)]
    shares = sorted(several / (speed.ranks * one) for one, several in pairs)
    yield Fact("images a second, one rank", ", ".join(f"{one:.1f}" for one, _ in pairs))
    yield Fact(f"images a second, {speed.ranks} ranks", ", ".join(f"{several:.1f}" for _, several in pairs))
    share = f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})"
    yield Fact(f"of {speed.ranks} times one rank", f"{share} (target: at least 0.8, with a core for each rank)")
