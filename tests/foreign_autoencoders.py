"""Other people's autoencoders at tiny size: published files with random weights, and modules of somebody's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.autoencoders.taesd import TAESD, TAESDConfig
from letit_dist.errors import UserError

# The layers of each published member of the family, at a width that runs in milliseconds.
FAMILY = {
    "taesd": {"latent_channels": 4},
    "taef1": {"latent_channels": 16},
    "taef2": {
        "latent_channels": 32,
        "encoder_branches": (False, False, False, True),
        "decoder_branches": (True, False, False, False),
    },
}


def images(side: int, count: int = 2) -> torch.Tensor:
    """Noise (count, 3, side, side) in [-1, 1], the same at every call."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def error_of(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """What the UserError says that a call ends with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def taesd(member: str, resolution: int = 32, **settings) -> TAESD:
    """A member of the family with random weights, eight channels wide."""
    torch.manual_seed(0)
    config = TAESDConfig(resolution=resolution, width=8, **FAMILY[member], **settings)
    return build_autoencoder(config).eval().requires_grad_(False)


def publish(model: TAESD, folder: Path, ending: str = "safetensors") -> Path:
    """Its two published files: each side's own layers, numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("encoder", "decoder"):
        state = {name: tensor.clone() for name, tensor in getattr(model, side).state_dict().items()}
        path = folder / f"tiny_{side}.{ending}"
        save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    return folder


class Codec(nn.Module):
    """Somebody's own: flat latents, images in [0, 1]."""

    def __init__(self, side: int, width: int = 6):
        super().__init__()
        self.side = side
        self.down = nn.Linear(3 * side**2, width)
        self.up = nn.Linear(width, 3 * side**2)

    def encode(self, images):
        assert images.amin() >= 0
        return self.down(images.flatten(1))

    def decode(self, latents):
        return torch.sigmoid(self.up(latents)).unflatten(1, (3, self.side, self.side))


class Tuples(Codec):
    """Gives more than latents."""

    def encode(self, images):
        return super().encode(images), None


class Encoder(nn.Module):
    """No way back."""

    def encode(self, images):
        return images
