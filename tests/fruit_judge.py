"""Fruit at 64 pixels with known factors, for the judge of them."""

import json

import torch
from programs import STYLES

from letit_dist.data.reader import ShardDataset
from letit_dist.data.synthetic import FruitFactors, render, sample_factors
from letit_dist.data.transforms import encode
from letit_dist.data.writer import ShardWriter


def pack(folder, style, contents, seed=0, key="fruit", side=64, factors=True):
    """Shards of one picture for each content, with the look drawn for this style."""
    with ShardWriter(folder, meta={"resolution": side, "domain": style}) as writer:
        for number, content in enumerate(contents):
            look = sample_factors(style, seed, number).look
            drawn = FruitFactors(style, content, look)
            pixels = torch.from_numpy(render(drawn, side)).permute(2, 0, 1)
            note = {"factors": drawn.as_json()} if factors else {"file": "x"}
            writer.write(f"{key}-{number}", {"png": encode(pixels), "json": json.dumps(note).encode()})
    return ShardDataset([folder])


def contents(count, seed):
    return [sample_factors("apple", seed, number).content for number in range(count)]


def draw_fruit(folder):
    """Shards of real images at 64 pixels: 200 for training, and 40 contents as apples and as oranges."""
    shared = contents(40, 9)
    return {
        "train": [pack(folder / f"{s}-train", s, contents(100, i), seed=i) for i, s in enumerate(STYLES)],
        "test": pack(folder / "test", "apple", shared, seed=5),
        "pairs": pack(folder / "pairs", "orange", shared[::-1], seed=6),
    }
