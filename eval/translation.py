#!/usr/bin/env python3
"""Score the translations of a trained energy against what is known of the images.

    python eval/translation.py runs/fruit/apple2orange --train data/fruit/apple/train data/fruit/orange/train \\
        --test data/fruit/apple/test

A judge learns from the real training images of both domains to tell them apart and, where the shards carry
the true factors of each image (the built-in set does), to read them. It then looks at the test images as they
are, reconstructed, moved by simpler means (the mean shift; optimal transport between two Gaussians; the light
Schroedinger bridge, LightSB), and translated, all on the same latents:

  target_accuracy   share taken for the target domain (a translation wants 1, a reconstruction 0)
  content_error     mean absolute error of the factors that must not change, each scaled to [0, 1]
  content_correlation  mean over those factors of their correlation with the true ones
  pair_error        with --pairs: root mean square difference to the true counterpart of the same name
  latent_frechet, latent_kernel  distances of the moved latents to the target's training latents
  displacement      root mean square way of a latent number, these three in units of the latents' spread
  l2_to_source      mean Euclidean distance to the source image, in [0, 1]
  fit_seconds, seconds  what fitting a baseline took; what moving and decoding all images took

One JSON line a method goes to OUT/translation.jsonl, a sheet to OUT/translation.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from letit_dist.errors import UserError, reports_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("energy", help="run folder of launch/train_energy.py (or its export, with --autoencoder)")
    parser.add_argument("--autoencoder", help="its folder or run (default: the one that the energy's run names)")
    parser.add_argument("--to", metavar="DOMAIN", help="where to go, for an energy between several domains")
    parser.add_argument("--from", dest="source", metavar="DOMAIN", help="where from, for an energy of pairs of domains")
    parser.add_argument("--train", required=True, nargs=2, metavar=("SOURCE", "TARGET"), help="real training shards")
    parser.add_argument("--test", required=True, metavar="SOURCE", help="test shards of the source domain")
    parser.add_argument("--pairs", metavar="TARGET", help="test shards of the target in which equal keys are pairs")
    parser.add_argument("--out", type=Path, help="folder for the results (default: ENERGY/eval, and -FROM-TO)")
    parser.add_argument("--judge", type=Path, help="folder that keeps the judge (default: OUT/judge)")
    parser.add_argument("--judge-steps", type=int, default=300, help="training steps of the judge, 64 images each")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=("mean-shift", "gaussian", "lightsb"),
        default=["mean-shift", "gaussian", "lightsb"],
        help="simpler means (all)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    return parser.parse_args(argv)


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.batch < 1 or args.judge_steps < 1:
        raise UserError("--batch and --judge-steps must be at least 1")
    from letit_dist.data.reader import ShardDataset
    from letit_dist.energy.translate import open_translator
    from letit_dist.evaluation.attributes import load_or_train_judge, read_examples
    from letit_dist.evaluation.report import write_report
    from letit_dist.evaluation.rivals import NAMES
    from letit_dist.evaluation.scoring import check_sizes, score_translations

    out = args.out or Path(args.energy) / "-".join(["eval", *filter(None, (args.source, args.to))])
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    translator = open_translator(args.energy, args.autoencoder, to=args.to, source=args.source)
    side = translator.autoencoder.config.resolution
    source, target, test = (ShardDataset([path]).matching(side) for path in (*args.train, args.test))
    pairs = ShardDataset([args.pairs]).matching(side) if args.pairs else None
    check_sizes(translator, train=source, test=test, pairs=pairs)
    examples = read_examples(source, target)
    judge = load_or_train_judge(examples, args.judge or out / "judge", steps=args.judge_steps, seed=args.seed)
    names = dict(zip(("mean-shift", "gaussian", "lightsb"), NAMES, strict=True))
    options = {"batch": args.batch, "seed": args.seed, "baselines": [names[name] for name in args.baselines]}
    result = score_translations(translator, judge, examples, test, pairs, **options)
    write_report(result, out)
    print(result.table())
    print(f"sheet: {out / 'translation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
