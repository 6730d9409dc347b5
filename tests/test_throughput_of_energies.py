"""eval/throughput.py energy, langevin and vqvae2: what they set against each other, and what they refuse."""

import re
import sys

import pytest
import torch
from programs import ROOT, run

from letit_dist.autoencoders import convolution
from letit_dist.autoencoders.alae import ALAE, ALAEConfig
from letit_dist.autoencoders.vqvae2 import VQVAE2, VQVAE2Config
from letit_dist.energy.convolutional import ConvEnergyConfig
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.errors import UserError

sys.path.insert(0, str(ROOT / "eval"))  # as Python does for a program there

from speed.chain_sides import ChainSides
from speed.energy_sides import Chain, EnergySides
from speed.training_sides import Setting
from speed.vqvae2_sides import Vqvae2Sides

THROUGHPUT = "eval/throughput.py"


@pytest.fixture
def energy_sides(fresh_accelerate, tmp_path):
    def build(kind: str, frozen: bool = True) -> EnergySides:
        fresh_accelerate()
        torch.manual_seed(0)
        if kind == "mlp":
            small = ALAEConfig(resolution=16, start_channels=4, max_channels=8, latent_dim=16, mapping_layers=2)
            return EnergySides(Chain(MLPEnergyConfig(hidden=24), 4, 3, 0.2), ALAE(small), tmp_path, frozen=frozen)
        small = VQVAE2Config(resolution=64, channels=8, residual_channels=4, code_dim=4, codes=16)
        return EnergySides(Chain(ConvEnergyConfig(), 2, 3, 2.0), VQVAE2(small), tmp_path, frozen=frozen)

    return build


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_an_iteration_of_an_energy_is_the_published_one(energy_sides, kind, frozen):
    sides = energy_sides(kind, frozen)
    found = dict(re.findall(r"(\w+) (\de[-+]\d+)", sides.agree()))
    assert set(found) == {"chains", "energies", "weights", "averages"}
    ours, naive = dict(sides.recipe.energy.named_parameters()), sides.naive.weights
    start = {name: value.clone() for name, value in ours.items()}
    sides.our_side.run()
    sides.naive_side(encoding=True).run()
    moving = [name for name in ours if name not in ("linear.bias", "layers.2.bias")]  # the last cancels in the loss
    assert all((ours[name] != start[name]).any() for name in moving)
    assert all(torch.isfinite(value).all() for value in naive.values())


def wrong_step(naive):
    naive.step_size *= 1.01


def wrong_average(naive):
    naive.decay = 0.5


def wrong_rate(naive):
    naive.optimizer.param_groups[0]["lr"] *= 1.01


def wrong_bias(naive):
    with torch.no_grad():
        next(weight for name, weight in naive.weights.items() if name.endswith("bias")).add_(0.01)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(wrong_step, "chains"), (wrong_average, "averages"), (wrong_rate, "weights"), (wrong_bias, "chains|energies")],
)
def test_a_wrong_formula_of_an_energy_is_seen(energy_sides, fault, kind):
    sides = energy_sides("conv")
    fault(sides.naive)
    with pytest.raises(UserError, match=f"the two sides disagree: ({kind}) by"):
        sides.agree()


def test_energies(tmp_path):
    done = run(
        *(THROUGHPUT, "energy", "--width", "tiny", "--resolution", 32, "--batch", 2, "--steps", 2, "--repeats", 2),
        *("--threads", 1, "--out", tmp_path),
    )
    assert done.code == 0, done.err
    rows = [line.split("|")[1].strip() for line in done.out.splitlines() if line.startswith("| ")][2:]
    expected = [[kind, f"{kind}, encoding", f"{kind}, all gradients"] for kind in ("alae", "beta_vae", "vqvae2")]
    assert rows == [name for names in expected for name in names]
    assert "at least 500" in done.out and re.search(r"share of the matrix rate: \d+% of \d+ GFLOP/s", done.out)
    assert next(tmp_path.glob("*-energy.md")).exists()


@pytest.mark.parametrize("command", ["energy", "langevin"])
def test_no_compiler_for_energies(command):
    done = run(THROUGHPUT, command, "--compile")
    assert done.code == 2 and f"--compile has no effect on {command}: leave it out" in done.err
    done = run(THROUGHPUT, command, "--steps", 0)
    assert done.code == 2 and "--steps 0: must be at least 1" in done.err


def test_chains(tmp_path):
    small = ("--resolution", 32, "--batch", 3, "--steps", 4, "--repeats", 2, "--threads", 1, "--bf16", "--plain")
    done = run(THROUGHPUT, "langevin", *small, "--on", "vqvae2", "beta_vae", "--out", tmp_path)
    assert done.code == 0, done.err
    rows = [line.split("|")[1].strip() for line in done.out.splitlines() if line.startswith("| ")][2:]
    assert rows == ["vqvae2", "vqvae2, all gradients", "beta_vae", "beta_vae, all gradients"]
    assert len(re.findall(r"moves in float64 \de-1[2-9], moves in float32", done.out)) == 4
    assert next(tmp_path.glob("*-langevin.md")).exists()
    done = run(THROUGHPUT, "langevin", "--resolution", 48)
    assert done.code == 2 and "--resolution 48: must be a power of two from 16 on" in done.err


@pytest.mark.parametrize("energy", [MLPEnergyConfig(hidden=24), ConvEnergyConfig()], ids=["mlp", "conv"])
def test_a_wrong_chain_is_seen(energy):
    sides = ChainSides(Chain(energy, 3, 4, 0.5), (4, 8, 8), torch.device("cpu"), frozen=True)
    assert "moves in float64" in sides.agree()
    sides.sampler = LangevinSampler(LangevinConfig(steps=4, step_size=0.5 * (1 + 1e-9)))
    with pytest.raises(UserError, match="the two sides disagree: moves in float64 by"):
        sides.agree()


@pytest.fixture(params=["as torch", "by products"])
def vqvae2_sides(fresh_accelerate, tmp_path, monkeypatch, request):
    fresh_accelerate()
    if request.param == "by products":  # which such small maps would not be
        monkeypatch.setattr(convolution, "_LEAST", 0)
        monkeypatch.setattr(convolution, "_NARROW", 1)
    config = VQVAE2Config(resolution=32, channels=8, residual_channels=4, code_dim=4, codes=16)
    return Vqvae2Sides(config, tmp_path, Setting(2, "fp64"))


def test_an_iteration_of_vqvae2_is_the_published_one(vqvae2_sides):
    for _ in range(2):  # the second one with moments and a codebook of the first
        found = vqvae2_sides.compare(1e-9)
    assert set(found) == {"loss", "weights", "codebooks"}


@pytest.mark.parametrize("kind", ["weights", "codebooks"])
def test_a_wrong_formula_of_vqvae2_is_seen(vqvae2_sides, kind):
    naive = vqvae2_sides.naive
    if kind == "weights":
        naive.optimizer.param_groups[0]["lr"] *= 1.01
    else:
        naive.books["top_quantizer.cluster_size"] += 0.01
    with pytest.raises(UserError, match=f"the two sides disagree: {kind} by"):
        vqvae2_sides.compare(1e-9)


def test_vqvae2(tmp_path):
    done = run(THROUGHPUT, "vqvae2", "--resolution", 16, 32, "--channels", 8, "--batch", 2, "--repeats", 2)
    assert done.code == 0, done.err
    assert re.search(r"\| 32 pixels .*at least 1.5 .*float64: loss .*; float32: loss", done.out)


def test_vqvae2_layer_by_layer():
    size = ("--resolution", 32, "--channels", 8, "--batch", 1, "--repeats", 1, "--threads", 1)
    done = run(THROUGHPUT, "vqvae2", "--layers", *size)
    assert done.code == 0, done.err
    assert "4 x bottom_encoder.blocks.0.conv1 (2x8x3x3 on 8 x 8)" in done.out
    assert re.search(r"all convolutions of an iteration: row-major \d+ ms, .*GFLOP at the rate of products", done.out)
    done = run(THROUGHPUT, "vqvae2", "--layers", "--bf16")
    assert done.code == 2 and "--bf16 has no effect on vqvae2" in done.err
