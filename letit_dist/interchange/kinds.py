"""Which published forms are read, what each expects, and how a path is recognised. Imports no torch before it reads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from letit_dist import hub
from letit_dist.errors import UserError

if TYPE_CHECKING:
    from letit_dist.autoencoders.base import Autoencoder

# What lies at the path of each kind; of `identity` nothing does.
EXPECTED = {
    "alae": "the .pth file that ALAE's training saved",
    "vqvae2": "a .pt file of torch.save with the state dict",
    "beta_vae": "a file of torch.save with the state dict, bare or as ['model_states']['net']",
    "energy": "a .pt file of torch.save with the energy's state dict",
    "taesd": "a folder with one file called *encoder* and one called *decoder* (.pth, .pt or .safetensors), the "
    "encoder's file with --decoder beside it, or one file of both",
    "diffusers": "a folder with config.json and diffusion_pytorch_model.safetensors as diffusers saves it, or one of a "
    "pipeline with such a vae in it",
    "custom": "a file of torch.save or a .safetensors file with the module's state dict",
}


def check_path(kind: str, path: str | Path) -> None:
    """Raise UserError for what is not there: what was expected and, for what looks like an id on the Hub, how to fetch
    that."""
    if Path(path).exists():
        return
    fetch = f". To fetch it from the Hub: {hub.advice(str(path))}" if hub.looks_like_id(path) else ""
    noun = "folder" if kind == "diffusers" else "file"
    raise UserError(f"no such {noun}: {path}, expected {EXPECTED[kind]}{fetch}")


def recognise(path: str | Path) -> str | None:
    """taesd or diffusers where `path` is a published folder of these; None for anything else."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    if any(hub.is_of_diffusers(place) for place in (folder, folder / "vae", folder / "vqvae")):
        return "diffusers"
    if (folder / "config.json").exists():
        return None
    names = [file.name for file in folder.iterdir() if file.suffix in (".pth", ".pt", ".safetensors")]
    return "taesd" if all(any(side in name for name in names) for side in ("encoder", "decoder")) else None


def import_autoencoder(kind: str, path: str | Path | None, **options: Any) -> Autoencoder:
    """A published autoencoder of a kind, frozen, in eval mode; `options` are those of its import_... function.

    Raises UserError for a path that is not there, and as that function does.
    """
    if path is not None:
        check_path(kind, path)
    module = {"diffusers": "diffusers_models"}.get(kind, kind)
    read = getattr(importlib.import_module(f"letit_dist.interchange.{module}"), f"import_{kind}")
    model: Autoencoder = read(path, **options)
    return model
