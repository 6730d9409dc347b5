"""Run folders for the figures: a tiny VQ-VAE-2 with an energy each way, as the programs leave them, untrained."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import tiny_autoencoder

from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.evaluation.energy_run import EnergyRun, open_run

# Long steps: what an untrained energy does must show in the pixels.
CHAIN = {"steps": 4, "step_size": 300.0, "noise_scale": 0.0}


def make_runs(root: Path, latents: Path) -> Path:
    """ROOT/autoencoder, ROOT/apple2orange and ROOT/orange2apple, whose data are `fruit_latents`."""
    autoencoder = tiny_autoencoder()
    autoencoder.save_pretrained(root / "autoencoder")
    for seed, (source, target) in enumerate((("apple", "orange"), ("orange", "apple"))):
        torch.manual_seed(seed)
        energy = build_energy(MLPEnergyConfig(hidden=32, latent_unit=0.5), autoencoder.latent_shape)
        extra = {"autoencoder_fingerprint": autoencoder.fingerprint(), "langevin": CHAIN, "images_seen": 1234}
        folder = root / f"{source}2{target}"
        energy.save_pretrained(folder / "export/images-000000001234", **extra, source=source, target=target)
        data = f"{{source: {latents / source}, target: {latents / target}}}"
        (folder / "config.yaml").write_text(f"autoencoder: {root / 'autoencoder'}\ndata: {data}\n")
    return root


def opened(root: Path, name: str = "apple2orange") -> EnergyRun:
    return open_run([str(root / name)])
