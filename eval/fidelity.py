#!/usr/bin/env python3
"""FID, KID, precision and recall, the Inception score, FD-DINOv2 and CMMD of images A against real images B.

    python eval/fidelity.py translated/ data/apple2orange/orange/test --out results
    python eval/fidelity.py run:runs/apple2orange data/apple2orange/orange/test \\
        --source data/apple2orange/apple/test --out results
    python eval/fidelity.py run:runs/cat2dog data/afhq256/dog/test \\
        --source data/afhq256/cat/test --protocol cut --out results
    python eval/fidelity.py A B --extractor dinov2 --weights-sha256 DIGITS --out results
    accelerate launch --config_file launch/accelerate/gpu8.yaml eval/fidelity.py A B --out results
    sbatch launch/slurm/eval.sbatch eval/fidelity.py A B --out results

A and B are folders of images or shard folders. A may be run:RUN, an energy that translates --source on the fly; B may
be stored:DIR, what --reference DIR wrote. Any number of processes gives the same bits. One JSON line a metric goes to
OUT/fidelity.jsonl; after an interruption the same command continues. FID and KID are also given for equally many
images a side. The network's weights come from files: python eval/weights.py list.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from letit_dist.errors import UserError, reports_errors
from letit_dist.files import require_folder

if TYPE_CHECKING:
    import torch

    from letit_dist.evaluation.features import Features
    from letit_dist.evaluation.image_sets import ImageSet
    from letit_dist.evaluation.protocols import ProtocolConfig

PROTOCOLS = Path(__file__).resolve().parent.parent / "configs" / "eval"
# What a protocol decides, and its options.
DECIDED = {"extractor": "compat", "metrics": None, "outputs": 1, "resize": None}
DECIDED |= {"layer": "2048", "kid_subsets": 100, "kid_subset_size": 1000}
HOW = "numbers are valid: false until --weights-sha256 has the digits that their publisher shows"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("a", metavar="A", help="what is judged: a folder, shards, or run:RUN")
    add("b", metavar="B", help="real images: a folder, shards, or stored:DIR")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--protocol", metavar="NAME", help="a file of configs/eval: stargan2, cut, letit-kid, egsde, unsb, clean")
    metrics = ("fid", "kid", "prc", "isc", "fd_dinov2", "cmmd")
    add("--metrics", nargs="+", choices=metrics, help="(all that the extractor has)")
    kinds = ("compat", "clean", "pytorch-fid", "torchvision", "dinov2", "clip")
    add("--extractor", choices=kinds, help="network and resize (compat)")
    add("--layer", choices=("64", "192", "768", "2048"), help="whose features are compared (2048)")
    add("--resize", type=int, metavar="SIDE", help="bring all images to this side first (bilinear, antialiased)")
    add("--kid-subsets", type=int, metavar="N", help="(100)")
    add("--kid-subset-size", type=int, metavar="N", help="(1000)")
    add("--equal-n", type=int, metavar="N", help="images a side of the *_equal_n metrics (the smaller side's)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="S", help="of the draws of equal counts")
    add("--reference", type=Path, metavar="DIR", help="keep B's features here, and use them again if they match")
    add("--weights", metavar="DIR", help="weight files ($LETIT_WEIGHTS, or ~/.cache/letit_dist/weights)")
    add(
        "--weights-sha256", metavar="DIGITS", type=str.lower, help="of dinov2's or clip's file, as its publisher has it"
    )
    add("--random-weights", action="store_true", help="no weight files: numbers that mean nothing, to try it out")
    add("--source", type=Path, metavar="IMAGES", help="what run:RUN translates")
    add("--autoencoder", help="of run:RUN (default: the one that it names)")
    add("--to", metavar="DOMAIN", help="of run:RUN, for an energy between several domains")
    add("--from", dest="origin", metavar="DOMAIN", help="likewise")
    add("--outputs", type=int, metavar="K", help="translations of each source image, with other noise each (1)")
    add("--noise-seed", type=int, default=0, metavar="S", help="of the chain and the decoder (0)")
    add("--batch", type=int, default=16, help="images that are translated at once (16)")
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> ProtocolConfig | None:
    """Fill in what was not given: from the protocol, which then allows nothing else, or the defaults."""
    protocol = None
    chosen: dict[str, Any] = dict(DECIDED)
    if args.protocol:
        from letit_dist.evaluation.protocols import load_protocol

        protocol = load_protocol(args.protocol, PROTOCOLS)
        chosen |= {"extractor": protocol.extractor, "metrics": list(protocol.metrics), "outputs": protocol.outputs}
        chosen |= {"resize": protocol.resize, "kid_subsets": protocol.kid.subsets}
        chosen |= {"kid_subset_size": protocol.kid.subset_size}
    for name, value in chosen.items():
        given = getattr(args, name)
        if protocol and given not in (None, value):
            raise UserError(f"--{name.replace('_', '-')} {given}: protocol {args.protocol} has {value}; leave one out")
        setattr(args, name, value if given is None else given)
    return protocol


def open_sides(
    args: argparse.Namespace, protocol: ProtocolConfig | None, device: torch.device
) -> tuple[ImageSet, ImageSet | Features]:
    """(A, B or its stored features)."""
    faithful = protocol is not None and protocol.faithfulness
    from letit_dist.evaluation.features import read_stored
    from letit_dist.evaluation.image_distances import faithfulness
    from letit_dist.evaluation.image_sets import TranslatedImages, open_image_set

    b: ImageSet | Features
    if args.b.startswith("stored:"):
        b = read_stored(Path(args.b.removeprefix("stored:")))
    else:
        b = open_image_set(args.b, args.resize)
    if not args.a.startswith("run:"):
        if protocol and protocol.outputs > 1:
            several = f"{protocol.outputs} translations of each source"
            raise UserError(f"protocol {args.protocol} takes {several}: A must be run:RUN")
        if args.source or args.outputs != 1 or args.to or args.origin or args.autoencoder:
            raise UserError("--source, --outputs, --to, --from and --autoencoder need A to be run:RUN")
        if faithful:
            raise UserError(f"protocol {args.protocol} compares with the source: A must be run:RUN")
        return open_image_set(args.a, args.resize), b
    if args.source is None:
        raise UserError(f"{args.a}: name the images that it translates with --source")
    from letit_dist.energy.translate import open_translator

    run = args.a.removeprefix("run:")
    translator = open_translator(run, args.autoencoder, to=args.to, source=args.origin).to(device)
    options = {"outputs": args.outputs, "seed": args.noise_seed, "batch": args.batch, "side": args.resize}
    beside = faithfulness if faithful else None
    return TranslatedImages(translator, open_image_set(args.source), **options, beside=beside), b


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    require_folder(args.out, "--out")
    protocol = settle(args)
    from letit_dist.evaluation import features as of
    from letit_dist.evaluation.extractors import UNVERIFIED, open_extractor
    from letit_dist.evaluation.fidelity import FidelityOptions, measure, metrics_for
    from letit_dist.evaluation.report import write_lines
    from letit_dist.evaluation.weights import weights_folder
    from letit_dist.training.setup import join_ranks

    args.metrics = metrics_for(args.extractor, args.metrics)
    rank, world, device, gather = join_ranks()
    a, b = open_sides(args, protocol, device)
    stored = b if isinstance(b, of.Features) else None
    if stored and args.reference:
        raise UserError("--reference has no effect with B stored: leave it out")
    counts = len(a), len(b)
    given = {name: getattr(args, name) for name in ("kid_subsets", "kid_subset_size", "equal_n")}
    options = FidelityOptions(metrics=args.metrics, seeds=tuple(args.seeds), **given)
    options.check(*counts)
    splits = a.split, b.stamp.get("split") if isinstance(b, of.Features) else b.split
    if protocol:
        protocol.check(sources=counts[0] // args.outputs, outputs=args.outputs, reference=counts[1], splits=splits)
    choice = {"layer": args.layer, "logits": "isc" in args.metrics, "random_weights": args.random_weights}
    choice["sha256"] = args.weights_sha256
    extractor = open_extractor(args.extractor, folder=weights_folder(args.weights), **choice).to(device)
    wanted = b.stamp if isinstance(b, of.Features) else of.stamp_of(b, extractor)
    of.check_alike(of.stamp_of(a, extractor), wanted)
    if args.reference:
        stored = of.reuse(args.reference, wanted)
    notices = [
        (a.stamp == (stored.stamp["data"] if stored else b.stamp), "both sides hold the same images"),
        (args.random_weights, "--random-weights: these numbers are valid for nothing"),
        (extractor.stamp["weights"].startswith(UNVERIFIED), f"{extractor.stamp['weights']} are the weights: {HOW}"),
        (stored and args.reference, f"the features of B are those of {args.reference}"),
    ]
    for true, notice in notices if rank == 0 else ():
        if true:
            print(f"notice: {notice}", file=sys.stderr)

    begun, kept = time.perf_counter(), []

    def features(images: ImageSet) -> of.Features:
        beside = getattr(images, "beside", None) is not None
        kept.append(of.working_folder(args.out, of.stamp_of(images, extractor), choice["logits"], beside))
        return of.gather_features(images, extractor, gather, rank=rank, world=world, keep=kept[-1])

    made = features(a)
    real = b if isinstance(b, of.Features) else stored or features(b)
    if rank > 0:
        return 0
    if args.reference and not stored:
        of.store(real, args.reference)
    extra = {"sides": [args.a, args.b], "splits": splits, "seconds_of_features": round(time.perf_counter() - begun, 1)}
    rows = []
    for row in measure(made, real, options, snapshot=a.snapshot, extra=extra):
        rows.append(protocol.annotate(row) if protocol else row)
        print(json.dumps(rows[-1]), flush=True)
    write_lines(rows, args.out / "fidelity.jsonl")
    of.forget(kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
