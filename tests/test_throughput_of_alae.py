"""ALAE's published iteration against the trainer's; eval/throughput.py alae."""

import re
import sys

import pytest
import torch
from programs import ROOT, run

from letit_dist.autoencoders.alae import ALAE, ALAEConfig
from letit_dist.errors import UserError

sys.path.insert(0, str(ROOT / "eval"))  # as Python does for a program there

from speed.alae_sides import AlaeSides, Tolerance
from speed.naive_alae import NaiveALAE
from speed.training_sides import Setting

TINY = ("eval/throughput.py", "alae", "--width", "tiny", "--batch", 2, "--repeats", 2, "--threads", 1)


def small(resolution: int) -> ALAEConfig:
    return ALAEConfig(resolution=resolution, start_channels=4, max_channels=8, latent_dim=8, mapping_layers=2)


# The published iteration


@pytest.fixture
def sides(fresh_accelerate, tmp_path):
    def build(resolution: int = 16, precision: str = "fp32", **options) -> AlaeSides:
        fresh_accelerate()
        return AlaeSides(small(resolution), tmp_path, Setting(2, precision), **options)

    return build


@pytest.mark.parametrize("resolution", [16, 32, 128])  # 128: resampling inside strided convolutions
def test_an_iteration_is_the_published_one(sides, resolution):
    pair = sides(resolution, precision="fp64", eps=1e-30)
    for _ in range(2):  # the second one with second moments and averages of the first
        found = pair.compare(Tolerance())
        # Losses are taken in float32.
        assert found.found["loss"] < 1e-6 and found.found["gradient"] < 1e-10 and found.found["weight"] < 1e-7
        assert found.found["average"] < 1e-12
        assert found.weights > 3000 and found.exempt < 0.01 * found.weights


def test_an_iteration_is_the_published_one_in_float32_too(sides):
    """Gradients jump where an activation lies within rounding of LeakyReLU's kink: losses only."""
    infinity = float("inf")
    pair = sides(32)
    assert pair.compare(Tolerance(1e-3, infinity, infinity, infinity)).found["loss"] > 0


def test_eps_at_its_published_place_moves_only_weights_of_small_gradients(sides):
    found = sides(16, precision="fp64", eps=1e-8).compare(Tolerance(weight=0.5, floor=1e-6)).found
    assert found["gradient"] < 1e-10 and 1e-6 < found["weight"] < 0.1


def wrong_gamma(naive):
    naive.gamma *= 1.01


def wrong_blur(naive):
    naive.kernel = naive.kernel * 1.001


def wrong_coefficient(naive):
    naive.coefficients["generator.blocks.1.conv2.weight"] *= 1.001


def wrong_half_life(naive):
    naive.half_life *= 2


def wrong_bias(naive):
    with torch.no_grad():
        naive.weights["generator.blocks.1.styled1.bias"] += 1e-6


def wrong_slope(naive):
    naive._from_rgb = lambda images, level: torch.nn.functional.leaky_relu(
        naive._convolve(f"encoder.from_rgb.{level}", images), 0.2
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (wrong_gamma, "loss of discriminator by"),
        (wrong_blur, "loss of discriminator by"),
        (wrong_slope, "loss of discriminator by"),
        (wrong_coefficient, r"weight of generator.blocks.1.conv2.weight after generator by 0.001, allowed are 1e-06"),
        (wrong_half_life, "average of .* by"),
        (wrong_bias, "generator.blocks.1.styled1.bias after discriminator, which the naive one does not move"),
    ],
)
def test_a_wrong_formula_is_seen(sides, fault, message):
    pair = sides(16, precision="fp64", eps=1e-30)
    fault(pair.naive)
    with pytest.raises(UserError, match=f"the two sides disagree: {message}"):
        pair.compare(Tolerance())


def test_a_network_that_learns_on_one_side_only_is_seen(sides):
    pair = sides(16, precision="fp64", eps=1e-30)
    step = pair.naive._adam
    pair.naive._adam = lambda learning: step({n: w for n, w in learning.items() if not n.startswith("critic")})
    with pytest.raises(UserError, match=r"weight of critic\..* after discriminator"):
        pair.compare(Tolerance())


@pytest.mark.parametrize(("level", "blend"), [(0, 1.0), (1, 0.3), (3, 1.0), (5, 0.5), (5, 1.0)])
def test_networks_at_every_stage_of_growing(level, blend):
    torch.manual_seed(0)
    network = ALAE(small(128)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    naive = NaiveALAE(network, rate=1.0, half_life=1.0)
    z = torch.randn(2, 8).double()
    noise = naive.draw("reciprocity", 2, level).noise
    w = network.mapping(z)
    images = network.generate(w, level, blend, noise=noise)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(naive.mapping(z), w, **close)
    styles = w[:, None].repeat(1, 2 * (level + 1), 1)
    torch.testing.assert_close(naive.generate(styles, noise, level, blend), images, **close)
    found = network.encode_at(images, level, blend)
    torch.testing.assert_close(naive.encode(images, level, blend), found, **close)
    torch.testing.assert_close(naive.critic(found), network.critic(found), **close)


def test_the_coefficients_are_the_rates_of_the_recipe(sides):
    pair = sides(128)
    rates = {parameter: group.rate for group in pair.recipe.parameter_groups() for parameter in group.parameters}
    for name, parameter in pair.recipe.autoencoder.named_parameters():
        assert pair.naive.coefficients[name] == pytest.approx(rates[parameter]), name


# The program


@pytest.mark.parametrize("options", [(), ("--bf16",)])
def test_alae(tmp_path, options):
    done = run(*TINY, "--resolution", 8, 32, "--out", tmp_path, *options)
    assert done.code == 0, done.err
    (path,) = tmp_path.glob("*-alae.md")
    text = path.read_text()
    assert f"report: {path}" in done.out
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in (table[0], *table[2:])] == ["case", "8", "32"]
    assert all(line in done.out for line in table)
    assert "python eval/throughput.py alae --width tiny --batch 2" in text
    for fact in ("- width: tiny", "- batch: 2", f"- bf16: {'yes' if options else 'no'}", "1 torch thread"):
        assert fact in text
    naive, ours = (float(cell) for cell in table[-1].split("|")[7:9])
    assert 0 < ours < naive


def test_lazy_r1(sides):
    """Of four batches one evaluates R1, with four times its weight; the naive side has it in all."""
    pair = sides(16)
    weights = []
    step = pair.recipe.discriminator_step
    pair.recipe.discriminator_step = lambda *given: (weights.append(given[-1]), step(*given))[1]
    naive, ours = pair.in_turns(4)
    start = pair.trainer.images_seen
    ours.run()
    ours.run()
    assert weights == [4 * pair.recipe.config.r1_gamma, 0, 0, 0] * 2
    assert pair.trainer.images_seen == start + 8 * 2
    count = []
    pair.naive.iteration = lambda *_: iter(count.append(1) or ())
    naive.run()
    assert len(count) == 4


def test_lazy_r1_has_a_row():
    done = run(*TINY, "--resolution", 8, "--lazy", 2)
    assert done.code == 0, done.err
    assert re.search(r"\| 8 pixels, R1 in one batch of 2 .*\| at least 1.4 .*\| in expectation only", done.out)
    done = run(*TINY, "--lazy", 1)
    assert done.code == 2 and "--lazy 1: must be at least 2" in done.err


@pytest.mark.full
def test_alae_compiled():
    done = run(*TINY, "--resolution", 8, "--compile", "eager")
    assert done.code == 0, done.err
    assert re.search(r"\| 8 pixels .*\| - +\| - +\| float64", done.out)
