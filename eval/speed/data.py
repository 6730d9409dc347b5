"""reading images for training, on one core: the usual loader over JPEG files against ours over shards

Usual is ImageFolder, Pillow, Resize and ToTensor over the files of which the shards were made. Then how much of packing
is work on pixels, how long an index takes to load, and memory over many samples.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from letit_dist.errors import UserError
from speed.arguments import Rows, at_least_one, without_effect

LEGEND = """\
Images a second of one core are medians; the seconds are those in which it works for this process. naive / ours: median
of the ratios of each pair (quartiles); above 1, ours is faster. MiB: by how much a run makes its process grow.
Agreement: found before anything was timed.
"""


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=int, default=32, metavar="N", help="JPEG files that a timed run reads once (default: 32)")
    add("--batch", type=int, default=16, metavar="N", help="images a batch (default: 16)")
    add("--side", type=int, default=1024, metavar="PIXELS", help="of the files; the small ones have a quarter (1024)")
    add("--entries", type=int, default=70_000, metavar="N", help="of the index that is loaded (default: 70000)")
    add("--samples", type=int, default=100_000, metavar="N", help="read for the line on memory (default: 100000)")


def matches(args: argparse.Namespace) -> Rows:
    """Reading at both sizes, then facts."""
    at_least_one(args, "images", "batch", "entries", "samples")
    without_effect(args, "bf16", "compile", "plain", "flops")
    if args.device == "cuda":
        raise UserError("--device cuda has no effect on data, which is read by CPUs: leave it out")
    if args.images % args.batch:
        raise UserError(f"--images {args.images}: must be a multiple of --batch {args.batch}")
    if args.side < 64 or args.side & (args.side - 1):
        raise UserError(f"--side {args.side}: must be a power of two from 64 on")
    import statistics
    import warnings

    import torch

    from letit_dist.data.index import Index
    from letit_dist.evaluation.benchmark import (
        Fact,
        Match,
        Side,
        clock,
        core_seconds,
        interleave,
        quartiles,
        resident_peak,
    )
    from speed.data_sides import DataSides, PackingSides, large_index, resident_over

    torch.set_num_threads(args.threads or 1)
    warnings.filterwarnings("ignore", message="[\\s\\S]*decod", category=UserWarning, module="torchvision")
    with tempfile.TemporaryDirectory() as folder:
        sides = DataSides(Path(folder) / "data", args.images, args.batch, args.side)
        large, small = sides.side, sides.small
        usual = {side: sides.usual(side) for side in (small, large)}

        def row(name: str, side: int, ours: Side, agree: Callable[[], str], target: float | None = None) -> Match:
            return Match(name, usual[side], ours, agree, args.images, target, resident_peak, core_seconds)

        both, only = f"{small} beside {large}", f"{small} from {large}"
        yield row(both, small, sides.ours("both", small), sides.close("both", small, 35), 20)
        yield row(f"{only}, exact", small, sides.ours("only", small), sides.equal("only", small))
        scaled = {"scaled_decode": True}
        agree = sides.close("only", small, 45, **scaled)
        yield row(f"{only}, scaled_decode", small, sides.ours("only", small, **scaled), agree, 3)
        yield row(f"{large}", large, sides.ours("only", large), sides.equal("only", large), 2.5)
        floats = sides.ours("only", large, floats=True)
        yield row(f"{large}, floats on the CPU too", large, floats, sides.equal("only", large))
        packing = PackingSides(sides.folder / "files" / "all", Path(folder) / "packed", large, small)
        packing.require_equal()
        pairs = interleave(packing.pixels_alone, packing.whole, repeats=args.repeats, warmup=1, seconds=core_seconds)
        low, middle, high = quartiles([alone / whole for alone, whole in pairs])
        share = f"{middle:.0%} ({low:.0%} to {high:.0%}) of its time works on pixels"
        samples = packing.pixels_alone()
        writing = statistics.median(core_seconds(lambda: packing.written_alone(samples)) for _ in range(args.repeats))
        alone, whole = (statistics.median(side) for side in zip(*pairs, strict=True))
        cores = f"one process writes for {alone / writing:.0f} cores"
        yield Fact(f"packing {both}, {args.images / whole:.3g} images/s", f"{share}; {cores}")
        yield Fact("a file", f"{sides.bytes / args.images / 1000:.0f} kB, JPEG q95 4:4:4 of {large} pixels")
        path = large_index(Path(folder) / "index", args.entries)
        took = statistics.median(clock("cpu")(lambda: Index.read(path)) for _ in range(5))
        yield Fact(f"index of {args.entries} samples of five files", f"loaded in {took:.2f} s (target: below 1)")
        points = resident_over(Path(folder) / "tiny", args.samples)
        shown = ", ".join(f"{size / 2**20:.1f} after {read}" for read, size in points)
        yield Fact("resident memory, MiB, samples of 16 pixels", shown)
