#!/usr/bin/env python3
"""Encode one domain once with a frozen autoencoder, so that stage 2 never touches an image again.

    python launch/encode_latents.py --autoencoder runs/fruit/pretrain \\
        --shards data/fruit/apple/train --out data/fruit-latents/apple --flip
    python launch/encode_latents.py --autoencoder runs/backbone --images photos/cats --out latents/cats
    accelerate launch --config_file launch/accelerate/gpu8.yaml launch/encode_latents.py --autoencoder ...

VQ-VAE-2 latents are stored as codes (exact, about 100 times smaller), others as float32 or float16. The
autoencoder's fingerprint is stored with them: an energy can never be trained on the latents of another one. A folder
of images gives the latents that its shards would give, packed at the autoencoder's resolution. Any number of
processes writes the same bytes. Interrupted? The same command continues. Finished? It says so. Before work begins one
line says what memory it will take. No more images go through at once than fit into --memory; how many changes a latent
by no more than rounding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from letit_dist.errors import reports_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", required=True, help="folder with config.json and model.safetensors, or a run")
    parser.add_argument(
        "--images", "--shards", required=True, nargs="+", help="image shard folders (index.json), or folders of images"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the latent shards")
    parser.add_argument("--domain", help="the domain's name (default: the one the image shards carry)")
    parser.add_argument("--flip", action="store_true", help="also encode every image mirrored")
    parser.add_argument("--crops", type=int, default=0, metavar="N", help="also encode N random crops an image")
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of stored latents")
    parser.add_argument("--batch", type=int, default=64, help="at most so many images at once (64)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="for the whole process (4; GPU: 80 %% of what is free)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder (fp32)")
    parser.add_argument("--workers", type=int, default=0, help="decoding processes")
    return parser.parse_args(argv)


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    from letit_dist.autoencoders.base import load_autoencoder
    from letit_dist.data.encoding import EncodeOptions, Ranks, encode_domain
    from letit_dist.data.folders import open_images_of
    from letit_dist.memory import budget_bytes, slow_precision
    from letit_dist.pretrained import find_folder
    from letit_dist.ranks import launched_ranks

    device, ranks = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Ranks()
    if launched_ranks() > 1:
        from letit_dist.training.setup import join_ranks

        rank, world, device, gather = join_ranks()
        ranks = Ranks(rank, world, gather)
    options = EncodeOptions(
        flip=args.flip,
        crops=args.crops,
        seed=args.seed,
        dtype=args.dtype,
        batch=args.batch,
        workers=args.workers,
        precision=args.precision,
    )
    autoencoder = load_autoencoder(find_folder(args.autoencoder)).to(device)
    budget = budget_bytes(args.memory, device)
    if (notice := slow_precision(args.precision, device)) and ranks.rank == 0:
        print(notice, file=sys.stderr)
    try:
        report = encode_domain(
            autoencoder,
            open_images_of(args.images),
            args.out,
            options,
            domain=args.domain,
            device=device,
            budget=budget,
            ranks=ranks,
            say=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    if ranks.rank == 0:
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
