"""Autoencoders in diffusers' own folders to ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from letit_dist.autoencoders.diffusers_models import MODELS, DiffusersAutoencoder, DiffusersConfig
from letit_dist.config import parse_config
from letit_dist.errors import UserError
from letit_dist.pretrained import load_exactly
from letit_dist.published import read_tensors

_WEIGHTS = "diffusion_pytorch_model"
_ENDINGS = ("safetensors", "fp16.safetensors", "bin")


def import_diffusers(path: str | Path, **settings: Any) -> DiffusersAutoencoder:
    """A frozen model in eval mode, in float32, from a folder with config.json and diffusion_pytorch_model.safetensors
    (or .bin), or from a pipeline's folder with a `vae` or `vqvae` in it.

    `settings` are the resolution, and scale, shift and tile of `DiffusersConfig`; scale and shift are the model's own
    (scaling_factor, shift_factor, latents_mean, latents_std) where they are not given. Raises UserError for a folder
    that is none of these, a class that is not known here, and keys missing, left over or mis-shaped.
    """
    folder = _find(Path(path))
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / 'config.json'}: {error}") from None
    name = tree.get("_class_name") if isinstance(tree, dict) else None
    if name not in MODELS:
        raise UserError(f"{folder / 'config.json'}: its class is {name}, known here are {', '.join(MODELS)}")
    # AutoencoderTiny notes down a key that is none of its arguments.
    none = ("block_out_channels",) if name == "AutoencoderTiny" else ()
    own = {key: value for key, value in tree.items() if not key.startswith("_") and key not in none}
    config = parse_config(DiffusersConfig, {"model": name, "settings": own, **_scaling(own), **settings})
    model = DiffusersAutoencoder(config)
    weights = next((p for ending in _ENDINGS if (p := folder / f"{_WEIGHTS}.{ending}").is_file()), None)
    if weights is None:
        raise UserError(f"{folder}: no {' and no '.join(f'{_WEIGHTS}.{ending}' for ending in _ENDINGS)} in it")
    tensors = {f"network.{key}": value for key, value in read_tensors(weights).items()}
    expected = model.state_dict()
    tensors = {k: v.to(expected[k].dtype) if k in expected and v.is_floating_point() else v for k, v in tensors.items()}
    load_exactly(model, tensors, weights)
    return model.eval().requires_grad_(False)


def _find(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"no such folder: {path} (a model's folder as diffusers saves it, with config.json)")
    for folder in (path, path / "vae", path / "vqvae"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: no config.json in it, nor in a vae or vqvae below it")


def _scaling(settings: dict[str, Any]) -> dict[str, list[float]]:
    """diffusers: (z - mean) * scaling_factor / std by channel, or (z - shift_factor) * scaling_factor."""
    factor = settings.get("scaling_factor") or 1.0
    mean, spread = settings.get("latents_mean"), settings.get("latents_std")
    if mean is not None and spread is not None:
        return {"scale": [factor / value for value in spread], "shift": list(mean)}
    return {"scale": [factor], "shift": [settings.get("shift_factor") or 0.0]}
