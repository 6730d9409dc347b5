"""the same pretraining by one process and by several, each on a core of its own: images a second

By default at 128 pixels with 16 images a rank and step, nearer to a real run's work between two exchanges, and then as
the configuration says. "Runs at once" share nothing but the machine, each with a rank's part of the batch: what ranks
would reach that exchange nothing and need not wait for each other.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from speed.arguments import Rows, at_least_one, without_effect


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--launch", type=Path, default=Path("launch/accelerate/cpu2.yaml"), metavar="FILE", help="of accelerate (cpu2)")
    add("--config", type=Path, default=Path("configs/debug/vqvae2.yaml"), metavar="FILE", help="of pretrain.py")
    add("--batch", type=int, nargs="+", metavar="N", help="images a step, of all ranks together")
    add("--side", type=int, metavar="PIXELS", help="of the images")
    add("--images", type=int, default=128, metavar="N", help="of a timed interval; a run has four (128)")
    add("overrides", nargs="*", default=[], metavar="key=value", help="of the configuration")


def matches(args: argparse.Namespace) -> Rows:
    """For each row one process, several, and several runs at once, in turns."""
    at_least_one(args, "images")
    without_effect(args, "bf16", "compile", "plain", "flops", "threads")
    import statistics

    from letit_dist.evaluation.benchmark import Fact
    from speed.rank_speed import RankSpeed, Work

    with tempfile.TemporaryDirectory() as folder:
        speed = RankSpeed(Path(folder), args.config, args.launch, images=args.images, overrides=args.overrides)
        ranks = speed.ranks
        own = speed.own_work(args.batch or [], args.side)
        asked = [Work(own.side, batch) for batch in args.batch or [own.batch]]
        for work in asked if args.batch or args.side else dict.fromkeys((Work(128, 16 * ranks), own)):
            found = [(speed.one(work), speed.several(work), speed.at_once(work)) for _ in range(args.repeats)]
            sides = {
                "one rank": [one for one, _, _ in found],
                f"{ranks} ranks": [several for _, several, _ in found],
                f"{ranks} runs at once of {work.batch // ranks} images a step": [apart for _, _, apart in found],
            }
            for name, rates in sides.items():
                text = ", ".join(f"{rate:.1f}" for rate in rates)
                yield Fact(f"{work}: images a second, {name}", text)
            for name, part, note in (
                (f"{ranks} runs at once", 2, "what the machine leaves"),
                (f"{ranks} ranks", 1, "target: at least 0.8, with a core for each rank"),
            ):
                shares = sorted(rates[part] / (ranks * rates[0]) for rates in found)
                share = f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})"
                yield Fact(f"{work}: of {ranks} times one rank, {name}", f"{share} ({note})")
