#!/usr/bin/env python3
"""The figures of the paper, one command each.

    python eval/paper.py pies --out runs/pies

pies    the proof of concept (section 4.2, figure 3): one disc of points moved onto another through the latents of a
        linear autoencoder. Writes pies.png and one line of numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from letit_dist.errors import UserError, reports_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    pies = figures.add_parser("pies", help="two discs of points (figure 3)")
    pies.add_argument("--out", type=Path, required=True, help="folder for the figure and its numbers")
    pies.add_argument("--points", type=int, default=10_000, help="of each disc (10000)")
    pies.add_argument("--epochs", type=int, default=50, help="of the energy (50)")
    pies.add_argument("--steps", type=int, default=10, help="Langevin steps (10; the published code takes 8)")
    pies.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def pies(args: argparse.Namespace) -> None:
    """Figure 3."""
    for name in ("points", "epochs", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    from letit_dist.evaluation.figures import pies_figure, save_figure
    from letit_dist.evaluation.pies import PiesConfig, run_pies

    begun = time.perf_counter()
    watch = tuple(epoch for epoch in (0, 5, 50) if epoch <= args.epochs)
    config = PiesConfig(points=args.points, epochs=args.epochs, steps=args.steps, watch=watch, seed=args.seed)
    result = run_pies(config)
    save_figure(pies_figure(result, config), args.out / "pies.png")
    record = {
        "inside": result.inside(args.epochs),
        "content_correlation": result.content_correlation(args.epochs),
        "still_dimensions": result.still_dimensions(args.epochs),
        "mean_shift": [round(value, 4) for value in result.shift[args.epochs].mean(0).tolist()],
        "seed": args.seed,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    (args.out / "pies.json").write_text(json.dumps(record) + "\n")
    print(json.dumps(record))
    print(f"figure: {args.out / 'pies.png'}")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file, expected a folder")
    {"pies": pies}[args.figure](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
