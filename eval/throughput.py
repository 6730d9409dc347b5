#!/usr/bin/env python3
"""How fast, and in how much memory: the naive formulation of a piece of work against ours.

    python eval/throughput.py alae --threads 1 --out docs/benchmarks
    python eval/throughput.py data --out docs/benchmarks

Both sides run in this process, in turns, after their results were found to agree. The table gives the median seconds
of each, the ratio naive / ours of each pair (median and quartiles; above 1, ours is faster), and the peak memory of
each. On a GPU the clock is the GPU's own.

  alae    a training iteration (three phases with their optimiser steps, the average of the weights): the published
          formulation, eval/naive_alae.py, against the trainer
  data    reading images for training, on one core: ImageFolder, Pillow, Resize and ToTensor over JPEG files against
          the reader over shards of the same; then how long an index takes to load, and memory over many samples
  ranks   the same pretraining by one process and by several, each with one thread: images a second
  save    what a checkpoint and a resume take of training
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from letit_dist.errors import UserError, reports_errors

# Of a network for 256 pixels: channels there, at most, of the latent, and mapping layers. "full" is as published.
WIDTHS = {"tiny": (2, 8, 8, 2), "small": (8, 64, 64, 8), "medium": (16, 128, 128, 8), "full": (64, 512, 512, 8)}


def alae_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--resolution", type=int, nargs="+", default=[64, 128, 256], metavar="PIXELS", help="default: 64 128 256")
    add("--width", choices=WIDTHS, default="small", help="of the networks (default: small)")
    add("--full", dest="width", action="store_const", const="full", help="the published widths: --width full")
    add("--batch", type=int, default=4, metavar="N", help="images an iteration (default: 4, as published for a GPU)")


def alae(args: argparse.Namespace) -> Iterator:
    """A training iteration at each resolution; a smaller one has the layers that the network for 256 has there."""
    from alae_sides import AlaeSides, Tolerance

    from letit_dist.autoencoders.alae import ALAEConfig
    from letit_dist.config import parse_config
    from letit_dist.evaluation.benchmark import Match

    at_least_one(args, "batch")
    start, most, latent, layers = WIDTHS[args.width]
    sizes = {"max_channels": most, "latent_dim": latent, "mapping_layers": layers}
    configs = [
        parse_config(ALAEConfig, {"resolution": side, "start_channels": max(1, start * 256 // side), **sizes})
        for side in args.resolution
    ]
    for config in configs:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            # Where LeakyReLU's kink lies within rounding of an activation, gradients jump, and with them R1: only
            # float64 can tell a wrong formula. With an eps of nothing, its place in Adam makes no difference.
            exact = AlaeSides(config, batch=min(args.batch, 2), run=run, precision="fp64", eps=1e-30)
            exact = exact.compare(Tolerance()).found
            gc.collect()
            sides = AlaeSides(
                config, batch=args.batch, run=run, precision="bf16" if args.bf16 else "fp32", compiler=args.compile
            )

            def agree(sides=sides, exact=exact) -> str:
                loose = Tolerance(loss=1e-3, gradient=float("inf"), weight=float("inf"), average=float("inf"))
                found = sides.compare(loose).found
                return (
                    f"float64: losses {exact['loss']:.0e}, gradients {exact['gradient']:.0e}, "
                    f"weights {exact['weight']:.0e}; float32: losses {found['loss']:.0e}"
                )

            yield Match(f"{config.resolution} pixels", sides.naive_side, sides.our_side, agree)


def data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=int, default=32, metavar="N", help="JPEG files that a timed run reads once (default: 32)")
    add("--batch", type=int, default=16, metavar="N", help="images a batch (default: 16)")
    add("--side", type=int, default=1024, metavar="PIXELS", help="of the files; the small ones have a quarter (1024)")
    add("--entries", type=int, default=70_000, metavar="N", help="of the index that is loaded (default: 70000)")
    add("--samples", type=int, default=100_000, metavar="N", help="read for the line on memory (default: 100000)")


def data(args: argparse.Namespace) -> Iterator:
    """Reading at both sizes, then two facts."""
    at_least_one(args, "images", "batch", "entries", "samples")
    without_effect(args, "bf16", "compile")
    if args.device == "cuda":
        raise UserError("--device cuda has no effect on data, which is read by CPUs: leave it out")
    if args.images % args.batch:
        raise UserError(f"--images {args.images}: must be a multiple of --batch {args.batch}")
    if args.side < 64 or args.side & (args.side - 1):
        raise UserError(f"--side {args.side}: must be a power of two from 64 on")
    import statistics
    import warnings

    import torch
    from data_sides import DataSides, large_index, resident_over

    from letit_dist.data.index import Index
    from letit_dist.evaluation.benchmark import Fact, Match, clock, core_seconds, resident_peak

    torch.set_num_threads(args.threads or 1)
    warnings.filterwarnings("ignore", message="[\\s\\S]*decod", category=UserWarning, module="torchvision")
    with tempfile.TemporaryDirectory() as folder:
        sides = DataSides(Path(folder) / "data", args.images, args.batch, args.side)
        large, small = sides.side, sides.small
        usual = {side: sides.usual(side) for side in (small, large)}

        def row(name, side, ours, agree, target=None):
            counted = {"images": args.images, "memory": resident_peak, "seconds": core_seconds}
            return Match(name, usual[side], ours, agree, target=target, **counted)

        both, only = f"{small} beside {large}", f"{small} from {large}"
        yield row(both, small, sides.ours("both", small), sides.close("both", small, 35), 20)
        yield row(f"{only}, exact", small, sides.ours("only", small), sides.equal("only", small))
        scaled = {"scaled_decode": True}
        agree = sides.close("only", small, 45, **scaled)
        yield row(f"{only}, scaled_decode", small, sides.ours("only", small, **scaled), agree, 3)
        yield row(f"{large}", large, sides.ours("only", large), sides.equal("only", large), 2.5)
        floats = sides.ours("only", large, floats=True)
        yield row(f"{large}, floats on the CPU too", large, floats, sides.equal("only", large))
        yield Fact("a file", f"{sides.bytes / args.images / 1000:.0f} kB, JPEG q95 4:4:4 of {large} pixels")
        path = large_index(Path(folder) / "index", args.entries)
        took = statistics.median(clock("cpu")(lambda: Index.read(path)) for _ in range(5))
        yield Fact(f"index of {args.entries} samples of five files", f"loaded in {took:.2f} s (target: below 1)")
        points = resident_over(Path(folder) / "tiny", args.samples)
        shown = ", ".join(f"{size / 2**20:.1f} after {read}" for read, size in points)
        yield Fact("resident memory, MiB, samples of 16 pixels", shown)


def ranks_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--launch", type=Path, default=Path("launch/accelerate/cpu2.yaml"), metavar="FILE", help="of accelerate (cpu2)")
    add("--config", type=Path, default=Path("configs/debug/vqvae2.yaml"), metavar="FILE", help="of pretrain.py")
    add("--images", type=int, default=512, metavar="N", help="of a timed interval; a run has four (512)")
    add("overrides", nargs="*", metavar="key=value", help="of the configuration")


def ranks(args: argparse.Namespace) -> Iterator:
    """One process and several, in turns."""
    at_least_one(args, "images")
    without_effect(args, "bf16", "compile", "threads")
    import statistics

    from rank_speed import RankSpeed

    from letit_dist.evaluation.benchmark import Fact

    with tempfile.TemporaryDirectory() as folder:
        speed = RankSpeed(Path(folder), args.config, args.launch, images=args.images, overrides=args.overrides)
        pairs = [(speed.rate(several=False), speed.rate(several=True)) for _ in range(args.repeats)]
    shares = sorted(several / (speed.ranks * one) for one, several in pairs)
    yield Fact("images a second, one rank", ", ".join(f"{one:.1f}" for one, _ in pairs))
    yield Fact(f"images a second, {speed.ranks} ranks", ", ".join(f"{several:.1f}" for _, several in pairs))
    share = f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})"
    yield Fact(f"of {speed.ranks} times one rank", f"{share} (target: at least 0.8, with a core for each rank)")


def save_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--configs", type=Path, nargs="+", metavar="FILE", help="of pretrain.py (VQ-VAE-2 at 256, ALAE at 1024)")
    add("--batch", type=int, default=1, metavar="N", help="images of the iterations that are timed (1)")


def save(args: argparse.Namespace) -> Iterator:
    """A checkpoint and a resume of each configuration."""
    at_least_one(args, "batch")
    without_effect(args, "bf16", "compile")
    from save_cost import save_cost

    from letit_dist.config import PretrainConfig, load_config
    from letit_dist.evaluation.benchmark import Fact

    shipped = [Path(f"configs/pretrain/{name}.yaml") for name in ("imagenet256_vqvae2", "ffhq1024_alae")]
    for path in args.configs or shipped:
        config = load_config(PretrainConfig, path)
        with tempfile.TemporaryDirectory() as folder:
            cost = save_cost(config, Path(folder), count=args.batch, repeats=args.repeats)
        interval = config.intervals.checkpoint
        yield Fact(
            path.stem,
            f"a checkpoint of {cost.bytes / 2**20:.0f} MiB every {interval} images: training stands still for "
            f"{cost.held:.2f} s of {interval * cost.image:.0f} s, {cost.share(interval):.4%} (target: below 1 %); "
            f"written behind it in {cost.behind:.1f} s; resumed in {cost.resumed:.1f} s (target: below 10 s)",
        )


# name -> (its options, a generator of its matches and facts)
BENCHMARKS = {
    "alae": (alae_options, alae),
    "data": (data_options, data),
    "ranks": (ranks_options, ranks),
    "save": (save_options, save),
}


def without_effect(args: argparse.Namespace, *names: str) -> None:
    """UserError for options that are given and mean nothing to this benchmark."""
    if given := [f"--{name}" for name in names if getattr(args, name)]:
        raise UserError(f"{' and '.join(given)} has no effect on {args.command}: leave it out")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """UserError where an option that counts something is below 1."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--repeats", type=int, default=5, metavar="N", help="timed pairs (default: 5)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    add("--threads", type=int, metavar="N", help="of torch on the CPU (default: its own choice)")
    add("--bf16", action="store_true", help="under bfloat16 autocast; agreement is found without")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="both sides by torch.compile (inductor)")
    add("--out", type=Path, metavar="DIR", help="also write DIR/DATE-NAME.md")
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for name, (options, _) in BENCHMARKS.items():
        options(commands.add_parser(name, parents=[common], formatter_class=argparse.RawDescriptionHelpFormatter))
    return parser.parse_args(argv)


def choose_device(asked: str) -> str:
    """The device, and everybody's: the trainer's accelerator takes the GPU unless it is told."""
    import torch

    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise UserError("--device cuda: torch sees no GPU here")
    if asked == "cpu" and found:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return "cuda" if found and asked != "cpu" else "cpu"


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    at_least_one(args, "repeats", "threads")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file, expected a folder")
    import torch

    from letit_dist.evaluation.benchmark import Fact, Report, machine, measure
    from letit_dist.training.run import environment

    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    results, facts = [], []
    for match in BENCHMARKS[args.command][1](args):
        if isinstance(match, Fact):
            facts.append(match)
            continue
        # A compiler sees several variants of an iteration (with and without style mixing) before it comes to rest.
        warmup = 5 if args.compile else 1
        # Buffers of compiled code on a CPU are not seen by anybody.
        with_memory = not (args.compile and device == "cpu")
        result = measure(match, device=device, repeats=args.repeats, warmup=warmup, with_memory=with_memory)
        results.append(result)
        print(f"{result.name}: naive / ours {result.quartiles[1]:.2f}", file=sys.stderr, flush=True)
    command = shlex.join(["python", "eval/throughput.py", *(sys.argv[1:] if argv is None else argv)])
    hidden = {"command", "out", "device", "threads"}
    report = Report(
        title=f"Throughput: {args.command}",
        command=command,
        commit=environment()["commit"],
        machine=machine(device),
        results=results,
        facts=facts,
        settings={name: value for name, value in vars(args).items() if name not in hidden},
    )
    if results:
        print(report.table())
    for fact in facts:
        print(fact)
    if args.out:
        print(f"report: {report.write(args.out, args.command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
