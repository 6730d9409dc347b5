#!/usr/bin/env python3
"""How fast, and in how much memory: the naive formulation of a piece of work against ours.

    python eval/throughput.py alae --threads 1 --out docs/benchmarks
    python eval/throughput.py data --out docs/benchmarks

Both sides run in this process, in turns, after their results were found to agree. The table gives the median seconds
of each, the ratio naive / ours of each pair (median and quartiles; above 1, ours is faster), and the peak memory of
each. On a GPU the clock is the GPU's own. Each benchmark has a module in eval/speed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from speed import (
    alae,
    beta_vae,
    data,
    decode,
    energy,
    langevin,
    ranks,
    recompute,
    save,
    startup,
    translate,
    vqvae2,
    zero,
)
from speed import all as whole
from speed.arguments import at_least_one

from letit_dist.errors import UserError, reports_errors
from letit_dist.files import require_folder

# name -> module with options(parser), and matches(args), a generator of its matches and facts
_MODULES = (
    alae,
    vqvae2,
    beta_vae,
    energy,
    langevin,
    decode,
    translate,
    data,
    ranks,
    recompute,
    save,
    zero,
    startup,
    whole,
)
BENCHMARKS = {module.__name__.removeprefix("speed."): module for module in _MODULES}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--repeats", type=int, default=5, metavar="N", help="timed pairs (default: 5)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    add("--threads", type=int, metavar="N", help="of torch on the CPU (default: its own choice)")
    add("--bf16", action="store_true", help="under bfloat16 autocast; agreement is found without")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="both sides by torch.compile (inductor)")
    add("--plain", action="store_true", help="the naive side in float32 without a compiler, whatever ours has")
    add("--flops", action="store_true", help="count operations too: GFLOP/s, and on known GPUs the share of the peak")
    add("--out", type=Path, metavar="DIR", help="also write DIR/DATE-NAME.md")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUB-COMMAND")
    for name, module in BENCHMARKS.items():
        about = module.__doc__ or ""
        shape = argparse.RawDescriptionHelpFormatter
        module.options(
            commands.add_parser(
                name, help=about.splitlines()[0], description=about, parents=[common], formatter_class=shape
            )
        )
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
    if args.out:
        require_folder(args.out, "--out")
    import torch

    from letit_dist.evaluation.benchmark import LEGEND, Fact, Report, Result, Row, machine, measure
    from letit_dist.training.run import environment

    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    results: list[Result | Row] = []
    facts = []
    for match in BENCHMARKS[args.command].matches(args):
        if isinstance(match, Fact):
            facts.append(match)
            continue
        if isinstance(match, Row):
            results.append(match)
            continue
        # A compiler sees several variants of an iteration (with and without style mixing) before it comes to rest.
        warmup = 5 if args.compile else 1
        # Buffers of compiled code on a CPU are not seen by anybody.
        with_memory = not (args.compile and device == "cpu")
        also = {"with_memory": with_memory, "with_operations": args.flops}
        result = measure(match, device=device, repeats=args.repeats, warmup=warmup, **also)
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
        legend=getattr(BENCHMARKS[args.command], "LEGEND", LEGEND),
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
