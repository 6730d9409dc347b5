"""The options of a dry run, which both training programs have; nothing here imports torch."""

from __future__ import annotations

import argparse
from pathlib import Path

_LATER = ("ranks", "deepspeed", "gpu_memory", "without_data")


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """--check, and what belongs to it."""
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--check",
        action="store_true",
        help="refuse what cannot work, show configuration, batches, memory and disk, and exit; writes nothing",
    )
    group.add_argument("--ranks", type=int, help="as if launched with so many ranks")
    group.add_argument("--deepspeed", type=Path, metavar="JSON", help="as if under launch/deepspeed/*.json")
    group.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="refuse what a GPU with so much memory is too small for"
    )
    group.add_argument(
        "--without-data", action="store_true", help="data and start_from are on another machine: do not look for them"
    )


def require_check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a line where options do not go together."""
    if not args.check and args.run is None:
        parser.error("--run is required (or --check)")
    given = [f"--{name.replace('_', '-')}" for name in _LATER if getattr(args, name) not in (None, False)]
    if given and not args.check:
        parser.error(f"{', '.join(given)}: only with --check; without it the launch file says so")
    if args.ranks is not None and args.ranks < 1:
        parser.error("--ranks must be at least 1")
    if args.gpu_memory is not None and not args.gpu_memory > 0:
        parser.error("--gpu-memory must be above 0")
