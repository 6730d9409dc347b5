#!/usr/bin/env python3
"""Turn published checkpoints into folders of config.json and model.safetensors, and such folders back.

    python launch/export.py --from alae ffhq/model_submitted.pth --out models/alae_ffhq
    python launch/export.py --from vqvae2 CHECKPOINT.pt --resolution 256 --out models/vqvae2
    python launch/export.py --from beta_vae last --out models/beta_vae
    python launch/export.py --from energy ebm.pth --out models/ebm \\
        --autoencoder models/alae_ffhq --steps 20 --step-size 2
    python launch/export.py --from identity --resolution 64 --out models/pixels
    python launch/export.py --from taesd taef2/ --resolution 256 --out models/taef2
    python launch/export.py --from diffusers sd-vae-ft-mse/ --resolution 1024 --out models/sd_vae
    python launch/export.py --from custom weights.pth --module mine.nets:Codec --resolution 256 --out models/mine
    python launch/export.py --to alae models/alae_ffhq --out alae.pth

A folder may be given to every --autoencoder and --energy option, and as autoencoder=FOLDER to train_energy.py. Nothing
is read from a published file but tensors. `identity` makes an autoencoder that does nothing: latents are pixels.

taesd: the two files of taesd, taesdxl, taesd3, taef1 or taef2 (--decoder for the second, or a folder of both).
diffusers: a folder of AutoencoderKL, -DC, -Tiny or VQModel as diffusers saves it, or of a pipeline with a vae in it.
custom: any torch module on the PYTHONPATH with encode and decode. These three take --scale and --shift (latents are
(the network's - shift) * scale; diffusers' are the model's own if not given) and --tile, the side of the overlapping
tiles that large images are taken in (512 from 1024 pixels on; 0 = whole).

energy: the published code's step size is half of ours (its 1.0 is --step-size 2), and its energies have the other sign,
which is turned here. Its checkpoints do not say which chain they were trained with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from letit_dist import cards
from letit_dist.errors import reports_errors
from letit_dist.interchange.exporting import BACK, OPTIONS, check, model_card, read, write


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="read", choices=list(OPTIONS), metavar="KIND", help=", ".join(OPTIONS))
    way.add_argument("--to", dest="write", choices=BACK, metavar="KIND", help="back to the published form")
    parser.add_argument("path", nargs="?", type=Path, help="published file or folder, or with --to a folder or run")
    parser.add_argument("--out", required=True, type=Path, help="new folder, or with --to a new file")
    parser.add_argument("--weights", choices=("average", "training"), help="alae: which of the two sets (average)")
    parser.add_argument("--resolution", type=int, help="side of the images, which no file tells (not for alae)")
    parser.add_argument(
        "--variant",
        help="whose training code wrote the file, which no weights tell. vqvae2: rosinality (default) or letit, whose "
        "residual skips go through a ReLU; beta_vae: 1konny (default; images in [0, 1]) or letit (in [-1, 1])",
    )
    parser.add_argument("--key", help="energy: which entry of a file that holds several")
    parser.add_argument(
        "--autoencoder",
        help="energy: the one on whose latents it was trained: a folder, a run, or an id on the Hub (owner/name)",
    )
    parser.add_argument("--steps", type=int, help="energy: Langevin steps it was trained with")
    parser.add_argument("--step-size", type=float, help="energy: eta of eq. (6), twice the published code's")
    parser.add_argument("--source", help="energy: name of the domain it starts from")
    parser.add_argument("--target", help="energy: name of the domain it leads to")
    parser.add_argument("--decoder", type=Path, help="taesd: the decoder's file, where PATH is the encoder's")
    parser.add_argument("--scale", type=float, nargs="+", help="of latents: one number, or one for each channel")
    parser.add_argument("--shift", type=float, nargs="+", help="likewise, taken off before they are scaled")
    parser.add_argument("--tile", type=int, help="side in pixels of the tiles that an image is taken in; 0 = whole")
    parser.add_argument("--module", metavar="PACKAGE.MODULE:CLASS", help="custom: what has encode and decode")
    parser.add_argument("--arguments", metavar="JSON", help="custom: what the class is called with ({})")
    parser.add_argument("--images", choices=("signed", "unit"), help="custom: images in [-1, 1] (signed) or [0, 1]")
    cards.add_options(parser)
    parser.add_argument(
        *("--metric",), action="append", metavar="NAME=VALUE", help="for the model card, of a published number; repeats"
    )
    return parser.parse_args(argv)


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    check(args)
    if args.write:
        print(write(args))
        return 0
    card = model_card(args, cards.command_line("launch/export.py", argv))
    if card.licence is None:
        print("licence: not stated (--licence), and none beside the file", file=sys.stderr)
    print(read(args, card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
