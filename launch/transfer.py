#!/usr/bin/env python3
"""Two folders of pictures and somebody's frozen autoencoder in, a sheet of translations out: no pretraining.

    python launch/transfer.py photos/cats photos/dogs --autoencoder taef2/ --resolution 64 --out runs/cats2dogs
    python launch/transfer.py photos/cats photos/dogs --autoencoder runs/backbone --out runs/cats2dogs \\
        --test photos/new training.images=25_600

--autoencoder is a folder of ours (launch/export.py makes one), a run, an id on the Hub, or a folder as it was
published: the two files of taesd, taesdxl, taesd3, taef1 or taef2, or what diffusers saves, with --resolution.

It calls the programs of the other pages, one after the other, and prints each command before it runs: pack both
folders at the autoencoder's resolution (all but --holdout pictures of each), encode them once, learn the energy, and
translate pictures that no step has seen. OUT/translated/sheets is what to look at; OUT/translator is one folder with
everything in it, for Translator.from_pretrained, translate.py --energy, the demo and the Hub.

Interrupted? The same command continues where it stopped. Finished? It says so, and translates again. Swap the two
folders and name another OUT for the other direction. Any key of the configuration can be given as key=value.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from letit_dist import cards
from letit_dist.errors import UserError, reports_errors

ROOT = Path(__file__).resolve().parent.parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="A_DIR", help="folder of pictures to translate from")
    parser.add_argument("target", type=Path, metavar="B_DIR", help="folder of pictures to translate to")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of the configuration")
    parser.add_argument(
        "--autoencoder", required=True, help="its folder, a run, an id on the Hub (owner/name), or a published folder"
    )
    parser.add_argument("--resolution", type=int, help="side of the images that a published autoencoder shall take")
    parser.add_argument("--out", required=True, type=Path, help="folder for all that is made")
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs/energy/transfer.yaml", help="configs/energy/transfer.yaml"
    )
    parser.add_argument("--names", nargs=2, metavar=("A", "B"), help="of the domains (default: of the folders)")
    parser.add_argument("--test", type=Path, metavar="DIR", help="pictures to translate (default: those held out of A)")
    parser.add_argument("--holdout", type=int, default=16, metavar="N", help="pictures of each kept for that (16)")
    parser.add_argument("--flip", action="store_true", help="learn from mirrored pictures as well (encodes twice)")
    parser.add_argument("--enlarge", action="store_true", help="take pictures smaller than the autoencoder's images")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="translate at most so many (64)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="for each program (4; GPU: 80 %% of what is free)")
    cards.add_options(parser)
    return parser.parse_intermixed_args(argv)


def commands(
    args: argparse.Namespace, names: list[str], resolution: int, published: str | None
) -> list[tuple[str, list[str]]]:
    """(title, command) of each step, without the interpreter; `published` is the kind of the autoencoder's files."""
    out, memory = args.out, [] if args.memory is None else ["--memory", f"{args.memory:g}"]
    autoencoder = ["--autoencoder", out / "autoencoder" if published else args.autoencoder]
    steps: list[tuple[str, list[str]]] = []
    if published and not (out / "autoencoder").exists():
        options = ["--resolution", resolution, "--out", out / "autoencoder"]
        steps.append(("reading the autoencoder", ["launch/export.py", "--from", published, args.autoencoder, *options]))
    for name, folder in zip(names, (args.source, args.target), strict=True):
        pack = ["shards/pack.py", folder, "--out", out / "shards" / name, "--resolution", resolution, "--domain", name]
        pack += ["--layout", "folder", "--holdout", args.holdout, *(["--enlarge"] if args.enlarge else [])]
        steps.append((f"packing {name}", pack))
    for name in names:
        places = ["--shards", out / "shards" / name / "train", "--out", out / "latents" / name]
        flip = ["--flip"] if args.flip else []
        steps.append((f"encoding {name}", ["launch/encode_latents.py", *autoencoder, *places, *flip, *memory]))
    data = [f"data.{side}={out / 'latents' / name}" for side, name in zip(("source", "target"), names, strict=True)]
    learn = ["launch/train_energy.py", args.config, "--run", out / "energy", f"autoencoder={autoencoder[1]}", *data]
    learn += ["--data", args.data or f"{names[0]} and {names[1]}, two folders of pictures"]
    learn += [] if args.licence is None else ["--licence", args.licence]
    steps.append((f"learning the energy from {names[0]} to {names[1]}", [*learn, *args.overrides]))
    pictures = args.test or out / "shards" / names[0] / "test"
    translate = ["launch/translate.py", pictures, "--energy", out / "energy", "--out", out / "translated", "--sheet"]
    steps.append(("translating pictures that no step has seen", [*translate, "--limit", args.limit, *memory]))
    return [(title, [str(part) for part in command]) for title, command in steps]


def check(args: argparse.Namespace, names: list[str]) -> None:
    """Raise UserError, with a line for each, for what would fail only after other steps have run."""
    problems = [f"no such folder: {path}" for path in (args.source, args.target) if not path.is_dir()]
    if args.source.resolve() == args.target.resolve():
        problems.append(f"{args.source} is given twice: two folders are needed")
    elif names[0] == names[1]:
        problems.append(f"both folders are called {names[0]}: name the domains with --names A B")
    problems += [f"--names {name!r}: a name, not a path" for name in names if Path(name).name != name]
    problems += [] if args.test is None or args.test.exists() else [f"--test {args.test}: no such folder"]
    inside = [path for path in (args.source, args.target) if path.resolve() in args.out.resolve().parents]
    problems += [f"--out {args.out} lies inside {path}: its pictures would be packed next time" for path in inside]
    if args.limit < 1:
        problems.append("--limit must be at least 1")
    if problems:
        raise UserError("\n".join(problems))


def _processor_seconds() -> float:
    """Of all programs that have ended: what a step took, however busy the machine was."""
    return sum(os.times()[2:4])


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    names = args.names or [args.source.resolve().name, args.target.resolve().name]
    check(args, names)
    from letit_dist.config import load_config
    from letit_dist.schemas import TrainEnergyConfig

    places = [f"{key}=x" for key in ("autoencoder", "data.source", "data.target")]
    places[-1] += "y"  # the two must differ
    load_config(TrainEnergyConfig, args.config, [*places, *args.overrides])  # a misspelt key must not wait for step 5
    from letit_dist.autoencoders.base import load_autoencoder
    from letit_dist.interchange.kinds import import_autoencoder, recognise

    published = recognise(args.autoencoder)
    if published and args.resolution is None:
        raise UserError(
            f"--autoencoder {args.autoencoder}: published files do not tell the side of the images, give --resolution"
        )
    if published:
        model = import_autoencoder(published, args.autoencoder, resolution=args.resolution)
        kept = args.out / "autoencoder"
        if kept.exists() and load_autoencoder(kept).fingerprint() != model.fingerprint():
            raise UserError(f"{kept} was made of other files or for another --resolution: name another --out")
    else:
        model = load_autoencoder(args.autoencoder)
        if args.resolution is not None:
            raise UserError(
                f"--resolution has no effect with {args.autoencoder}, which is for images of "
                f"{model.config.resolution} pixels: leave it out"
            )
    from letit_dist.energy.translate import Translator

    begun, steps = time.monotonic(), commands(args, names, model.config.resolution, published)
    took: dict[str, tuple[float, float]] = {}  # seconds, and those of the processor
    for number, (title, command) in enumerate(steps, 1):
        print(f"\n== {number}/{len(steps)} {title} ({time.monotonic() - begun:.0f} s)", flush=True)
        print(f"$ python {shlex.join(command)}", flush=True)
        before, used = time.monotonic(), _processor_seconds()
        code = subprocess.call([sys.executable, str(ROOT / command[0]), *command[1:]])
        stage = title.split()[0]
        clock, processor = took.get(stage, (0.0, 0.0))
        took[stage] = clock + time.monotonic() - before, processor + _processor_seconds() - used
        if code:
            print(f"stopped in step {number}: the same command continues there", file=sys.stderr)
            return code
    translator = Translator.from_pretrained(args.out / "energy")
    assert translator.energy.card is not None
    card = replace(translator.energy.card, command=cards.command_line("launch/transfer.py", argv))
    translator.save_pretrained(args.out / "translator", card=card, with_autoencoder=True)
    shares = ", ".join(f"{stage} {clock:.0f} ({processor:.0f})" for stage, (clock, processor) in took.items())
    print(f"\ndone in {time.monotonic() - begun:.0f} s, by step (and of processor time): {shares}")
    print(f"look at:  {args.out / 'translated/sheets'}\nuse:      {args.out / 'translator'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
