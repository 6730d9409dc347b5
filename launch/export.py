#!/usr/bin/env python3
"""Turn published checkpoints into folders of config.json and model.safetensors, and such folders back.

    python launch/export.py --from alae ffhq/model_submitted.pth --out models/alae_ffhq
    python launch/export.py --from vqvae2 vqvae_560.pt --resolution 256 --out models/vqvae2
    python launch/export.py --from beta_vae last --out models/beta_vae
    python launch/export.py --from energy ebm.pth --out models/ebm \\
        --autoencoder models/alae_ffhq --steps 20 --step-size 2
    python launch/export.py --from identity --resolution 64 --out models/pixels
    python launch/export.py --to alae models/alae_ffhq --out alae.pth

A folder may be given to every --autoencoder and --energy option, and as autoencoder=FOLDER to train_energy.py. Nothing
is read from a published file but tensors. `identity` makes an autoencoder that does nothing: latents are pixels.

energy: the published code's step size is half of ours (its 1.0 is --step-size 2), and its energies have the other sign,
which is turned here. Its checkpoints do not say which chain they were trained with.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from letit_dist.errors import UserError, reports_errors

# Options that only some kinds take, when they are read.
_OPTIONS = {
    "alae": {"weights"},
    "vqvae2": {"resolution", "variant"},
    "beta_vae": {"variant"},
    "energy": {"key", "autoencoder", "steps", "step_size", "source", "target"},
    "identity": {"resolution"},
}
_NEEDED = {"vqvae2": ["resolution"], "identity": ["resolution"], "energy": ["autoencoder", "steps", "step_size"]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="read", choices=list(_OPTIONS), metavar="KIND", help=", ".join(_OPTIONS))
    back = [kind for kind in _OPTIONS if kind != "identity"]
    way.add_argument("--to", dest="write", choices=back, metavar="KIND", help="back to the published form")
    parser.add_argument("path", nargs="?", type=Path, help="published file, or with --to a folder or run")
    parser.add_argument("--out", required=True, type=Path, help="new folder, or with --to a new file")
    parser.add_argument("--weights", choices=("average", "training"), help="alae: which of the two sets (average)")
    parser.add_argument("--resolution", type=int, help="vqvae2, identity: side of the images, which no file tells")
    parser.add_argument("--variant", help="vqvae2: rosinality (default) or letit; beta_vae: 1konny (default) or letit")
    parser.add_argument("--key", help="energy: which entry of a file that holds several")
    parser.add_argument("--autoencoder", help="energy: folder of the autoencoder on whose latents it was trained")
    parser.add_argument("--steps", type=int, help="energy: Langevin steps it was trained with")
    parser.add_argument("--step-size", type=float, help="energy: eta of eq. (6), twice the published code's")
    parser.add_argument("--source", help="energy: name of the domain it starts from")
    parser.add_argument("--target", help="energy: name of the domain it leads to")
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
    if (args.path is None) != (args.read == "identity"):
        problems.append(
            f"{what} needs the path to read" if args.path is None else f"{what} reads no file: leave it out"
        )
    if args.out.exists():
        problems.append(f"--out {args.out} exists: name another")
    if problems:
        raise UserError("\n".join(problems))


def read(args: argparse.Namespace) -> None:
    """A published file to a folder."""
    options = {name: value for name in _OPTIONS[args.read] if (value := getattr(args, name)) is not None}
    if args.read == "energy":
        read_energy(args)
        return
    if args.read == "alae":
        from letit_dist.interchange.alae import import_alae

        model = import_alae(args.path, **options)
    elif args.read == "vqvae2":
        from letit_dist.interchange.vqvae2 import import_vqvae2

        model = import_vqvae2(args.path, **options)
    elif args.read == "beta_vae":
        from letit_dist.interchange.beta_vae import import_beta_vae

        model = import_beta_vae(args.path, **options)
    else:
        from letit_dist.autoencoders.base import build_autoencoder
        from letit_dist.autoencoders.identity import IdentityConfig
        from letit_dist.config import parse_config

        model = build_autoencoder(parse_config(IdentityConfig, {"kind": "identity", **options}))
    model.save_pretrained(args.out, **({} if args.path is None else {"published": args.path.name}))
    print(f"{args.out}: autoencoder {model.fingerprint()}, latents {model.latent_shape}")


def read_energy(args: argparse.Namespace) -> None:
    """A published energy to a folder that a translator can open."""
    from letit_dist.autoencoders.base import load_autoencoder
    from letit_dist.config import as_tree, parse_config
    from letit_dist.energy.langevin import LangevinConfig
    from letit_dist.interchange.energy import import_energy
    from letit_dist.pretrained import find_folder

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
    read(args) if args.read else write(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
