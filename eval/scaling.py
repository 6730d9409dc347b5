#!/usr/bin/env python3
"""How far a run scales, on paper: the reading by simulation, a step by a model. Needs no cluster and no data.

    python eval/scaling.py data --samples 60000 --bytes 1300000 --shards 60 --batch 4096 --ranks 1 8 64 512 4096
    python eval/scaling.py data --shards-of data/ffhq1024/train --batch 32 --ranks 1 8 32
    python eval/scaling.py step configs/pretrain/ffhq1024_alae.yaml --ranks 1 8 16 32

data    deals an epoch in the middle of a run to all ranks by the reader's own functions: samples that come twice or
        never, bytes and shards a rank reads, how much more the busiest rank of a step reads than the mean one, and how
        long a resumed rank takes to find its next batch
step    counts the operations of each phase and level by running it on tensors without memory, and sets them against
        what ranks exchange, for a cluster given by --operations, --inside, --between and --latency
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from letit_dist.errors import UserError, reports_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    data = commands.add_parser("data")
    data.add_argument("--shards-of", type=Path, metavar="FOLDER", help="packed shards, in place of the next three")
    data.add_argument("--samples", type=int, metavar="N", help="of the data set")
    data.add_argument("--bytes", type=int, metavar="N", help="of a sample, in the mean")
    data.add_argument("--shards", type=int, metavar="N", help="that hold them")
    data.add_argument("--batch", type=int, required=True, metavar="N", help="images a step, over all ranks")
    step = commands.add_parser("step")
    step.add_argument("config", type=Path, help="of pretrain.py")
    step.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    step.add_argument("--operations", type=float, default=3e13, help="of a GPU, a second, sustained (3e13)")
    step.add_argument("--inside", type=float, default=2e11, help="bytes a second between GPUs of a machine (2e11)")
    step.add_argument("--between", type=float, default=2e10, help="the same between machines, a GPU's share (2e10)")
    step.add_argument("--machine", type=int, default=8, help="GPUs of a machine (8)")
    step.add_argument(
        "--latency", type=float, default=2e-5, help="seconds a collective, for each doubling of the ranks (2e-5)"
    )
    for command in (data, step):
        command.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 4096], metavar="N")
    return parser.parse_intermixed_args(argv) if argv and argv[0] == "step" else parser.parse_args(argv)


def data(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of ranks."""
    from letit_dist.data.index import Index
    from letit_dist.data.simulation import Layout, simulate

    numbers = (args.samples, args.bytes, args.shards)
    if (args.shards_of is None) == (None in numbers) or (args.shards_of and any(numbers)):
        raise UserError("give --shards-of, or all of --samples, --bytes and --shards")
    layout = Layout.of(Index.read(args.shards_of)) if args.shards_of else Layout.like(*numbers)
    rows = []
    for ranks in args.ranks:
        found = simulate(layout, args.batch, ranks)
        rows.append(
            {
                "ranks": ranks,
                "images a step": found.images,
                "twice": found.twice,
                "never": found.never,
                "GB a rank and epoch": "{:.3g} to {:.3g}".format(*(size / 1e9 for size in found.bytes)),
                "shards a rank reads": "{} to {}".format(*found.shards),
                "busiest / mean": f"{found.straggler:.2f}",
                "seconds to place": f"{found.place:.3f}",
            }
        )
    return rows


def step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each level and number of ranks that the level's batch divides over."""
    from letit_dist.autoencoders.base import build_autoencoder
    from letit_dist.config import by_level, load_config
    from letit_dist.recipes.base import Recipe
    from letit_dist.registry import RECIPES
    from letit_dist.schemas import PretrainConfig
    from letit_dist.training.scaling import Cluster, efficiency, step_costs

    config = load_config(PretrainConfig, args.config, args.overrides)
    training, levels = config.training, config.recipe.levels(config.autoencoder)

    recipe_class: Callable[..., Recipe] = RECIPES.get(config.recipe.kind)

    def build() -> Recipe:
        model = build_autoencoder(config.autoencoder)
        return recipe_class(config.recipe, model, seed=training.seed, precision=training.precision)

    cluster = Cluster(args.operations, args.inside, args.between, args.machine, args.latency)
    batches = by_level(training.batch, len(levels), "training.batch")
    rows = []
    for level, costs, batch in zip(levels, step_costs(build, config, levels), batches, strict=True):
        for ranks in args.ranks:
            row = {
                "pixels": level.resolution or config.autoencoder.resolution,
                "batch": batch,
                "GFLOP an image": f"{sum(cost.operations for cost in costs) / 1e9:.4g}",
                "MB exchanged": f"{sum(cost.gradients + cost.sums for cost in costs) / 1e6:.4g}",
                "collectives": f"{sum(cost.collectives for cost in costs):g}",
                "ranks": ranks,
            }
            if batch % ranks:
                rows.append({**row, "compute ms": "the batch does not divide"})
                continue
            found = efficiency(costs, batch, ranks, cluster)
            times = {"compute ms": f"{found.compute * 1e3:.3g}", "exchange ms": f"{found.exchange * 1e3:.3g}"}
            rows.append({**row, **times, "efficiency": f"{found.worst:.0%} to {found.best:.0%}"})
    return rows


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    counts = {"--ranks": min(args.ranks)}
    counts |= {f"--{name}": getattr(args, name) for name in ("batch", "machine") if name in args}
    if wrong := [f"{name} must be at least 1" for name, value in counts.items() if value < 1]:
        raise UserError("\n".join(wrong))
    if wrong := [n for n in ("operations", "inside", "between") if getattr(args, n, 1) <= 0]:
        raise UserError(f"--{wrong[0]} must be above 0")
    from letit_dist.evaluation.tables import markdown

    print(markdown(data(args) if args.command == "data" else step(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
