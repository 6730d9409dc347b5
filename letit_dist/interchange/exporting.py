"""Published forms to folders and back, as the options of launch/export.py ask. Imports no torch before it reads."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from typing import Any

from letit_dist.cards import Card, licence_beside
from letit_dist.errors import UserError

# Options that only some kinds take, when they are read.
_FROZEN = ("scale", "shift", "tile")
OPTIONS = {
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
BACK = ["alae", "vqvae2", "beta_vae", "energy"]


def check(args: argparse.Namespace) -> None:
    """Raise UserError, with a line for each, for options that are missing or have no effect."""
    kind = args.read or args.write
    takes = OPTIONS[kind] if args.read else set()
    given = {name for name in set().union(*OPTIONS.values()) if getattr(args, name) is not None}
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


def model_card(args: argparse.Namespace, command: str) -> Card:
    """What the options say, and what lies beside the published file; `command` is what makes the folder."""
    published = None if args.path is None else Card.read(args.path if args.path.is_dir() else args.path.parent)
    licence = args.licence or (None if args.path is None else licence_beside(args.path))
    metrics = {name: value for name, _, value in (text.partition("=") for text in args.metric or ())}
    data = args.data or (None if published is None else published.data)
    return Card(data, licence, command, metrics)


def read(args: argparse.Namespace, card: Card) -> str:
    """A published file to a folder; returns a line that says what it is."""
    options = {name: value for name in OPTIONS[args.read] if (value := getattr(args, name)) is not None}
    if args.read == "energy":
        return _read_energy(args, card)
    from letit_dist.interchange.kinds import import_autoencoder

    if args.read == "identity":
        from letit_dist.autoencoders.base import build_autoencoder
        from letit_dist.autoencoders.identity import IdentityConfig
        from letit_dist.config import parse_config

        model = build_autoencoder(parse_config(IdentityConfig, {"kind": "identity", **options}))
    else:
        arguments = _read_arguments(args.arguments) if args.read == "custom" else {}
        model = import_autoencoder(args.read, args.path, **{**options, **arguments})
    model.save_pretrained(args.out, card=card, **({} if args.path is None else {"published": args.path.name}))
    return f"{args.out}: autoencoder {model.fingerprint()}, latents {model.latent_shape}"


def _read_arguments(text: str | None) -> dict[str, Any]:
    """--arguments as the key that `import_custom` takes."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--arguments {text}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f'--arguments {text}: expected an object such as {{"width": 64}}')
    return {"arguments": found}


def _read_energy(args: argparse.Namespace, card: Card) -> str:
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
    return f"{args.out}: energy {energy.fingerprint()} on the latents of {args.autoencoder}"


def write(args: argparse.Namespace) -> str:
    """A folder back to what the published code loads; returns a line that says so."""
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
    return f"{args.out}: {args.write} in its published form"
