"""what programs take before they work: --help of each, and a debug run to its first step

In processes of their own, as a user starts them. The first step of a training is its first line of numbers; the others
are run to their end on a few pictures. Beside the seconds that pass stand those of processor time, which tell on a busy
machine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from speed.arguments import Rows, without_effect


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--help-only", action="store_true", help="without the debug runs")


def matches(args: argparse.Namespace) -> Rows:
    """Every program, then the debug runs."""
    without_effect(args, "bf16", "compile", "plain", "flops")
    from letit_dist.evaluation.benchmark import Fact
    from speed.programs import DebugRuns, programs, seconds_of

    for program in programs():
        took = seconds_of([program, "--help"], repeats=args.repeats)
        yield Fact(f"{program} --help", f"{took} (target: below 1.5 s)")
    if args.help_only:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, took in DebugRuns(Path(folder)).all(args.repeats):
            yield Fact(name, f"{took} (target: below 10 s)")
