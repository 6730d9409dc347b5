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
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from letit_dist import cards
from letit_dist.errors import UserError, reports_errors

# Options that only some kinds take, when they are read.
_FROZEN = ("scale", "shift", "tile")
_OPTIONS = {
    "alae": {"weights"},
    "vqvae2": {"resolution", "variant"},
    "beta_vae": {"variant"},
    "energy": {"key", "autoencoder", "steps", "step_size", "source", "target"},
    "identity": {"resolution"},
    "taesd": {"resolution", "decoder", *_FROZEN},
    "diffusers": {"resolution", *_FROZEN},
    "custom": {"resolution", "module", "arguments", "images", *_FROZEN},
}
_NEEDED = {"energy": ["autoencoder", "steps", "step_size"], "custom": ["module", "resolution"]}
_NEEDED |= {kind: ["resolution"] for kind in ("vqvae2", "identity", "taesd", "diffusers")}
_BACK = ["alae", "vqvae2", "beta_vae", "energy"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="read", choices=list(_OPTIONS), metavar="KIND", help=", ".join(_OPTIONS))
    way.add_argument("--to", dest="write", choices=_BACK, metavar="KIND", help="back to the published form")
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


def check(args: argparse.Namespace) -> None:
    """Raise UserError, with a line for each, for options that are missing or have no effect."""
    kind = args.read or args.write
    takes = _OPTIONS[kind] if args.read else set()
    given = {name for name in set().union(*_OPTIONS.values()) if getattr(args, name) is not None}
    what = f"--{'from' if args.read else 'to'} {kind}"
    problems = [f"--{name.replace('_', '-')} has no effect with {what}: leave it out" for name in sorted(given - takes)]
    if args.read:
        missing = [name for name in _NEEDED.get(kind, []) if name not in given]
        problems += [f"{what} needs --{name.replace('_', '-')}" for name in missing]
    if (args.path is None) != (args.read == "identity") and args.read != "custom":
        problems.append(
            f"{what} needs the path to read" if args.path is None else f"{what} reads no file: leave it out"
        )
    if args.write:
        unused = [name for name in ("data", "licence", "metric") if getattr(args, name) is not None]
        problems += [f"--{name} has no effect with {what}: leave it out" for name in unused]
    problems += [f"--metric {text}: expected NAME=VALUE" for text in args.metric or () if not all(text.partition("="))]
    if args.out.exists():
        problems.append(f"--out {args.out} exists: name another")
    if problems:
        raise UserError("\n".join(problems))


def model_card(args: argparse.Namespace, argv: list[str] | None) -> cards.Card:
    """What the options say, and what lies beside the published file."""
    published = None if args.path is None else cards.Card.read(args.path if args.path.is_dir() else args.path.parent)
    licence = args.licence or (None if args.path is None else cards.licence_beside(args.path))
    if licence is None:
        print("licence: not stated (--licence), and none beside the file", file=sys.stderr)
    metrics = {name: value for name, _, value in (text.partition("=") for text in args.metric or ())}
    data = args.data or (None if published is None else published.data)
    return cards.Card(data, licence, cards.command_line("launch/export.py", argv), metrics)


def read(args: argparse.Namespace, card: cards.Card) -> None:
    """A published file to a folder."""
    options = {name: value for name in _OPTIONS[args.read] if (value := getattr(args, name)) is not None}
    if args.read == "energy":
        read_energy(args, card)
        return
    from letit_dist.interchange.kinds import import_autoencoder

    if args.read == "identity":
        from letit_dist.autoencoders.base import build_autoencoder
        from letit_dist.autoencoders.identity import IdentityConfig
        from letit_dist.config import parse_config

        model = build_autoencoder(parse_config(IdentityConfig, {"kind": "identity", **options}))
    else:
        arguments = read_arguments(args.arguments) if args.read == "custom" else {}
        model = import_autoencoder(args.read, args.path, **{**options, **arguments})
    model.save_pretrained(args.out, card=card, **({} if args.path is None else {"published": args.path.name}))
    print(f"{args.out}: autoencoder {model.fingerprint()}, latents {model.latent_shape}")


def read_arguments(text: str | None) -> dict[str, Any]:
    """--arguments as the key that `import_custom` takes."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--arguments {text}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f'--arguments {text}: expected an object such as {{"width": 64}}')
    return {"arguments": found}


def read_energy(args: argparse.Namespace, card: cards.Card) -> None:
    """A published energy to a folder that a translator can open."""
    from letit_dist.autoencoders.base import load_autoencoder
    from letit_dist.config import as_tree, parse_config
    from letit_dist.energy.langevin import LangevinConfig
    from letit_dist.interchange.energy import import_energy
    from letit_dist.interchange.kinds import check_path
    from letit_dist.pretrained import find_folder

    check_path("energy", args.path)
    chain = parse_config(LangevinConfig, {"steps": args.steps, "step_size": args.step_size})
    energy = import_energy(args.path, key=args.key)
    autoencoder = load_autoencoder(find_folder(args.autoencoder))
    if energy.latent_shape != autoencoder.latent_shape:
        raise UserError(
            f"{args.path} sees latents {energy.latent_shape}, --autoencoder {args.autoencoder} makes "
            f"{autoencoder.latent_shape}"
        )
    ends = {name: value for name in ("source", "target") if (value := getattr(args, name)) is not None}
    energy.save_pretrained(
        args.out,
        card=card,
        autoencoder_fingerprint=autoencoder.fingerprint(),
        langevin=as_tree(chain),
        published=args.path.name,
        **ends,
    )
    print(f"{args.out}: energy {energy.fingerprint()} on the latents of {args.autoencoder}")


def write(args: argparse.Namespace) -> None:
    """A folder back to what the published code loads."""
    import torch

    from letit_dist.autoencoders.base import load_autoencoder
    from letit_dist.energy.models import load_energy
    from letit_dist.files import write_atomically
    from letit_dist.interchange.alae import export_alae
    from letit_dist.interchange.beta_vae import export_beta_vae
    from letit_dist.interchange.energy import export_energy
    from letit_dist.interchange.vqvae2 import export_vqvae2
    from letit_dist.pretrained import find_folder

    folder = find_folder(args.path)
    model = load_energy(folder) if args.write == "energy" else load_autoencoder(folder)
    if args.write != "energy" and model.config.kind != args.write:
        raise UserError(f"{folder} holds an autoencoder of kind {model.config.kind}, not {args.write}")
    exporters: dict[str, Callable[[Any], dict[str, Any]]]
    exporters = {"alae": export_alae, "vqvae2": export_vqvae2, "beta_vae": export_beta_vae, "energy": export_energy}
    published = exporters[args.write](model)
    packed = io.BytesIO()
    torch.save(published, packed)
    try:
        write_atomically(args.out, packed.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"{args.out}: {args.write} in its published form")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    check(args)
    read(args, model_card(args, argv)) if args.read else write(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
