"""Published beta-VAE checkpoints (1Konny's BetaVAE_H, and LETIT's copy of it) to `BetaVAE` and back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict

from torch import Tensor

from letit_dist.autoencoders.beta_vae import BetaVAE, BetaVAEConfig
from letit_dist.errors import UserError
from letit_dist.pretrained import check_exactly, load_exactly
from letit_dist.published import read_published, state_dict


class _Variant(TypedDict):
    """What the weights do not tell: the range of the images that the networks were trained on."""

    inputs: Literal["signed", "unit"]
    output: Literal["sigmoid", "linear"]


_VARIANTS: dict[str, _Variant] = {
    "1konny": {"inputs": "unit", "output": "sigmoid"},
    "letit": {"inputs": "signed", "output": "linear"},
}


def import_beta_vae(path: str | Path, *, variant: Literal["1konny", "letit"] = "1konny") -> BetaVAE:
    """Read {"model_states": {"net": ...}} or a bare state dict, frozen, in eval mode.

    Raises UserError for a file that is no such checkpoint, with all keys missing, left over or mis-shaped.
    """
    if variant not in _VARIANTS:
        raise UserError(f"unknown variant {variant!r} of beta-VAE (known: {', '.join(_VARIANTS)})")
    found = read_published(path, keep="model_states")
    if isinstance(found, dict) and isinstance(found.get("model_states"), dict):
        found = found["model_states"].get("net")
    published = state_dict(found, path)
    first = published.get("decoder.0.weight")
    if first is None or first.ndim != 2:
        raise UserError(f"{path}: not a published beta-VAE: no decoder.0.weight of rank 2")
    model = BetaVAE(BetaVAEConfig(latent_dim=first.shape[1], **_VARIANTS[variant]))
    check_exactly(model.state_dict(), published, path)
    load_exactly(model, published, path)
    return model.eval().requires_grad_(False)


def export_beta_vae(model: BetaVAE) -> dict[str, dict[str, dict[str, Tensor]]]:
    """What the published code loads once it is saved by `torch.save`; our names are the published ones."""
    return {"model_states": {"net": model.state_dict()}}
