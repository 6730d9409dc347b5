#!/usr/bin/env python3
"""A run as one HTML page that opens anywhere, offline: configuration, curves, samples, figures, results, environment.

    python eval/report.py runs/backbone --out report.html
    python eval/report.py runs/cats2dogs --also figures results/cats2dogs --out report.html

RUN is a run folder of launch/pretrain.py or launch/train_energy.py. Shown are the JSON lines and figures of eval/ that
lie below it, and below the folders of --also; the last section lists what is not there, and which program makes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from letit_dist.errors import UserError, reports_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of either stage")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, such as report.html")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="FOLDER", help="more folders of results")
    return parser.parse_args(argv)


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder, expected the name of a file")
    from letit_dist.evaluation.run_folder import read_run
    from letit_dist.evaluation.run_page import run_page
    from letit_dist.files import write_atomically

    run = read_run(args.run, args.also)
    page = run_page(run).encode()
    try:
        write_atomically(args.out, page)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    for line in run.absent:
        print(f"not in it: {line}")
    print(f"report: {args.out} ({len(page) / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
