"""Energies against the published numbers, their folders, the objective, the baseline, import and export."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from letit_dist.config import as_tree, parse_kind
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.convolutional import ConvEnergy, ConvEnergyConfig, EqualConv2d
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergy, MLPEnergyConfig
from letit_dist.energy.models import build_energy, load_energy
from letit_dist.energy.objective import contrastive_loss
from letit_dist.errors import UserError
from letit_dist.interchange.energy import export_energy, import_energy
from letit_dist.registry import ENERGIES

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = {"mlp_layer0": 20, "mlp_layer1": 20, "mlp_layer2": 20, "conv": 5, "conv_attention": 5}
KINDS = ENERGIES.kinds()


def close(actual, expected, scale=1e-5):
    """To `scale` of the largest expected entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=scale * expected.abs().max().item() + 1e-8)


def published(name):
    return torch.load(GOLDEN / f"ebm_{name}.pt", weights_only=True)


@pytest.fixture(params=KINDS)
def energy(request):
    torch.manual_seed(0)
    model_class = ENERGIES.get(request.param)
    return build_energy(model_class.tiny, model_class.tiny.latent_shape)


def some(energy, count=3, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *energy.latent_shape, generator=generator, **options)


# Published numbers


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    expected = load_file(GOLDEN / f"ebm_{name}_vectors.safetensors")
    energy = import_energy(GOLDEN / f"ebm_{name}.pt").requires_grad_(True)
    steps = PUBLISHED[name]
    if "trajectory" not in expected:
        states = [expected["source"], *[expected[f"trajectory.{t}"] for t in range(1, steps + 1)]]
        expected["trajectory"] = torch.stack(states)

    # The published step of 1.0 has no 1/2, so it is 2.0 in the sense of eq. (6).
    sampler = LangevinSampler(LangevinConfig(steps=steps, step_size=2.0))
    chain = sampler.sample(energy, expected["source"], keep_path=True)
    close(chain.path, expected["trajectory"])
    close(chain.path.diff(dim=0), expected["trajectory"].diff(dim=0), 1e-4)  # differences of float32
    close(-chain.energies[-1], expected["f_source"].squeeze(1))  # f of the translated source
    close(-energy(expected["target"]).detach(), expected["f_target"].squeeze(1))

    # f = -E has the same gradients but for the last layer, whose sign is flipped.
    optimizer = torch.optim.SGD(energy.parameters(), lr=0.1)
    loss, metrics = contrastive_loss(energy, expected["target"], chain.latents)
    close(loss.detach(), expected["loss"].squeeze())
    close(-metrics["energy_gap"], expected["loss"].squeeze())
    loss.backward()
    gradients = export_energy(with_gradients(energy))
    compared = 0
    for key, gradient in gradients.items():
        if f"grad.{key}" in expected:
            close(gradient, expected[f"grad.{key}"])
            compared += 1
        if f"grad_norm.{key}" in expected:
            close(gradient.norm(), expected[f"grad_norm.{key}"].squeeze())
            compared += 1
    assert compared == len(gradients)
    optimizer.step()
    for key, weight in export_energy(energy).items():
        if f"after_sgd.{key}" in expected:
            close(weight, expected[f"after_sgd.{key}"])


def with_gradients(energy):
    """A copy whose weights are the gradients of `energy`."""
    copy = build_energy(energy.config, energy.latent_shape)
    copy.load_state_dict({name: parameter.grad for name, parameter in energy.named_parameters()})
    return copy


@pytest.mark.parametrize("name", PUBLISHED)
def test_export_gives_back_the_published_state(name):
    state = published(name)
    exported = export_energy(import_energy(GOLDEN / f"ebm_{name}.pt"))
    assert {key: value.shape for key, value in exported.items()} == {k: v.shape for k, v in state.items()}
    for key, value in state.items():
        assert torch.equal(exported[key], value), key


def test_published_key_lists():
    reference = json.loads((GOLDEN / "letit_vq_ebm_keys.json").read_text())
    for name, entry in reference.items():
        code_dim, multiplier = map(int, re.fullmatch(r"embed(\d+)_cm(\d+)", name).groups())
        with torch.device("meta"):
            energy = build_energy(ConvEnergyConfig(multiplier=multiplier), (2 * code_dim, 64, 64))
        shapes = {key: list(value.shape) for key, value in export_energy(energy).items()}
        assert shapes == entry["state_dict"], name
        assert sum(p.numel() for p in energy.parameters()) == entry["n_params"], name


@pytest.mark.parametrize(
    ("size", "multiplier", "stem", "last"),
    [(8, 1, 64, 64), (16, 32, 512, 512), (64, 32, 1024, 512), (128, 2, 64, 128), (128, 32, 1024, 512)],
)
def test_conv_widths(size, multiplier, stem, last):
    with torch.device("meta"):
        energy = build_energy(ConvEnergyConfig(multiplier=multiplier), (4, size, size))
    assert len(energy.blocks) == math.log2(size) - 2
    assert (len(energy.stem.weight), len(energy.conv2.weight)) == (stem, last)


def test_import_lists_all_problems(tmp_path):
    state = published("conv")
    state["extra.weight"] = torch.zeros(3)
    state["linear.linear.bias"] = torch.zeros(2)
    del state["convs.2.conv1.0.conv.weight_orig"]
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(UserError) as error:
        import_energy(tmp_path / "broken.pt")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "missing convs.2.conv1.0.conv.weight_orig (64, 64, 3, 3)" in lines[0]
    assert "unexpected extra.weight (3,)" in lines[1]
    assert "linear.linear.bias: expected shape (1,), got (2,)" in lines[2]


def test_import_of_other_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        import_energy(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"text\.pt is damaged"):
        import_energy(tmp_path / "text.pt")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"no published energy.*a\.weight"):
        import_energy(tmp_path / "other.pt")
    torch.save({"energy": published("mlp_layer1"), "average": {}}, tmp_path / "two.pt")
    with pytest.raises(UserError, match=r"name the entry that is one as `key`\): .*keys energy, average"):
        import_energy(tmp_path / "two.pt")
    with pytest.raises(UserError, match="no entry 'ema'"):
        import_energy(tmp_path / "two.pt", key="ema")
    assert import_energy(tmp_path / "two.pt", key="energy").config.hidden == 48


def test_export_refuses_gelu():
    with pytest.raises(UserError, match="gelu"):
        export_energy(MLPEnergy(MLPEnergyConfig(latent_shape=(4,), hidden=4, activation="gelu")))


def test_published_energies_see_latents_as_they_are():
    for name in PUBLISHED:
        assert import_energy(GOLDEN / f"ebm_{name}.pt").unit == 1.0
    with pytest.raises(UserError, match=r"this one in units of 0\.5"):
        export_energy(MLPEnergy(MLPEnergyConfig(latent_shape=(4,), hidden=4, latent_unit=0.5)))


# Every kind


def test_config(energy):
    assert type(energy.config) is type(energy).config_class
    assert energy.config.kind in KINDS
    assert parse_kind(ENERGIES, as_tree(energy.config), "here") == energy.config


def test_one_energy_a_sample(energy):
    latents = some(energy)
    values = energy(latents)
    assert values.shape == (3,)
    assert values.std() > 0
    torch.testing.assert_close(energy(latents[1:]), values[1:])


def test_folded_is_the_same_function(energy):
    latents = some(energy)
    assert torch.equal(energy.folded()(latents), energy(latents))


def test_folder_round_trip(energy, tmp_path):
    fingerprint = energy.save_pretrained(tmp_path / "energy", images_seen=96)
    loaded = load_energy(tmp_path / "energy")
    assert type(loaded) is type(energy)
    assert loaded.config == energy.config
    assert loaded.extra == {"images_seen": 96}
    assert loaded.fingerprint() == energy.fingerprint() == fingerprint
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(some(energy)), energy(some(energy)))


def test_folder_of_another_kind(tmp_path):
    MLPEnergy(MLPEnergy.tiny).save_pretrained(tmp_path / "energy")
    with pytest.raises(UserError, match=r"MLPEnergy.*not a ConvEnergy"):
        ConvEnergy.from_pretrained(tmp_path / "energy")


def test_latent_shape_comes_from_the_program():
    with pytest.raises(UserError, match="build_energy"):
        MLPEnergy(MLPEnergyConfig())
    assert build_energy(MLPEnergyConfig(hidden=4), [6, 2]).config.latent_shape == (6, 2)
    with pytest.raises(UserError, match=r"\(16,\).*\(8,\)"):
        build_energy(MLPEnergy.tiny, (8,))


def in_unit(energy, unit):
    """A copy that sees latents in another unit."""
    twin = build_energy(energy.config.model_copy(update={"latent_unit": unit}), energy.latent_shape)
    twin.load_state_dict(energy.state_dict())
    return twin


def test_latents_are_seen_in_their_unit(energy, tmp_path):
    latents, twin = some(energy), in_unit(energy, 2.5)
    assert energy.unit == 1.0 and twin.unit == 2.5
    torch.testing.assert_close(twin(2.5 * latents), energy(latents))
    torch.testing.assert_close(twin.folded()(2.5 * latents), energy(latents))
    assert not torch.allclose(twin(latents), energy(latents))
    assert twin.fingerprint() != energy.fingerprint()
    twin.save_pretrained(tmp_path / "energy")
    assert load_energy(tmp_path / "energy").unit == 2.5


def test_the_unit_may_be_measured(energy):
    auto = energy.config.model_copy(update={"latent_unit": "auto"})
    assert build_energy(auto, energy.latent_shape, measured_unit=0.37).config.latent_unit == 0.37
    # A stated unit is not overruled.
    assert build_energy(energy.config, energy.latent_shape, measured_unit=0.37).unit == 1.0
    assert parse_kind(ENERGIES, as_tree(auto), "here").latent_unit == "auto"
    for build in (lambda: build_energy(auto, energy.latent_shape), lambda: type(energy)(auto)):
        with pytest.raises(UserError, match="latent_unit is not measured yet"):
            build()


@pytest.mark.parametrize("unit", [0, -1.0, "measured", float("nan")])
def test_units_that_make_no_sense(energy, unit):
    with pytest.raises(UserError, match="latent_unit"):
        parse_kind(ENERGIES, {**as_tree(energy.config), "latent_unit": unit}, "here")


@pytest.mark.parametrize("shape", [(512,), (4, 8, 16), (4, 12, 12), (4, 4, 4)])
def test_conv_refuses_other_latents(shape):
    with pytest.raises(UserError, match="power of two"):
        build_energy(ConvEnergyConfig(), shape)


def test_attention_without_effect_is_refused():
    with pytest.raises(UserError, match="no effect"):
        build_energy(ConvEnergyConfig(attention=True), (4, 8, 8))


# The parts


def test_mlp_layers():
    shapes = {0: [(1, 12)], 1: [(5, 12), (1, 5)], 2: [(5, 12), (5, 5), (1, 5)]}
    for layers, expected in shapes.items():
        energy = build_energy(MLPEnergyConfig(layers=layers, hidden=5), (3, 2, 2))
        found = [tuple(p.shape) for p in energy.parameters() if p.ndim == 2]
        assert found == expected
        assert energy(some(energy)).shape == (3,)
    relu, gelu = (build_energy(MLPEnergyConfig(hidden=5, activation=a), (3,)) for a in ("leaky_relu", "gelu"))
    gelu.load_state_dict(relu.state_dict())
    z = some(relu)
    h = F.linear(z, relu.layers[0].weight, relu.layers[0].bias)
    for energy, hidden in ((relu, torch.where(h > 0, h, 0.2 * h)), (gelu, F.gelu(h))):
        torch.testing.assert_close(energy(z), (hidden @ energy.layers[2].weight[0]) + energy.layers[2].bias)


@pytest.mark.parametrize("kernel", [1, 3])
def test_pooled_convolution_is_convolution_then_pooling(kernel):
    torch.manual_seed(0)
    conv = EqualConv2d(3, 5, kernel).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain = F.avg_pool2d(F.conv2d(x, *conv.effective(), padding=kernel // 2), 2)
    pooled = F.conv2d(x, *conv.effective_pooled(), stride=2, padding=kernel // 2)
    torch.testing.assert_close(pooled, plain, rtol=1e-12, atol=1e-12)


def test_equalised_layers_keep_the_scale_of_their_input():
    torch.manual_seed(0)
    conv = EqualConv2d(64, 256, 3)
    assert abs(conv.weight.std().item() - 1) < 0.02
    y = F.conv2d(torch.randn(2, 64, 16, 16), *conv.effective())
    assert abs(y.var().item() - 2) < 0.15  # 2 / fan_in: a rectifier after it would halve this


# The objective


def test_loss_is_eq_2(energy):
    target, translated = some(energy, 4), some(energy, 3, seed=2).requires_grad_()
    loss, metrics = contrastive_loss(energy, target, translated)
    torch.testing.assert_close(loss, energy(target).mean() - energy(translated).mean())
    torch.testing.assert_close(metrics["energy_gap"], energy(translated).mean().detach() - energy(target).mean())
    assert not any(value.requires_grad for value in metrics.values())
    loss.backward()
    assert translated.grad is None


@pytest.mark.parametrize("unit", [1.0, 1.7])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_mlps_closed_form_of_eq_2_is_autograds(layers, activation, unit):
    torch.manual_seed(0)
    config = MLPEnergyConfig(layers=layers, hidden=12, activation=activation, latent_unit=unit)
    energy = build_energy(config, (2, 3)).double()
    target, translated = some(energy, 5, dtype=torch.float64), some(energy, 3, seed=2, dtype=torch.float64)
    expected = energy(target).mean() - energy(translated).mean()
    # Scaled, as by an accumulation of microbatches.
    gradients = torch.autograd.grad(expected / 3, list(energy.parameters()))
    loss, means = energy.contrast(target, translated)
    found = torch.autograd.grad(loss / 3, list(energy.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(means, torch.stack([energy(target).mean(), energy(translated).mean()]).detach())
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_where_eq_2_is_left_to_autograd():
    energy = build_energy(MLPEnergyConfig(hidden=8), (4,))
    target, translated = some(energy), some(energy, seed=2)
    assert energy.contrast(target.clone().requires_grad_(), translated) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert energy.contrast(target, translated) is None
    assert energy.contrast(target, translated) is not None


def test_l2_of_the_energies(energy):
    target, translated = some(energy, 4), some(energy, 3, seed=2)
    plain, _ = contrastive_loss(energy, target, translated)
    loss, metrics = contrastive_loss(energy, target, translated, l2=0.3)
    penalty = energy(target).square().mean() + energy(translated).square().mean()
    torch.testing.assert_close(loss, plain + 0.3 * penalty)
    torch.testing.assert_close(metrics["energy_l2"], penalty.detach())


def test_training_separates_two_domains():
    """A few steps lower the target's energy below the source's, and the chains then arrive."""
    torch.manual_seed(0)
    energy = build_energy(MLPEnergyConfig(hidden=32), (4,))
    source, target = torch.randn(64, 4) - 1, torch.randn(64, 4) + 1
    optimizer = torch.optim.SGD(energy.parameters(), lr=0.05)
    sampler = LangevinSampler(LangevinConfig(steps=10, step_size=1.0))
    for _ in range(30):
        loss, _ = contrastive_loss(energy, target, sampler.sample(energy, source).latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = sampler.sample(energy, source).latents
    assert energy(target).mean() < energy(source).mean()
    assert (moved.mean(0) - target.mean(0)).norm() < 0.5 * (source.mean(0) - target.mean(0)).norm()


# The baseline


def test_mean_shift():
    source, target = torch.randn(50, 3, 4, 4), torch.randn(40, 3, 4, 4) + torch.arange(3).view(3, 1, 1)
    whole = MeanShift.fit(source, target)
    streamed = MeanShift.fit(source.split(7), iter(target.split(9)))
    torch.testing.assert_close(whole.shift, target.mean(0) - source.mean(0))
    torch.testing.assert_close(streamed.shift, whole.shift)
    moved = whole.translate(source)
    torch.testing.assert_close(moved.mean(0), target.mean(0))
    torch.testing.assert_close(whole.translate(source, strength=0.5), (moved + source) / 2)
    channel = MeanShift.fit(source, target, by="channel")
    assert channel.shift.shape == (3, 1, 1)
    torch.testing.assert_close(channel.translate(source).mean((0, 2, 3)), target.mean((0, 2, 3)))


def test_mean_shift_refuses():
    with pytest.raises(UserError, match="no source latents"):
        MeanShift.fit([], torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"\(3,\).*\(4,\)"):
        MeanShift.fit(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="by channel"):
        MeanShift.fit(torch.zeros(2, 3), torch.zeros(2, 3), by="channel")
