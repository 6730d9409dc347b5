#!/usr/bin/env python3
"""The figures and tables of the paper, one command each.

    python eval/paper.py pies --out runs/pies
    python eval/paper.py shift --energy runs/fruit/apple2orange --back runs/fruit/orange2apple --out runs/shift
    python eval/paper.py trajectories photos/ --energy runs/fruit/apple2orange --out runs/paths
    python eval/paper.py strength photos/ --energy runs/fruit/apple2orange --back runs/fruit/orange2apple --out d
    python eval/paper.py compare photos/ --energy runs/fruit/apple2orange --also CUT=results/cut --out runs/compare
    python eval/paper.py table3 --data data --run runs/cat2dog runs/dog2cat --out results/table3

pies           the proof of concept (section 4.2, figure 3): one disc of points moved onto another through the latents
               of a linear autoencoder. Writes pies.png and one line of numbers.
shift          the latent shift (section 4.2, figure 5): how far a translation moves each latent dimension, averaged
               over the source's latents; with --back both directions and their correlation. Writes shift.png, .json.
trajectories   decoded steps of the chain and their energies (figure 8). Writes trajectories.png, .jsonl, and an
               animation an image.
strength       the translation as a dial: at several strengths, where a classifier of latents takes it for the target,
               and with --back there and back, with the cycle error. Writes strength.png, .json.
compare        source, reconstruction, mean shift, latent energy, and other people's results (figures 4, 6, 7, 9).
               Writes compare.png, and compare.html: one page that wipes between the source and each method.
table3, table5, table6   the paper's numbers, its baselines' and ours: measures what the runs given by --run can tell on
               the sets below --data (packed as in docs/data.md), and keeps it; other cells say not yet measured.
               Writes table*.jsonl, and measured.jsonl.
table8         MSE by size and dimension of the codebook, of the runs of --sweep. Writes table8.jsonl.

An INPUT is an image, a folder of images, or a shard folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from letit_dist.errors import UserError, reports_errors
from letit_dist.files import require_folder

if TYPE_CHECKING:
    from letit_dist.data.inputs import Images
    from letit_dist.evaluation.energy_run import EnergyRun
    from letit_dist.evaluation.translating import TranslateOptions

EVAL = Path(__file__).resolve().parent.parent / "configs" / "eval"
TABLES = {"table3": "FID", "table5": "KID, FID, days, memory", "table6": "parameters, days", "table8": "codebooks"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")

    pies = figures.add_parser("pies", help="two discs of points (figure 3)")
    pies.add_argument("--points", type=int, default=10_000, help="of each disc (10000)")
    pies.add_argument("--epochs", type=int, default=50, help="of the energy (50)")
    pies.add_argument("--steps", type=int, default=10, help="Langevin steps (10; the published code takes 8)")

    shift = figures.add_parser("shift", help="how far each latent dimension moves (figure 5)")
    shift.add_argument("--energy", required=True, metavar="RUN", help="run folder of train_energy.py, or its export")
    shift.add_argument("--back", metavar="RUN", help="the energy of the other direction")
    shift.add_argument("--latents", nargs="+", metavar="FOLDER", help="of the source (default: the run's data.source);"
                       " with --back a second one, of its source")  # fmt: skip
    shift.add_argument("--count", type=int, default=512, help="at most so many latents, spread evenly (512)")

    trajectories = figures.add_parser("trajectories", help="decoded steps and their energies (figure 8)")
    trajectories.add_argument("--columns", type=int, default=12, help="at most so many steps on the sheet (12)")
    trajectories.add_argument("--animation", choices=("gif", "webp"), default="gif", help="(gif)")

    strength = figures.add_parser("strength", help="the translation as a dial, and the way back")
    strength.add_argument("--back", metavar="RUN", help="the energy of the other direction")
    strength.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], metavar="FRACTION")
    strength.add_argument("--latents", nargs=2, metavar=("SOURCE", "TARGET"), help="for the classifier (default: the"
                          " run's data.source and data.target)")  # fmt: skip

    compare = figures.add_parser("compare", help="methods beside one another (figures 4, 6, 7, 9)")
    compare.add_argument(
        "--also", nargs="+", action="extend", default=[], metavar="NAME=FOLDER", help="results under the same names"
    )
    compare.add_argument("--latents", nargs=2, metavar=("SOURCE", "TARGET"), help="for the mean shift (default: the"
                         " run's data.source and data.target)")  # fmt: skip

    tables = [figures.add_parser(name, help=what) for name, what in TABLES.items()]
    for table in tables[:-1]:
        table.add_argument("--data", type=Path, metavar="DIR", help="folder of the packed sets")
        table.add_argument("--run", nargs="+", default=[], metavar="RUN", help="run folders of train_energy.py")
        table.add_argument(
            "--tables", type=Path, default=EVAL / "paper_tables.yaml", metavar="YAML", help="(the paper's)"
        )
        table.add_argument("--weights", metavar="DIR", help="weight files (see eval/weights.py)")
        table.add_argument("--random-weights", action="store_true", help="no weight files: numbers that mean nothing")
    tables[-1].add_argument("--data", type=Path, nargs="+", required=True, metavar="SHARDS", help="images")
    tables[-1].add_argument("--sweep", type=Path, default=EVAL / "table8.yaml", metavar="YAML", help="(the paper's)")
    for table in tables:
        table.add_argument("--batch", type=int, default=16, help="images at once (16)")

    for moving in (trajectories, strength, compare):
        moving.add_argument("input", type=Path, help="an image, a folder of images, or a shard folder")
        moving.add_argument("--energy", required=True, nargs="+", metavar="RUN", help="run folders of train_energy.py")
        if moving is not strength:
            moving.add_argument("--steps", type=int, help="Langevin steps (default: as trained)")
            moving.add_argument("--step-size", type=float, help="eta of eq. (6) (default: as trained)")
            moving.add_argument("--strength", type=float, default=1.0, help="fraction of the chain to walk, 0 to 1")
        moving.add_argument("--count", type=int, default=6, help="the first so many images (6)")
    for opening in (shift, trajectories, strength, compare):
        opening.add_argument("--to", metavar="DOMAIN", help="where to go, if energies go to several domains")
        opening.add_argument("--from", dest="source", metavar="DOMAIN", help="where from, if several go there")
        opening.add_argument("--autoencoder", help="its folder or run (default: the one that the energy's run names)")
    for figure in (pies, shift, trajectories, strength, compare, *tables):
        figure.add_argument("--out", type=Path, required=True, help="folder for the figure and its numbers")
        figure.add_argument("--seed", type=int, default=0, help="of all noise (0)")
    return parser.parse_args(argv)


def pies(args: argparse.Namespace) -> None:
    """Figure 3."""
    for name, least in (("points", 2), ("epochs", 1), ("steps", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}")
    from letit_dist.evaluation.figures import need_matplotlib, pies_figure, save_figure
    from letit_dist.evaluation.pies import PiesConfig, run_pies
    from letit_dist.evaluation.report import write_lines

    need_matplotlib()
    watch = tuple(epoch for epoch in (0, 5, 50) if epoch <= args.epochs)
    config = PiesConfig(points=args.points, epochs=args.epochs, steps=args.steps, watch=watch, seed=args.seed)

    def work() -> Iterator[str]:
        begun = time.perf_counter()
        result = run_pies(config)
        save_figure(pies_figure(result, config), args.out / "pies.png")
        record = {
            "inside": result.inside(args.epochs),
            "content_correlation": result.content_correlation(args.epochs),
            "style_correlation": result.style_correlation(args.epochs),
            "still_dimensions": result.still_dimensions(args.epochs),
            "mean_shift": [round(value, 4) for value in result.shift[args.epochs].mean(0).tolist()],
            "seed": args.seed,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        write_lines([record], args.out / "pies.json")
        yield json.dumps(record)
        yield f"figure: {args.out / 'pies.png'}"

    tell(work(), args.out)


def shift(args: argparse.Namespace) -> None:
    """Figure 5."""
    folders = args.latents or []
    if len(folders) > 1 + (args.back is not None):
        raise UserError(f"--latents: {len(folders)} folders: give one, or with --back two")
    from letit_dist.evaluation.energy_run import open_back, open_run
    from letit_dist.evaluation.shift_figure import write_shift

    runs = [open_run([args.energy], args.autoencoder, args.to, args.source)]
    if args.back is not None:
        runs.append(open_back(runs[0], args.back, args.autoencoder))
    folders += [run.latent_folder("source") for run in runs[len(folders) :]]
    sides = [run.open_latents(folder) for run, folder in zip(runs, folders, strict=True)]
    tell(write_shift(runs, sides, args.out, count=args.count, seed=args.seed), args.out)


def moved(args: argparse.Namespace) -> tuple[EnergyRun, Images, TranslateOptions]:
    """The run, the images and the options of the figures that translate images."""
    given, out = args.input.resolve(), args.out.resolve()
    if out == (given.parent if given.is_file() else given) or given in out.parents:
        raise UserError(f"--out {args.out} lies where the input does: the next call would take the figures for images")
    from letit_dist.data.inputs import open_images
    from letit_dist.evaluation.energy_run import open_run
    from letit_dist.evaluation.translating import TranslateOptions

    run = open_run(args.energy, args.autoencoder, args.to, args.source)
    given = {name: getattr(args, name) for name in ("steps", "step_size", "strength") if hasattr(args, name)}
    options = TranslateOptions(**given, seed=args.seed)
    return run, open_images(args.input, run.translator.autoencoder.config.resolution, args.count), options


def trajectories(args: argparse.Namespace) -> None:
    """Figure 8."""
    from letit_dist.evaluation.trajectories import write_trajectories

    run, images, options = moved(args)
    tell(write_trajectories(run, images, args.out, options, columns=args.columns, animation=args.animation), args.out)


def strength(args: argparse.Namespace) -> None:
    """The translation as a dial."""
    from letit_dist.evaluation.energy_run import open_back
    from letit_dist.evaluation.strength import write_strength

    run, images, _ = moved(args)
    back = open_back(run, args.back, args.autoencoder) if args.back else None
    classifier = run.fit_classifier(args.latents)
    tell(write_strength(run, images, args.out, args.strengths, classifier, back, seed=args.seed), args.out)


def compare(args: argparse.Namespace) -> None:
    """Figures 4, 6, 7 and 9."""
    from letit_dist.evaluation.comparison import parse_others, write_comparison

    others = parse_others(args.also)
    run, images, options = moved(args)
    tell(write_comparison(run, images, args.out, options, latents=args.latents, others=others), args.out)


def table(args: argparse.Namespace) -> None:
    """Tables 3, 5 and 6."""
    from letit_dist.evaluation.paper_tables import Job, write_table
    from letit_dist.evaluation.weights import weights_folder

    if args.figure == "table6" and (args.data or args.random_weights):
        print(
            "notice: --data and --random-weights have no effect on table6, which counts and reads logs", file=sys.stderr
        )
    where = {"data": args.data, "out": args.out, "protocols": args.tables.parent}
    how = {"random_weights": args.random_weights, "batch": args.batch, "seed": args.seed}
    job = Job(**where, weights=weights_folder(args.weights), **how)
    tell(write_table(args.figure, args.tables, args.run, job), args.out)


def table8(args: argparse.Namespace) -> None:
    """Table 8."""
    from letit_dist.config import load_config
    from letit_dist.data.reader import ShardDataset
    from letit_dist.evaluation.report import write_lines
    from letit_dist.evaluation.sweep import SweepConfig, sweep_table

    def work() -> Iterator[str]:
        datasets = [ShardDataset([path]) for path in args.data]
        shown, cells, missing = sweep_table(load_config(SweepConfig, args.sweep), datasets, batch=args.batch)
        write_lines(cells, args.out / "table8.jsonl")
        yield f"table8: MSE of images in [-1, 1]; the paper's own numbers are not known here\n{shown}"
        yield from ["not yet measured:", *missing] if missing else []

    tell(work(), args.out)


def tell(lines: Iterator[str], out: Path) -> None:
    """Print what a figure's maker says while it works; `out` is made before it begins."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    require_folder(args.out, "--out")
    if getattr(args, "count", 1) < 1:
        raise UserError("--count must be at least 1")
    if getattr(args, "batch", 1) < 1:
        raise UserError("--batch must be at least 1")
    makers = (pies, shift, trajectories, strength, compare, table8)
    {maker.__name__: maker for maker in makers}.get(args.figure, table)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
