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
  kept_accuracy     share of those factors seen on the side of the median where they were; with --keep, of the
                    attributes that a second judge, trained on them, sees as they were in the source
  pair_error        with --pairs: root mean square difference to the true counterpart of the same name
  latent_frechet, latent_kernel  distances of the moved latents to the target's training latents
  displacement      root mean square way of a latent number, these three in units of the latents' spread
  l2_to_source, lpips_*  mean Euclidean distance to the source image, in [0, 1]; LPIPS, if its weights are there
  fid_real, kid_real, fid_decoded, kid_decoded  with --extractor: to real images of the target (--real, or those of
                    --train), and to what the autoencoder makes of them, which leaves the error of transport alone
  fit_seconds, seconds, mib  what fitting a baseline took; what moving and decoding all images took; tensors that
                    live at the peak of a batch

One JSON line a method goes to OUT/translation.jsonl, the whole table to OUT/translation.md, a sheet to
OUT/translation.png; with --onto-card the method's own numbers onto the model card of the energy. What is printed are
the columns that tell most. The method itself is called `latent energy`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from letit_dist.errors import UserError, reports_errors
from letit_dist.files import require_folder

if TYPE_CHECKING:
    from torch import nn

    from letit_dist.data.reader import ShardDataset
    from letit_dist.evaluation.attributes import Examples
    from letit_dist.evaluation.extractors import Extractor
    from letit_dist.evaluation.kept import Keeper

BASELINES = ("mean-shift", "gaussian", "lightsb")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("energy", help="run folder of launch/train_energy.py (or its export, with --autoencoder)")
    add("--autoencoder", help="its folder or run (default: the one that the energy's run names)")
    add("--to", metavar="DOMAIN", help="where to go, for an energy between several domains")
    add("--from", dest="source", metavar="DOMAIN", help="where from, for an energy of pairs of domains")
    add("--train", required=True, nargs=2, metavar=("SOURCE", "TARGET"), help="real training shards")
    add("--test", required=True, metavar="SOURCE", help="test shards of the source domain")
    add("--pairs", metavar="TARGET", help="test shards of the target in which equal keys are pairs")
    add("--out", type=Path, help="folder for the results (default: ENERGY/eval, and -FROM-TO)")
    add("--judge", type=Path, help="folder that keeps the judge (default: OUT/judge)")
    add("--judge-steps", type=int, default=300, help="training steps of the judge, 64 images each")
    add("--baselines", nargs="*", choices=BASELINES, default=BASELINES, help="simpler means (all)")
    add("--keep", nargs="+", default=[], metavar="COLUMN", help="of the shards' metadata, such as Smiling")
    add("--table", type=Path, metavar="FILE", help="where --keep is found, e.g. list_attr_celeba.txt")
    add("--lpips", nargs="*", choices=("alex", "vgg", "squeeze"), default=["alex"], help="(alex; no name: none)")
    add("--extractor", choices=("compat", "clean", "pytorch-fid", "torchvision"), help="for FID and KID")
    add("--real", metavar="TARGET", help="shards of real target images for FID and KID")
    add("--weights", metavar="DIR", help="weight files ($LETIT_WEIGHTS, or ~/.cache/letit_dist/weights)")
    add("--random-weights", action="store_true", help="for --extractor: numbers that mean nothing")
    add("--onto-card", action="store_true", help="put the method's numbers onto the model card of ENERGY's folder")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=64)
    return parser.parse_args(argv)


class Instruments(TypedDict, total=False):
    """What measures beside the first judge, by the names that `score_translations` has for it."""

    extractor: Extractor
    perceptual: dict[str, nn.Module]
    keeper: Keeper


def instruments(
    args: argparse.Namespace, sides: list[ShardDataset], examples: Examples, folder: Path, device: str
) -> tuple[Instruments, list[str]]:
    """The instruments that were asked for, as far as their weights are there; and notices."""
    from letit_dist.evaluation.extractors import open_extractor
    from letit_dist.evaluation.kept import load_or_train_keeper
    from letit_dist.evaluation.reconstruction import find_backbones
    from letit_dist.evaluation.weights import weights_folder
    from letit_dist.losses.perceptual import PerceptualLoss

    found: Instruments = {}
    weights = weights_folder(args.weights)
    if args.extractor:
        choice = {"folder": weights, "random_weights": args.random_weights}
        found["extractor"] = open_extractor(args.extractor, **choice).to(device)
    paths, missing = find_backbones(weights, args.lpips)
    if args.random_weights:
        missing = [*missing, "--random-weights: FID and KID are valid for nothing"]
    found["perceptual"] = {net: PerceptualLoss(path, net).to(device).network for net, path in paths.items()}
    if args.keep:
        given = {"table": args.table, "steps": args.judge_steps, "seed": args.seed}
        found["keeper"] = load_or_train_keeper(args.keep, sides, examples, folder, **given).to(device)
    return found, missing


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.batch < 1 or args.judge_steps < 1:
        raise UserError("--batch and --judge-steps must be at least 1")
    needs = (("table", "keep"), ("real", "extractor"), ("random_weights", "extractor"))
    if idle := [f"--{a.replace('_', '-')} needs --{b}" for a, b in needs if getattr(args, a) and not getattr(args, b)]:
        raise UserError("\n".join(idle))
    if args.onto_card and args.random_weights:
        raise UserError("--onto-card: numbers of --random-weights mean nothing, and belong on no card")
    import torch

    from letit_dist import cards
    from letit_dist.data.reader import ShardDataset
    from letit_dist.energy.translate import open_translator
    from letit_dist.evaluation.attributes import load_or_train_judge, read_examples, read_pixels
    from letit_dist.evaluation.report import card_of, write_report
    from letit_dist.evaluation.rivals import NAMES
    from letit_dist.evaluation.scoring import check_sizes, match_pairs, score_translations

    out = args.out or Path(args.energy) / "-".join(["eval", *filter(None, (args.source, args.to))])
    require_folder(out, "--out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    translator = open_translator(args.energy, args.autoencoder, to=args.to, source=args.source).to(device)
    card = card_of(args.energy, "--onto-card") if args.onto_card else None
    side = translator.autoencoder.config.resolution
    source, target, test = (ShardDataset([path]).matching(side) for path in (*args.train, args.test))
    pairs, real = (ShardDataset([path]).matching(side) if path else None for path in (args.pairs, args.real))
    check_sizes(translator, train=source, test=test, pairs=pairs, real=real)
    if pairs:
        match_pairs(test, pairs)
    examples = read_examples(source, target)
    folder = args.judge or out / "judge"
    options, notices = instruments(args, [source, target], examples, folder.with_name(f"{folder.name}-kept"), device)
    judge = load_or_train_judge(examples, folder, steps=args.judge_steps, seed=args.seed).to(device)
    names = dict(zip(BASELINES, NAMES, strict=True))
    result = score_translations(
        translator,
        judge,
        examples,
        test,
        pairs,
        batch=args.batch,
        seed=args.seed,
        baselines=[names[name] for name in args.baselines],
        real=read_pixels(real) if real else None,
        **options,
    )
    write_report(result, out)
    print(result.table())
    if card:
        cards.add_metrics(card, result.card_metrics(args.test))
        print(f"card: {card}")
    for line in notices:
        print(f"notice: {line}", file=sys.stderr)
    print(f"all columns: {out / 'translation.md'}   sheet: {out / 'translation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
