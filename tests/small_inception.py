"""The first layers of the Inception with random weights, in place of the published file; pictures for them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from letit_dist.evaluation.extractors import open_extractor
from letit_dist.evaluation.weights import FILES


def open_small():
    return open_extractor("compat", folder=Path("/nowhere"), layer="64", random_weights=True)


def save_weights(extractor, path):
    """A file in the published one's format."""
    state = extractor.network.state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches_tracked" not in name}, path)
    return path


def take_for_published(path, folder, monkeypatch):
    """A folder of weights in which that file is the right one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    file = replace(FILES["inception"], sha256=digest[:8], address=f"https://example.org/net-{digest[:8]}.pth")
    monkeypatch.setitem(FILES, "inception", file)
    folder.mkdir()
    (folder / file.name).symlink_to(path)
    return folder


def noise(count, side=32, seed=0):
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def pictures(folder, count, seed=0, side=32, shift=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(noise(count, side // 4, seed)):
        image = (image.float() * 0.7 + shift).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR).save(folder / f"{number:03d}.png")
    return folder


def command(*more, layer="64"):
    """Arguments of eval/fidelity.py with it."""
    return [*map(str, more), "--random-weights", "--layer", layer, "--metrics", "fid", "kid", "--kid-subset-size", "8"]
