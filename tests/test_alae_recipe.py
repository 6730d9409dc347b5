"""ALAE's three losses against the published numbers; growing; and what each phase may touch."""

import json
from pathlib import Path

import pytest
import torch
from conftest import everything, stats_of, tiny_alae_trainer
from safetensors.torch import load_file

from letit_dist.autoencoders.alae import ALAE, ALAEConfig
from letit_dist.errors import UserError
from letit_dist.interchange.alae import import_alae
from letit_dist.recipes.alae import ALAERecipe, ALAERecipeConfig, Draws, GrowthConfig
from letit_dist.recipes.base import Batch, OptimizerConfig, ParameterGroup
from letit_dist.schemas import TrainingConfig
from letit_dist.training.optim import activate, build_optimizer

GOLDEN = Path(__file__).parent / "golden"
RATE = OptimizerConfig(learning_rate=1e-3, betas=(0.0, 0.99))
LEVEL, BLEND = 3, 0.5  # where the golden losses were taken


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "alae_vectors.safetensors")


@pytest.fixture
def golden() -> ALAERecipe:
    network = import_alae(GOLDEN / "alae_checkpoint.pth").requires_grad_(True)
    return ALAERecipe(ALAERecipeConfig(optimizer=RATE), network, seed=0, precision="fp32").train()


def tiny(seed: int = 3, **changes) -> ALAERecipe:
    torch.manual_seed(0)
    network = ALAE(ALAEConfig(resolution=32, start_channels=4, max_channels=8, latent_dim=8, mapping_layers=2))
    with torch.no_grad():
        for parameter in network.parameters():  # noise weights and biases start as zeros, which would prove nothing
            parameter.add_(0.2 * torch.randn_like(parameter))
    return ALAERecipe(ALAERecipeConfig(**{"optimizer": RATE, **changes}), network, seed=seed, precision="fp32").train()


def batch_of(images: torch.Tensor, images_seen: int = 0, global_batch: int | None = None) -> Batch:
    positions = torch.arange(images_seen, images_seen + len(images))
    return Batch({"images": images}, positions, images_seen, global_batch or len(images))


# ------------------------------------------------------------------------------------------- published numbers


def recorded(numbers, name: str) -> Draws:
    draws = [numbers[key] for key in sorted((k for k in numbers if k.startswith(f"loss.{name}.draw.")), key=_number)]
    if name == "g_mixed":
        return Draws(draws[0], draws[2:], draws[1], int(numbers["loss.g_mixed.cut"]))
    return Draws(draws[0], draws[1:])


def _number(key: str) -> int:
    return int(key.rpartition(".")[2])


def published_names(network: ALAE) -> dict[str, str]:
    """The names of the golden gradients -> ours."""
    top, found = network.top, {"decoder.const": "generator.const"}
    for level in range(network.config.levels):
        theirs, ours = f"encoder.encode_block.{top - level}", f"encoder.blocks.{level}"
        for k in (1, 2):
            found[f"{theirs}.bias_{k}"] = f"{ours}.bias{k}"
            found[f"{theirs}.conv_{k}.weight"] = f"{ours}.conv{k}.weight"
            found[f"decoder.decode_block.{level}.noise_weight_{k}"] = f"generator.blocks.{level}.styled{k}.noise"
            found[f"decoder.decode_block.{level}.bias_{k}"] = f"generator.blocks.{level}.styled{k}.bias"
            found[f"decoder.decode_block.{level}.conv_{k}.weight"] = f"generator.blocks.{level}.conv{k}.weight"
            for part in ("weight", "bias"):
                found[f"{theirs}.style_{k}.{part}"] = f"{ours}.style{k}.{part}"
                style = f"generator.blocks.{level}.styled{k}.style.{part}"
                found[f"decoder.decode_block.{level}.style_{k}.{part}"] = style
        for part in ("weight", "bias"):
            found[f"encoder.from_rgb.{top - level}.from_rgb.{part}"] = f"encoder.from_rgb.{level}.{part}"
            found[f"decoder.to_rgb.{level}.to_rgb.{part}"] = f"generator.to_rgb.{level}.{part}"
    for part in ("weight", "bias"):
        found |= {f"mapping_d.map_blocks.{i}.{part}": f"critic.layers.{i}.{part}" for i in range(3)}
        layers = range(network.config.mapping_layers)
        found |= {f"mapping_f.map_blocks.{i}.fc.{part}": f"mapping.layers.{i}.{part}" for i in layers}
    return found


@pytest.mark.parametrize("name", ["d", "g", "g_mixed", "ae"])
def test_losses_and_gradients_are_the_published_ones(golden, numbers, name):
    draws = recorded(numbers, name)
    if name == "d":
        result = golden.discriminator_step(numbers["loss.image"], draws, LEVEL, BLEND, 10.0)
        torch.testing.assert_close(
            10 / 2 * result.metrics["r1"], numbers["loss.r1.gamma10.value"][0], rtol=1e-5, atol=0
        )
    elif name == "ae":
        result = golden.reciprocity_step(draws, LEVEL, BLEND)
    else:
        result = golden.generator_step(draws, LEVEL, BLEND)
    torch.testing.assert_close(result.loss, numbers[f"loss.{name}.value"][0], rtol=1e-5, atol=0)
    result.loss.backward()

    names = published_names(golden.autoencoder)
    gradients = {key: value.grad for key, value in golden.autoencoder.named_parameters()}
    norms = [key for key in numbers if key.startswith(f"loss.{name}.grad_norm.")]
    assert len(norms) > 30
    for key in norms:
        gradient, expected = gradients[names[key.removeprefix(f"loss.{name}.grad_norm.")]], numbers[key][0]
        if expected < 1e-6:  # zero but for rounding: instance norm cancels the bias after the constant
            assert gradient is None or gradient.norm() < 1e-6
            continue
        torch.testing.assert_close(gradient.norm(), expected, rtol=1e-5, atol=0, msg=lambda m, k=key: f"{k}: {m}")
    for key in (key for key in numbers if key.startswith(f"loss.{name}.grad.")):
        gradient, expected = gradients[names[key.removeprefix(f"loss.{name}.grad.")]], numbers[key]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_mean_of_w_moves_as_published(golden, numbers):
    golden.autoencoder.w_mean.copy_(numbers["loss.d.dlatent_avg_before"])
    golden.generate("discriminator", recorded(numbers, "d"), LEVEL, BLEND)
    golden.after_batch(batch_of(numbers["loss.image"]))
    expected = numbers["loss.d.dlatent_avg_after"]
    assert not torch.equal(expected, numbers["loss.d.dlatent_avg_before"])
    torch.testing.assert_close(golden.autoencoder.w_mean, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_three_steps_of_the_optimiser_are_the_published_ones(numbers):
    """Torch adds eps after the bias correction, the published code before it: gradients of 1e-6 would differ."""
    settings = json.loads((GOLDEN / "alae_vectors.json").read_text())["lreq_adam"]
    parameter = torch.nn.Parameter(numbers["lreq_adam.param0"].clone())
    group = ParameterGroup("only", (parameter,), settings["coef"])
    config = OptimizerConfig(learning_rate=settings["lr"], betas=(0.0, settings["beta_2"]), eps=settings["eps"])
    optimizer = build_optimizer([group], config)
    for step in (1, 2, 3):
        activate(optimizer, {"only"}, settings["lr"])
        parameter.grad = numbers[f"lreq_adam.grad{step}"].clone()
        assert parameter.grad.abs().min() > 1e-6
        optimizer.step()
        moved, expected = (
            value - numbers["lreq_adam.param0"] for value in (parameter, numbers[f"lreq_adam.param{step}"])
        )
        torch.testing.assert_close(parameter.detach(), numbers[f"lreq_adam.param{step}"], rtol=1e-5, atol=0)
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("images_seen", [0, 12, 21, 40, 70])
@pytest.mark.parametrize("phase", ["discriminator", "generator", "reciprocity"])
def test_the_groups_of_a_phase_are_exactly_the_parameters_that_its_loss_reaches(phase, images_seen):
    recipe = tiny(growth=GrowthConfig(images_per_level=(10, 20, 20, 10)))
    level = recipe.level_at(images_seen)
    images = torch.rand(2, 3, 4 << level, 4 << level) * 2 - 1
    recipe.step(phase, batch_of(images, images_seen)).loss.backward()
    phases = {item.name: item for item in recipe.phases}
    active = recipe.active_groups(phases[phase], images_seen)
    groups = recipe.parameter_groups()
    names = {parameter: name for name, parameter in recipe.named_parameters()}
    assert active & {"critic", "mapping"} == set(phases[phase].modules) & {"critic", "mapping"}
    for group in groups:
        network = group.name.partition(".")[0]
        reached = {names[p] for p in group.parameters if p.grad is not None}
        if group.name in active:
            assert reached == {names[p] for p in group.parameters}, group.name
        elif network in phases[phase].modules:
            assert not reached, group.name


def test_every_parameter_is_in_one_group_at_its_equalised_rate():
    recipe = tiny()
    groups = recipe.parameter_groups()
    members = [parameter for group in groups for parameter in group.parameters]
    assert len(members) == len(set(members)) == len(list(recipe.parameters()))
    network = recipe.autoencoder
    rates = {parameter: group.rate for group in groups for parameter in group.parameters}
    assert rates[network.generator.const] == rates[network.encoder.blocks[1].bias1] == 1.0
    assert rates[network.mapping.layers[0].weight] == pytest.approx(0.1 * 2**0.5 / 8**0.5)
    assert rates[network.mapping.layers[0].bias] == 0.1
    assert rates[network.generator.to_rgb[3].weight] == pytest.approx(0.03 / 4**0.5)
    assert rates[network.encoder.blocks[3].conv2.weight] == pytest.approx(2**0.5 / 36**0.5)


def test_a_phase_moves_its_own_networks_and_no_others(fruit_shards, fresh_accelerate, tmp_path):
    trainer = tiny_alae_trainer(tmp_path, fruit_shards)
    recipe = trainer.recipe
    batch = next(trainer.feed.batches(0, 8, 0, 1, 4))
    for phase in recipe.phases:
        before = {name: value.detach().clone() for name, value in recipe.named_parameters()}
        trainer.step(phase, batch, closing=phase is recipe.phases[-1])
        moved = {
            name.split(".")[1] for name, value in recipe.named_parameters() if not torch.equal(before[name], value)
        }
        assert moved == set(phase.modules)


def test_r1_can_be_evaluated_less_often_and_more_strongly():
    images = torch.rand(2, 3, 32, 32)
    often, seldom = tiny(r1_gamma=6.0), tiny(r1_gamma=6.0, r1_every=4)
    first, second = (recipe.step("discriminator", batch_of(images)) for recipe in (often, seldom))
    penalty = first.metrics["r1"]
    torch.testing.assert_close(second.loss - first.loss, penalty / 2 * (24 - 6))
    without = seldom.step("discriminator", batch_of(images, images_seen=2))
    assert "r1" not in without.metrics and "r1" in seldom.step("discriminator", batch_of(images, 8)).metrics
    assert "r1" not in tiny(r1_gamma=0.0).step("discriminator", batch_of(images)).metrics


# ------------------------------------------------------------------------------------------- draws


def test_draws_belong_to_samples_and_batches_and_not_to_how_they_are_spread():
    recipe = tiny(style_mixing=1.0)
    whole = batch_of(torch.zeros(6, 3, 16, 16), images_seen=12)
    parts = whole.split(4)
    one, many = recipe.draws("generator", whole, 2), [recipe.draws("generator", part, 2) for part in parts]
    torch.testing.assert_close(torch.cat([part.z for part in many]), one.z, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([part.z_mixed for part in many]), one.z_mixed, rtol=0, atol=0)
    assert {part.cut for part in many} == {one.cut}
    assert [tuple(n.shape) for n in one.noise] == [
        (1, 1, 4, 4), (6, 1, 4, 4), (6, 1, 8, 8), (6, 1, 8, 8), (6, 1, 16, 16), (6, 1, 16, 16)
    ]  # fmt: skip
    assert torch.equal(many[0].noise[0], many[1].noise[0])
    for index in range(1, 6):
        assert torch.equal(torch.cat([part.noise[index] for part in many]), one.noise[index])
    assert not torch.equal(one.z, recipe.draws("discriminator", whole, 2).z)
    assert not torch.equal(one.z, one.z_mixed)


def test_styles_are_mixed_as_often_and_where_they_should_be():
    recipe = tiny(style_mixing=0.75)
    drawn = [recipe.draws("generator", batch_of(torch.zeros(1, 3, 8, 8), 4 * n, 4), 1) for n in range(400)]
    cuts = [item.cut for item in drawn if item.z_mixed is not None]
    assert 0.68 < len(cuts) / len(drawn) < 0.82
    assert set(cuts) == {1, 2, 3, 4}  # 1 to 2 * (level + 1); the last mixes nothing
    assert min(map(cuts.count, (1, 2, 3, 4))) > 50
    assert all(recipe.draws("reciprocity", batch_of(torch.zeros(1, 3, 8, 8), n), 1).z_mixed is None for n in range(20))


def test_mixing_keeps_w_below_the_cut():
    recipe = tiny()
    network = recipe.autoencoder
    z, other = torch.randn(2, 2, 8)
    noise = [torch.randn(2, *shape) for shape in network.noise_shapes(1)]
    styles = torch.stack([network.mapping(z)] * 3 + [network.mapping(other)], 1)
    expected = network.generate(styles, 1, noise=noise)
    assert torch.equal(recipe.generate("generator", Draws(z, noise, other, 3), 1, 1.0), expected)
    torch.testing.assert_close(
        recipe.generate("generator", Draws(z, noise, other, 4), 1, 1.0),
        network.generate(network.mapping(z), 1, noise=noise),
    )


def test_the_mean_of_w_is_that_of_the_global_batch():
    recipe = tiny(style_mixing=0.0, w_mean_beta=0.75)
    network, batch = recipe.autoencoder, batch_of(torch.zeros(6, 3, 32, 32))
    for part in batch.split(4):
        recipe.step("discriminator", part)
    for part in batch.split(4):
        recipe.step("generator", part)
    recipe.after_batch(batch)
    first, second = (
        network.mapping(recipe.draws(phase, batch, 3).z).mean(0) for phase in ("discriminator", "generator")
    )
    expected = (0.25 * first).lerp(second, 0.25).detach().expand(8, -1)
    torch.testing.assert_close(network.w_mean, expected)
    recipe.step("generator", batch)
    recipe.discard()
    recipe.step("discriminator", batch)
    before = network.w_mean.clone()
    recipe.after_batch(batch)
    torch.testing.assert_close(network.w_mean, before.lerp(first.detach().expand(8, -1), 0.25))


# ------------------------------------------------------------------------------------------- growing


def test_images_fade_in_as_the_network_does():
    recipe = tiny()
    images = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(recipe.faded(images, 1, 1.0), images)
    coarse = images[..., ::2, ::2]
    assert torch.equal(recipe.faded(images, 0, 1.0), coarse)  # a larger image is box-filtered to the level
    blocks = torch.tensor([[2.5, 4.5], [10.5, 12.5]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    fine = recipe.faded(coarse, 0, 1.0)[0, 0]
    torch.testing.assert_close(recipe.faded(fine.expand(1, 3, 4, 4), 0, 0.25)[0, 0], 0.25 * fine + 0.75 * blocks)


def test_a_run_grows_through_its_levels(fruit_shards, fresh_accelerate, tmp_path, capsys):
    trainer = tiny_alae_trainer(tmp_path, fruit_shards, intervals={"report": 4, "samples": 64})
    seen = []
    step = trainer.recipe.step

    def watch(phase, batch):
        seen.append((batch.images_seen, tuple(batch.data["images"].shape)))
        return step(phase, batch)

    trainer.recipe.step = watch
    assert trainer.train() == 0
    shapes = dict(seen)
    assert shapes[16] == (8, 3, 4, 4) and shapes[24] == (8, 3, 8, 8)
    assert shapes[56] == (4, 3, 16, 16) and shapes[92] == (4, 3, 32, 32) and shapes[124] == (4, 3, 32, 32)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("level")] == [
        f"level {level}: {4 << level} pixels, batch: {b} = 1 rank x {b} images x 1 accumulation"
        for level, b in enumerate((8, 8, 4, 4))
    ]
    lines = {line["images_seen"]: line for line in stats_of(tmp_path)}
    assert [lines[at]["level"] for at in (24, 32, 60, 96)] == [0, 1, 2, 3]
    assert [lines[at]["learning_rate"] for at in (24, 32, 60, 96)] == [0.002, 0.002, 0.001, 0.001]
    assert 0 < lines[32]["blend"] < lines[40]["blend"] == 1 or lines[32]["blend"] < lines[40]["blend"]
    assert lines[128]["blend"] == 1
    # All of it has learnt, the last level included.
    start = everything(tiny_alae_trainer(tmp_path / "start", fruit_shards))
    end = everything(trainer)
    still = [name for name in start if name.startswith("model/") and torch.equal(start[name], end[name])]
    assert not still, still


def test_a_new_level_starts_without_optimiser_state(fruit_shards, fresh_accelerate, tmp_path):
    """Also when the run is resumed exactly at the boundary, from the state of the level before."""
    trainer = tiny_alae_trainer(tmp_path, fruit_shards, training={"images": 24}, intervals={"checkpoint": 24})
    trainer.train()
    assert {int(s["step"]) for s in trainer.base_optimizer.state.values()} == {3, 6}
    again = tiny_alae_trainer(tmp_path, fruit_shards, training={"images": 32})
    again.train()
    # One batch: encoder, generator and mapping have stepped twice, the critic once.
    assert {int(s["step"]) for s in again.base_optimizer.state.values()} == {1, 2}


def test_the_microbatch_changes_no_result(fruit_shards, fresh_accelerate, tmp_path):
    double = {"precision": "fp64", "images": 80}  # 39 phase steps over three levels
    one = tiny_alae_trainer(tmp_path / "one", fruit_shards, training=double)
    many = tiny_alae_trainer(tmp_path / "many", fruit_shards, training={**double, "microbatch": (8, 2, 1, 1)})
    assert one.train() == many.train() == 0
    expected = everything(one)
    for name, value in everything(many).items():
        torch.testing.assert_close(value, expected[name], atol=1e-9, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_loss_that_is_not_finite_is_refused_before_any_weight_changes(fruit_shards, fresh_accelerate, tmp_path):
    trainer = tiny_alae_trainer(tmp_path, fruit_shards)
    with torch.no_grad():
        trainer.recipe.autoencoder.encoder.blocks[0].style2.bias[0] = float("nan")
    before = everything(trainer)
    with pytest.raises(
        UserError, match=r"the loss of phase 'discriminator' is not finite at 0 images \(this rank: nan\)"
    ):
        trainer.train()
    after = everything(trainer)
    assert all(torch.equal(before[n], after[n]) or torch.isnan(before[n]).any() for n in before)
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_pictures_show_images_reconstructions_and_samples_at_full_size():
    recipe = tiny(growth=GrowthConfig(images_per_level=10)).eval()
    rows = recipe.samples(batch_of(torch.rand(3, 3, 32, 32), images_seen=12))
    assert {name: tuple(row.shape) for name, row in rows.items()} == {
        name: (3, 3, 32, 32) for name in ("image", "reconstruction", "sample")
    }
    # At 8 pixels every pixel is four by four.
    assert torch.equal(rows["image"], rows["image"][..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert not recipe._w_sums


# ------------------------------------------------------------------------------------------- configurations


def problems(**changes) -> list[str]:
    training = {"images": 10_000, "batch": 8, **changes.pop("training", {})}
    config = ALAERecipeConfig(optimizer=changes.pop("optimizer", RATE), growth=GrowthConfig(**changes))
    return config.problems(ALAEConfig(resolution=64), TrainingConfig(**training))


def test_schedules_that_do_not_fit_the_levels_are_refused_together():
    assert problems(images_per_level=100) == []
    assert problems(images_per_level=(100, 200, 300)) == [
        "recipe.growth.images_per_level: 3 values, but the network grows over 5 levels: give 5, or a single one for all"
    ]
    rates = OptimizerConfig(learning_rate=(1e-3, 2e-3), betas=(0.0, 0.99))
    found = problems(images_per_level=3000, optimizer=rates, training={"batch": (8, 8, 8, 4)})
    assert [line.partition(":")[0] for line in found] == [
        "training.batch", "recipe.optimizer.learning_rate", "training.images"
    ]  # fmt: skip
    assert found[2].startswith(
        "training.images: 10000 end at level 3 (32 pixels), the network is grown to 64 pixels after 13500"
    )


def test_a_recipe_wants_its_own_network():
    from letit_dist.autoencoders.vqvae2 import VQVAE2, VQVAE2Config

    config = VQVAE2Config(resolution=16, channels=8, residual_channels=4, code_dim=4, codes=16)
    message = "recipe.kind: alae trains an ALAE, autoencoder.kind is 'vqvae2'"
    with pytest.raises(UserError, match=message):
        ALAERecipe(ALAERecipeConfig(optimizer=RATE), VQVAE2(config), seed=0, precision="fp32")
    assert ALAERecipeConfig(optimizer=RATE).problems(config, TrainingConfig(images=1, batch=1)) == [message]
    with pytest.raises(ValueError, match="r1_every has no effect with r1_gamma 0"):
        ALAERecipeConfig(optimizer=RATE, r1_gamma=0, r1_every=2)
