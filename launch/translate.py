#!/usr/bin/env python3
"""Translate images from one domain to the other: encode, walk down the energy, decode.

    python launch/translate.py photos/ --energy runs/fruit/apple2orange --out translated --sheet
    python launch/translate.py apple.png --energy runs/fruit/apple2orange --out one --path --strength 0.7

The input is an image, a folder of images, or a shard folder. Images are cropped to their centred square and
resized to the autoencoder's resolution. One file comes out for each image, under its own name. With the
energies of both directions, --to names the domain to go to:

    python launch/translate.py x.png --energy runs/apple2orange runs/orange2apple --to apple --out y

So does an energy between many domains; one of pairs of domains needs --from as well.

The first line says what memory the work will take. No more images go through at once than fit into --memory; how
many changes a picture by no more than rounding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from letit_dist.errors import UserError, reports_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="an image, a folder of images, or a shard folder")
    parser.add_argument("--energy", required=True, nargs="+", help="run folders of train_energy.py, or their exports")
    parser.add_argument("--autoencoder", help="its folder or run (default: the one that the energy's run names)")
    parser.add_argument("--to", metavar="DOMAIN", help="where to go, with several energies or one between many domains")
    parser.add_argument("--from", dest="source", metavar="DOMAIN", help="where from, if several go to that domain")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--steps", type=int, help="Langevin steps (default: as trained)")
    parser.add_argument("--step-size", type=float, help="eta of eq. (6) (default: as trained)")
    parser.add_argument(
        "--strength",
        type=_strength,
        default=1.0,
        help="fraction of the chain to walk, 0 to 1; auto = each until a classifier of latents takes it for the target",
    )
    parser.add_argument(
        "--latents",
        nargs=2,
        metavar=("SOURCE", "TARGET"),
        help="what that classifier learns from (default: the latents that the energy's run names)",
    )
    parser.add_argument("--path", action="store_true", help="also write each trajectory as a strip and a GIF")
    parser.add_argument("--sheet", action="store_true", help="also write sheets: source, reconstruction, latent energy")
    parser.add_argument("--format", choices=("png", "jpg"), default="png")
    parser.add_argument("--batch", type=int, default=16, help="at most so many images at once (16)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="for the whole process (4; GPU: 80 %% of what is free)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the networks (fp32)")
    parser.add_argument("--limit", type=int, help="translate only the first so many images")
    parser.add_argument("--seed", type=int, default=0, help="of the noise of chain and decoder, where they have any")
    parser.add_argument("--max-bad-fraction", type=float, default=0.05, help="stop past this unreadable share (0.05)")
    return parser.parse_args(argv)


def _strength(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a fraction from 0 to 1, or auto") from None


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.batch < 1 or (args.limit is not None and args.limit < 1):
        raise UserError("--batch and --limit must be at least 1")
    if args.latents and args.strength != "auto":
        raise UserError("--latents has no effect without --strength auto: leave it out")
    given, out = args.input.resolve(), args.out.resolve()
    if out == (given.parent if given.is_file() else given):
        raise UserError(f"--out {args.out} is where the input lies: name another folder, or it would be overwritten")
    if given in out.parents:
        raise UserError(f"--out {args.out} lies inside {args.input}: the next call would translate the results too")
    import torch

    from letit_dist.data.inputs import open_images
    from letit_dist.energy.translate import choose_translator
    from letit_dist.evaluation.energy_run import EnergyRun
    from letit_dist.evaluation.translating import TranslateOptions, translate_all
    from letit_dist.memory import budget_bytes, slow_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    translator = choose_translator(args.energy, args.autoencoder, args.to, args.source).to(device)
    translator.precision = args.precision
    budget = budget_bytes(args.memory, device)
    images = open_images(args.input, translator.autoencoder.config.resolution, args.limit, args.max_bad_fraction)
    classifier = None
    if args.strength == "auto":
        assert translator.origin is not None
        classifier = EnergyRun(translator.origin, translator).fit_classifier(args.latents)
        print(f"a classifier of latents tells the domains apart with accuracy {classifier.accuracy:.3f}")
    options = TranslateOptions(
        steps=args.steps,
        step_size=args.step_size,
        strength=1.0 if classifier else args.strength,
        path=args.path,
        sheet=args.sheet,
        format=args.format,
        batch=args.batch,
        seed=args.seed,
        classifier=classifier,
    )
    if notice := slow_precision(args.precision, device):
        print(notice, file=sys.stderr)
    try:
        for line in translate_all(translator, images, args.out, options, budget):
            print(line, flush=True)
    except KeyboardInterrupt:
        print(f"interrupted: what is finished is in {args.out}", file=sys.stderr)
        return 130
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror or error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
