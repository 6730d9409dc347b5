#!/usr/bin/env python3
"""How well an autoencoder gives images back: PSNR, SSIM, MSE, LPIPS, and how much of its codebooks it uses.

    python eval/reconstruction.py --autoencoder runs/backbone data/afhq256/cat/test data/afhq256/dog/test --out results
    python eval/reconstruction.py --sweep configs/eval/table8.yaml data/imagenet256/val --out runs/table8

One JSON line a shard folder goes to OUT/reconstruction.jsonl, and one sheet to OUT/sheets: its worst and its typical
images; with --onto-card the numbers onto the autoencoder's model card. LPIPS is given for the backbones whose weights
are there (python eval/weights.py list). A sweep prints the MSE by size and dimension of the codebook, and the command
of every run that is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from letit_dist.errors import UserError, reports_errors
from letit_dist.files import require_folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARDS", help="shard folders of images")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--autoencoder", help="its folder, or a run of launch/pretrain.py")
    which.add_argument("--sweep", type=Path, metavar="YAML", help="a grid of runs, such as configs/eval/table8.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--lpips", nargs="*", choices=("alex", "vgg", "squeeze"), help="(all; no name: none)")
    parser.add_argument(
        "--weights", metavar="DIR", help="weight files ($LETIT_WEIGHTS, or ~/.cache/letit_dist/weights)"
    )
    parser.add_argument("--onto-card", action="store_true", help="put them onto the autoencoder's model card too")
    parser.add_argument("--batch", type=int, default=16, help="images at once (16)")
    return parser.parse_args(argv)


def sweep(args: argparse.Namespace) -> None:
    from letit_dist.config import load_config
    from letit_dist.data.reader import ShardDataset
    from letit_dist.evaluation.report import write_lines
    from letit_dist.evaluation.sweep import SweepConfig, sweep_table

    if args.onto_card:
        raise UserError("--onto-card has no effect with --sweep, which scores several: leave it out")
    if args.lpips:
        raise UserError("--lpips has no effect with --sweep: leave it out")
    datasets = [ShardDataset([path]) for path in args.shards]
    table, cells, missing = sweep_table(load_config(SweepConfig, args.sweep), datasets, batch=args.batch)
    print(table)
    if missing:
        print("\n".join(["not trained yet:", *missing]))
    write_lines(cells, args.out / "sweep.jsonl")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.batch < 1:
        raise UserError("--batch must be at least 1")
    require_folder(args.out, "--out")
    if args.sweep:
        sweep(args)
        return 0
    import torch

    from letit_dist import cards
    from letit_dist.autoencoders.base import load_autoencoder
    from letit_dist.data.reader import ShardDataset
    from letit_dist.evaluation import reconstruction as of
    from letit_dist.evaluation.report import card_of, write_lines
    from letit_dist.evaluation.tables import markdown
    from letit_dist.evaluation.weights import weights_folder
    from letit_dist.losses.perceptual import PerceptualLoss
    from letit_dist.pretrained import find_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    datasets = [ShardDataset([path]) for path in args.shards]
    autoencoder = load_autoencoder(find_folder(args.autoencoder))
    card = card_of(args.autoencoder, "--onto-card") if args.onto_card else None
    extra = {"autoencoder": autoencoder.fingerprint()}
    paths, missing = of.find_backbones(weights_folder(args.weights), of.NETS if args.lpips is None else args.lpips)
    for line in missing:
        print(f"notice: {line}", file=sys.stderr)
    nets: dict[str, of.Distance] = {net: PerceptualLoss(path, net).to(device).network for net, path in paths.items()}
    autoencoder.to(device)
    parts = []
    for number, dataset in enumerate(datasets):
        parts.append(of.measure_reconstruction(autoencoder, dataset, nets, batch=args.batch))
        name = "-".join(filter(None, (f"{number}", *parts[-1].meta.values())))
        of.save_sheet(autoencoder, dataset, parts[-1], args.out / "sheets" / f"{name}.png")
    rows = [part.row(extra) for part in (*parts, *([of.together(parts)] if len(parts) > 1 else []))]
    write_lines(rows, args.out / "reconstruction.jsonl")
    columns = dict.fromkeys(column for row in rows for column in row)
    print(markdown(rows, [column for column in columns if column not in ("domain", "split", "autoencoder")]))
    if card:
        cards.add_metrics(card, {name: value for part in parts for name, value in part.card_metrics().items()})
        print(f"card: {card}")
    print(f"sheets: {args.out / 'sheets'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
