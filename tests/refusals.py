"""What the tests of bad input share: a call that must be refused, and what to call with."""

import numpy as np
import torch
from PIL import Image
from programs import ROOT, Chain, files, run

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.autoencoders.vqvae2 import VQVAE2Config

PRETRAIN = ("launch/pretrain.py", ROOT / "configs/debug/vqvae2.yaml")
ENERGY = ("launch/train_energy.py", ROOT / "configs/energy/fruit.yaml")


def refusal(root, *command, keeps=()):
    """The error lines of a program, having seen that it exits with 2 and leaves every file below `root` as it was."""
    before = files(root, *keeps)
    done = run(*command)
    assert done.code == 2, done.out
    assert files(root, *keeps) == before
    assert done.errors and all(line.startswith("error: ") for line in done.errors), done.err
    return [line.removeprefix("error: ") for line in done.errors]


def save_stranger(folder):
    """An autoencoder with the shapes of the chain's and other weights."""
    torch.manual_seed(1)
    config = {"resolution": 32, "channels": 16, "residual_blocks": 1, "residual_channels": 8, "code_dim": 8}
    build_autoencoder(VQVAE2Config(**config, codes=32)).save_pretrained(folder)
    return folder


def one(lines):
    assert len(lines) == 1, lines
    return lines[0]


def energy_command(chain: Chain, run_folder, **changed):
    places = {"autoencoder": chain.autoencoder, "source": chain.latents("apple"), "target": chain.latents("orange")}
    places |= changed
    data = (f"data.source={places['source']}", f"data.target={places['target']}")
    return (*ENERGY, "--run", run_folder, f"autoencoder={places['autoencoder']}", *data)


def photograph(path, number=0, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(array).save(path)
    return path
