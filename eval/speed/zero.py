"""DDP against DeepSpeed's stages on several ranks: images a second, memory, what a rank holds, the weights

Two ranks on a CPU, each on a core of its own; on GPUs one on each. Every configuration is started --repeats times, in
turns, through accelerate's launcher, and learns from the same random images; DDP comes first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from speed.arguments import Rows, at_least_one, without_effect

if TYPE_CHECKING:
    from speed.zero_speed import Taken

LEGEND = """\
Images a second of all ranks: median of the starts. Of DDP: median of the ratios to the start of DDP in the same turn
(lowest to highest). MiB are those of the rank that has most. Peak, the median of the starts: on a GPU the allocator's;
on a CPU weights, copies and average when all is built, and what the process grows by from there, after a pass that
loads its libraries. Weights: with buffers. Copies: of weights, which DeepSpeed's optimiser moves in their place.
Weights apart, the largest of the starts: after the timed steps, the norm of the difference to DDP's of the same turn,
in units of the norm of what DDP's have moved by.
"""


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--recipe", choices=("vqvae2", "beta_vae"), default="vqvae2", help="configs/debug/RECIPE.yaml (vqvae2)")
    add("--files", type=Path, nargs="+", metavar="FILE", help="DeepSpeed's (default: all of launch/deepspeed)")
    add("--steps", type=int, default=10, metavar="N", help="that are timed in each start (10)")
    add("overrides", nargs="*", default=[], metavar="key=value", help="of the configuration")


def matches(args: argparse.Namespace) -> Rows:
    """A row for DDP and for each file."""
    at_least_one(args, "steps")
    without_effect(args, "bf16", "compile", "plain", "flops", "threads")
    import torch

    from letit_dist.evaluation.benchmark import Fact, Row
    from speed.programs import ROOT
    from speed.zero_speed import DDP, ZeroSpeed

    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    files = args.files or sorted((ROOT / "launch/deepspeed").glob("*.json"))
    config = ROOT / f"configs/debug/{args.recipe}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        speed = ZeroSpeed(Path(folder), config, args.overrides, device=device, steps=args.steps)
        for file in files:
            speed.require_usable(file)
        turns = [[speed.start(file) for file in (None, *files)] for _ in range(args.repeats)]
    yield Fact("ranks", f"{speed.ranks}, {speed.batch} images a step of all together")
    for name, starts in zip((DDP, *(file.stem for file in files)), zip(*turns, strict=True), strict=True):
        ratios = sorted(one.rate / turn[0].rate for one, turn in zip(starts, turns, strict=True))
        yield Row(_columns(name, starts, ratios, device))


def _columns(name: str, starts: tuple[Taken, ...], ratios: list[float], device: str) -> dict[str, object]:
    first = starts[0]
    peaks = [one.peak for one in starts if one.peak is not None]
    held = {"weights": first.weights, "Adam's moments": first.moments, "copies": first.copies}
    return {
        "configuration": name,
        "images/s": f"{statistics.median(one.rate for one in starts):.3g}",
        "of DDP": f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        "peak, MiB": f"{statistics.median(peaks) / 2**20:.0f}" if peaks else None,
        **{f"{kind}, MiB": _places(sizes, device) for kind, sizes in held.items()},
        "weights apart": f"{max(one.apart for one in starts):.0e}",
    }


def _places(sizes: dict[str, int], device: str) -> str:
    """Bytes on the rank's own device, and, named, elsewhere."""
    own = sizes or {device: 0}
    return ", ".join(f"{size / 2**20:.2f}{'' if kind == device else f' ({kind})'}" for kind, size in own.items())
