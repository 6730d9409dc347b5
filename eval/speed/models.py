"""The autoencoders that are measured, with random weights, and a translator on each of them."""

from __future__ import annotations

import torch

from letit_dist.autoencoders.base import AutoencoderConfig, build_autoencoder
from letit_dist.config import parse_config
from letit_dist.energy.convolutional import ConvEnergyConfig
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator
from letit_dist.registry import AUTOENCODERS
from letit_dist.training.setup import seed_weights
from speed.arguments import WIDTHS

# Chains as published for each kind, and for maps of other people's autoencoders as for VQ-VAE-2's: T, eta of eq. (6).
CHAINS = {"alae": (20, 0.2), "beta_vae": (10, 0.2), "vqvae2": (35, 2.0), "taesd": (35, 2.0)}


def autoencoder_config(kind: str, resolution: int, width: str) -> AutoencoderConfig:
    """At `width` "full" as published; narrower ones have the same layers. UserError for sizes that cannot be."""
    start, most, latent, layers = WIDTHS[width]
    sizes = {
        "alae": {
            "resolution": resolution,
            "start_channels": max(1, start * 256 // resolution),
            "max_channels": most,
            "latent_dim": latent,
            "mapping_layers": layers,
        },
        "vqvae2": {"resolution": resolution, "channels": 2 * start, "residual_channels": max(1, start // 2)},
        "beta_vae": {},
        "taesd": {"resolution": resolution, "width": start, "tile": 0},
    }
    return parse_config(AUTOENCODERS.get(kind).config_class, sizes[kind])


def make_translator(kind: str, resolution: int, width: str, *, steps: int | None = None, seed: int = 0) -> Translator:
    """On the CPU: an energy of the kind that is published for such latents, MLP or convolutional, and its chain."""
    seed_weights(seed)
    config = autoencoder_config(kind, resolution, width)
    autoencoder = build_autoencoder(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            if not parameter.any():  # zeros, as of noise and biases, would hide differences
                parameter.normal_(std=0.1)
    shape = autoencoder.latent_shape
    settings = {"alae": MLPEnergyConfig(hidden=4 * shape[0]), "beta_vae": MLPEnergyConfig(hidden=64)}
    energy = build_energy(settings.get(kind, ConvEnergyConfig()), shape).eval().requires_grad_(False)
    given, size = CHAINS[kind]
    return Translator(autoencoder, energy, LangevinSampler(LangevinConfig(steps=steps or given, step_size=size)))


def in_float64(translator: Translator) -> Translator:
    """A copy in double precision, to tell a wrong formula from rounding."""
    import copy

    twin = copy.deepcopy(translator)
    twin.autoencoder.double()
    twin.energy.double()
    return twin
