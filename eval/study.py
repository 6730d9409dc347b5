#!/usr/bin/env python3
"""A human study (table 4 of the paper): a page that asks which method's picture is best, and what its votes say.

    python eval/study.py make --source photos/apples --method "latent energy=translated" --method CUT=results/cut \\
        --target "an orange" --out study.html
    python eval/study.py analyse votes-*.csv --key study.key.json

make      writes one page that opens offline, for a browser: for every image, first which result looks most real, then
          which keeps most of the source. Methods stand side by side, unnamed, in an order drawn from --seed; which was
          which stands in the key beside it, study.key.json: keep that to yourself. Votes stay in the rater's browser
          until they are saved as a CSV file.
analyse   prints the share of each method with 95 % intervals (bootstrap over images, and Wilson's over votes), and how
          far raters agree (Krippendorff's alpha: 1 fully, 0 as by chance).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from letit_dist.errors import UserError, reports_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser("make", help="write the page and its key")
    make.add_argument("--source", type=Path, required=True, metavar="FOLDER", help="images before the translation")
    make.add_argument("--method", action="append", required=True, metavar="NAME=FOLDER", help="results, same names")
    make.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page; its key lies beside it")
    make.add_argument("--count", type=int, metavar="N", help="the first so many images (all)")
    make.add_argument("--side", type=int, default=256, metavar="PIXELS", help="of every picture (256)")
    make.add_argument("--target", default="the other domain", metavar="WORDS", help='what is wanted: "an orange"')
    make.add_argument("--title", default="Which picture?", help="of the page: no hint at a method")
    make.add_argument("--seed", type=int, default=0, help="of all orders (0)")
    analyse = commands.add_parser("analyse", help="shares, intervals, agreement")
    analyse.add_argument("votes", nargs="+", type=Path, metavar="CSV", help="what raters saved")
    analyse.add_argument("--key", type=Path, required=True, metavar="FILE", help="what make wrote beside the page")
    analyse.add_argument("--out", type=Path, metavar="FILE", help="one JSON line a method and question")
    return parser.parse_args(argv)


def make(args: argparse.Namespace) -> None:
    from letit_dist.evaluation.comparison import parse_others
    from letit_dist.evaluation.study import make_study
    from letit_dist.files import write_atomically

    if args.side < 1 or (args.count is not None and args.count < 1):
        raise UserError("--side and --count must be at least 1")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder, expected the name of a file")
    key_path = args.out.with_suffix(".key.json")
    if key_path.exists():
        raise UserError(f"{key_path} is there: without it the votes of its page would say nothing; name another --out")
    methods = parse_others(args.method, option="--method", taken=())
    given = {"seed": args.seed, "count": args.count, "side": args.side, "target": args.target, "title": args.title}
    page, key = make_study(methods, args.source, **given)
    try:
        write_atomically(key_path, (json.dumps(key, indent=1) + "\n").encode())
        write_atomically(args.out, page.encode())
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"{len(key['trials'])} images x {len(methods)} methods x {len(key['questions'])} questions")
    print(f"page: {args.out} ({len(page) / 2**20:.1f} MiB)\nkey, not for raters: {key_path}")


def analyse(args: argparse.Namespace) -> None:
    from letit_dist.evaluation import study
    from letit_dist.evaluation.report import write_lines
    from letit_dist.evaluation.tables import markdown

    key = study.read_key(args.key)
    rows = study.analyse(study.read_votes(args.votes, key), key)
    if args.out:
        write_lines(rows, args.out)
    print(markdown(rows))


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    {"make": make, "analyse": analyse}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
