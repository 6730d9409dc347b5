"""the same pretraining by one process and by several, each on a core of its own: images a second

By default with 16 images a rank and step, as published recipes are at least, and with the batch of the configuration.
"Runs at once" share nothing but the machine, each with a rank's part of the batch: what ranks that exchange nothing
would reach, short of waiting for each other.
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
    add("--batch", type=int, nargs="+", metavar="N", help="images a step of all ranks (16 a rank; the configuration's)")
    add("--images", type=int, default=256, metavar="N", help="of a timed interval; a run has four (256)")
    add("overrides", nargs="*", metavar="key=value", help="of the configuration")


def matches(args: argparse.Namespace) -> Rows:
    """For each batch one process, several, and several runs at once, in turns."""
    at_least_one(args, "images")
    without_effect(args, "bf16", "compile", "plain", "flops", "threads")
    import statistics

    from letit_dist.evaluation.benchmark import Fact
    from speed.rank_speed import RankSpeed

    with tempfile.TemporaryDirectory() as folder:
        speed = RankSpeed(Path(folder), args.config, args.launch, images=args.images, overrides=args.overrides)
        ranks = speed.ranks
        own = speed.check_batches(args.batch or [])
        for batch in args.batch or dict.fromkeys((16 * ranks, own)):
            found = [(speed.one(batch), speed.several(batch), speed.at_once(batch)) for _ in range(args.repeats)]
            sides = {
                "one rank": [one for one, _, _ in found],
                f"{ranks} ranks": [several for _, several, _ in found],
                f"{ranks} runs at once of {batch // ranks} images a step": [apart for _, _, apart in found],
            }
            for name, rates in sides.items():
                text = ", ".join(f"{rate:.1f}" for rate in rates)
                yield Fact(f"{batch} images a step: images a second, {name}", text)
            for name, part, note in (
                (f"{ranks} runs at once", 2, "what the machine leaves"),
                (f"{ranks} ranks", 1, "target: at least 0.8, with a core for each rank"),
            ):
                shares = sorted(rates[part] / (ranks * rates[0]) for rates in found)
                share = f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})"
                yield Fact(f"{batch} images a step: of {ranks} times one rank, {name}", f"{share} ({note})")
