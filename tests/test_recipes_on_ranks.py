"""The recipes of one phase that tests/test_distributed.py does not have: k ranks x B images equal 1 x kB."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from programs import run as program
from ranks import ROOT, start
from safetensors.torch import load_file

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.autoencoders.beta_vae import BetaVAE
from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.sources import Request, open_source

STYLES = ("apple", "orange")
TWENTY = ("training.images=160", "training.batch=8", "training.ema_half_life=40", "recipe.optimizer.decay=null")
TWENTY += ("intervals.report=80", "intervals.samples=1000000", "intervals.checkpoint=160")


@dataclass(frozen=True)
class Job:
    """A program with its config and data."""

    program: str
    config: str
    data: tuple[str, ...]

    def start(self, run: Path, *overrides: str, yaml: str | Path | None = None) -> Path:
        """Run it, alone or under one of the shipped launch files; returns its last checkpoint."""
        done = start(self.program, self.config, "--run", run, *self.data, *TWENTY, *overrides, launch=yaml)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return max((run / "checkpoints").glob("images-*"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Job]:
    """Fruit at 64 pixels, a beta-VAE as it is born, and the latents of both styles."""
    folder = tmp_path_factory.mktemp("ranks")
    for part in open_source("builtin:fruit", Request(resolution=64, count=24, test=8, seed=0)):
        pack(part, folder, PackOptions(resolution=64))
    torch.manual_seed(0)
    build_autoencoder(BetaVAE.tiny).save_pretrained(folder / "model")
    for style in STYLES:
        ends = ("--shards", folder / style / "train", "--out", folder / "z" / style)
        assert program("launch/encode_latents.py", "--autoencoder", folder / "model", *ends).code == 0
    train = f"data.train=[{folder / 'apple/train'}, {folder / 'orange/train'}]"
    latents = (f"data.source={folder / 'z/apple'}", f"data.target={folder / 'z/orange'}")
    energy = (*latents, f"autoencoder={folder / 'model'}", "energy.hidden=32")
    return {
        "beta_vae": Job("launch/pretrain.py", "configs/debug/beta_vae.yaml", (train,)),
        "energy": Job("launch/train_energy.py", "configs/energy/beta_vae.yaml", energy),
    }


def assert_equal(one: Path, two: Path, parts: tuple[str, ...], rtol: float, atol: float) -> None:
    for part in parts:
        first, second = (load_file(folder / f"{part}.safetensors") for folder in (one, two))
        assert first.keys() == second.keys() and len(first) > 3
        for name, value in first.items():
            say = functools.partial("{}: {}".format, f"{part} {name}")
            torch.testing.assert_close(second[name], value, rtol=rtol, atol=atol, msg=say)


@pytest.mark.parametrize("recipe", ["beta_vae", "energy"])
def test_two_ranks_equal_one_in_float64_after_twenty_steps(tmp_path, jobs, recipe):
    """Weights, average, optimiser and the reported means, with accumulation; z and Langevin noise included."""
    noise = ("recipe.langevin.noise_scale=0.01",) if recipe == "energy" else ()
    alone = "launch/accelerate/one.yaml" if recipe == "energy" else None
    one = jobs[recipe].start(tmp_path / "one", "training.precision=fp64", *noise, yaml=alone)
    split = ("training.precision=fp64", "training.microbatch=2", *noise)
    two = jobs[recipe].start(tmp_path / "two", *split, yaml="launch/accelerate/cpu2.yaml")
    assert_equal(one, two, ("model", "average", "optimizer"), rtol=1e-9, atol=1e-9)
    lines = [(tmp_path / run / "stats.jsonl").read_text().splitlines() for run in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 2
    for first, second in zip(*(map(numbers_of, side) for side in lines), strict=True):
        assert first == pytest.approx(second, rel=1e-9, abs=1e-12)


def numbers_of(line: str) -> dict[str, float]:
    numbers = json.loads(line)
    del numbers["images_per_second"]
    return numbers


ALLOWED = {"beta_vae": ("zero0", "zero1", "imagenet256", "ffhq1024", "zero3", "zero2_offload")}
ALLOWED["energy"] = tuple(name for name in ALLOWED["beta_vae"] if name != "zero3")


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["beta_vae", "energy"])
def test_every_shipped_deepspeed_file_is_ddp(tmp_path, jobs, recipe):
    pytest.importorskip("deepspeed")
    text = (ROOT / "launch/accelerate/deepspeed_cpu2.yaml").read_text()
    assert "launch/deepspeed/zero1.json" in text
    # With a small eps, Adam makes whole steps of gradients that are nothing but the rounding of another order of sums.
    options = ("training.microbatch=2", "recipe.optimizer.eps=1e-3")
    ddp = jobs[recipe].start(tmp_path / "ddp", *options, yaml="launch/accelerate/cpu2.yaml")
    for name in ALLOWED[recipe]:
        yaml = tmp_path / f"{name}.yaml"
        yaml.write_text(text.replace("launch/deepspeed/zero1.json", f"launch/deepspeed/{name}.json"))
        found = jobs[recipe].start(tmp_path / name, *options, yaml=yaml)
        assert_equal(ddp, found, ("model", "average", "optimizer"), rtol=1e-4, atol=1e-6)
