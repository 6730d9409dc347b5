import json

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_autoencoder
from pydantic import ValidationError

from letit_dist import rng
from letit_dist.autoencoders.quantize import BatchPlace
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy, load_energy
from letit_dist.energy.objective import contrastive_loss
from letit_dist.errors import UserError
from letit_dist.recipes.base import Batch, OptimizerConfig
from letit_dist.recipes.latent_energy import LatentEnergyConfig, LatentEnergyRecipe
from letit_dist.recipes.vqvae2 import VQVAE2Recipe, VQVAE2RecipeConfig

RATE = OptimizerConfig(learning_rate=1e-3)


# ------------------------------------------------------------------------------------------- vqvae2


def vqvae2(precision="fp32", model=None, **changes):
    model = tiny_autoencoder(noise=True) if model is None else model
    return VQVAE2Recipe(VQVAE2RecipeConfig(optimizer=RATE, **changes), model, seed=5, precision=precision).train()


def image_batch(count=4, start=40):
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch({"images": images}, torch.arange(start, start + count), start, count)


def louder(model):
    """Layer noise starts at weight 0, where it would prove nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "noise" in name:
                parameter.fill_(0.5)
    return model


def test_the_loss_is_reconstruction_and_both_commitments_with_noise_that_belongs_to_the_sample():
    model, batch = louder(tiny_autoencoder(noise=True)), image_batch()
    result = vqvae2(model=model, commitment=0.7, input_noise=0.3)("reconstruct", batch)
    model.discard_statistics()

    images, where = batch.data["images"], batch.positions
    noisy = images + 0.3 * rng.normal((3, 32, 32), 5, "input noise", where)
    shapes = model.noise_shapes()
    layers = [rng.normal(shape, 5, f"layer noise {i}", where) for i, shape in enumerate(shapes)]
    output = model.forward_training(noisy, noise=layers, place=BatchPlace(5, torch.arange(4), 4))
    # The target is the clean image.
    reconstruction = F.mse_loss(output.reconstruction, images)
    assert len(shapes) == 3 and result.metrics["mse"] == reconstruction
    commitments = output.commitment_top + output.commitment_bottom
    torch.testing.assert_close(result.loss, reconstruction + 0.7 * commitments)
    assert result.metrics["commitment_top"] == output.commitment_top
    assert result.metrics["commitment_bottom"] == output.commitment_bottom
    assert result.loss.requires_grad and not any(value.requires_grad for value in result.metrics.values())


def test_the_statistics_of_a_batch_are_collected_moved_and_discarded():
    recipe = vqvae2()
    before = recipe.autoencoder.top_quantizer.embed.clone()
    recipe("reconstruct", image_batch())
    recipe.discard()
    assert recipe.after_batch(image_batch())["usage_top"] == 0
    recipe("reconstruct", image_batch())
    metrics = recipe.after_batch(image_batch())
    assert sorted(metrics) == [
        f"{n}_{level}" for n in ("perplexity", "restarted", "usage") for level in ("bottom", "top")
    ]
    assert metrics["usage_top"] > 0 and metrics["perplexity_bottom"] >= 1
    assert not torch.equal(recipe.autoencoder.top_quantizer.embed, before)


def test_restarts_take_the_same_rows_in_every_division():
    def codebook(size):
        recipe = vqvae2(model=tiny_autoencoder(restart_below=5.0, restart_every=1).double())
        for part in image_batch().to(torch.device("cpu"), torch.float64, torch.contiguous_format).split(size):
            recipe("reconstruct", part)
        metrics = recipe.after_batch(image_batch())
        return metrics["restarted_top"], recipe.autoencoder.top_quantizer.embed

    (restarted, whole), (_, parts) = codebook(4), codebook(1)
    assert restarted > 0
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)


def test_bf16_lowers_the_networks_and_not_the_loss():
    recipe, batch = vqvae2(precision="bf16"), image_batch()
    seen = []
    recipe.autoencoder.decoder.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = recipe("reconstruct", batch)
    assert seen == [torch.bfloat16] and result.loss.dtype == torch.float32
    vqvae2(model=recipe.autoencoder)("reconstruct", batch)
    assert seen[1:] == [torch.float32]
    recipe.config.optimizer.rate_at(0)
    assert all(parameter.dtype == torch.float32 for parameter in recipe.parameters())


def test_the_perceptual_term_is_weighed_and_its_network_stays_outside(tmp_path):
    pytest.importorskip("lpips")
    import torchvision

    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.pth")
    perceptual = {"weight": 3.0, "network": "squeeze", "backbone": str(tmp_path / "squeeze.pth")}
    plain, recipe = vqvae2(), vqvae2(perceptual=perceptual)
    results = [r("reconstruct", image_batch()) for r in (plain, recipe)]
    assert results[1].metrics["lpips"] > 0
    torch.testing.assert_close(results[1].loss, results[0].loss + 3 * results[1].metrics["lpips"])
    assert sorted(recipe.state_dict()) == sorted(plain.state_dict())
    assert len(list(recipe.parameters())) == len(list(plain.parameters())) and len(recipe.companions) == 1


def test_pictures_are_the_images_and_what_becomes_of_them():
    recipe = vqvae2().eval()
    rows = recipe.samples(image_batch())
    assert list(rows) == ["image", "reconstruction"]
    model = recipe.autoencoder
    expected = model.decode(model.encode(image_batch().data["images"]))
    assert torch.equal(rows["reconstruction"], expected) and not rows["reconstruction"].requires_grad


def test_only_its_own_kind_is_trained():
    energy = build_energy(MLPEnergyConfig(hidden=4), (4,))
    energy.config = tiny_autoencoder().config.model_copy(update={"kind": "other"})
    with pytest.raises(UserError, match=r"recipe.kind: vqvae2 trains a VQVAE2, autoencoder.kind is 'other'"):
        VQVAE2Recipe(VQVAE2RecipeConfig(optimizer=RATE), energy, seed=0, precision="fp32")


# ------------------------------------------------------------------------------------------- latent_energy


def latent_energy(autoencoder=None, **changes):
    autoencoder = autoencoder or tiny_autoencoder()
    langevin = LangevinConfig(steps=3, step_size=0.5, noise_scale=0.2)
    torch.manual_seed(3)
    energy = build_energy(MLPEnergyConfig(hidden=8), autoencoder.latent_shape)
    config = LatentEnergyConfig(**{"optimizer": RATE, "langevin": langevin, **changes})
    shift = MeanShift(torch.full((8, 8, 8), 0.25))
    return LatentEnergyRecipe(config, energy, autoencoder, {("a", "b"): shift}, seed=9, precision="fp32")


def code_batch(count=4, start=40):
    draws = torch.Generator().manual_seed(1)
    data = {
        f"{side}.{name}": torch.randint(0, 16, (count, size, size), generator=draws)
        for side in ("source", "target")
        for name, size in (("top", 4), ("bottom", 8))
    }
    return Batch(data, torch.arange(start, start + count), start, count)


def test_latents_come_from_codes_or_as_they_are():
    recipe, batch = latent_energy(), code_batch()
    codes = {name: batch.data[f"target.{name}"] for name in ("top", "bottom")}
    latents = recipe.latents(batch, "target")
    assert torch.equal(latents, recipe.autoencoder.latents_from_codes(codes)) and not latents.requires_grad
    stored = Batch({"source.latent": latents, "target.latent": latents + 1}, batch.positions, 40, 4)
    assert torch.equal(recipe.latents(stored, "source"), latents)


def test_the_energy_learns_from_targets_and_detached_chains():
    recipe, batch = latent_energy(l2=0.1), code_batch()
    result = recipe("energy", batch)
    source, target = (recipe.latents(batch, side) for side in ("source", "target"))

    def noise(step):
        return rng.normal((8, 8, 8), 9, f"langevin {step}", batch.positions)

    moved = LangevinSampler(recipe.config.langevin).sample(recipe.energy, source, noise=noise).latents
    loss, metrics = contrastive_loss(recipe.energy, target, moved, l2=0.1)
    torch.testing.assert_close(result.loss, loss)
    assert set(result.metrics) == {*metrics, "moved"}
    expected = (moved - source).flatten(1).square().mean(1).sqrt().mean()
    torch.testing.assert_close(result.metrics["moved"], expected)
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in recipe.energy.parameters())
    assert all(parameter.grad is None for parameter in recipe.autoencoder.parameters())


def test_a_sample_is_moved_alike_in_every_batch_it_could_be_in():
    recipe, batch = latent_energy(), code_batch()
    whole = recipe.transport(recipe.latents(batch, "source"), batch).latents
    for part, rows in zip(batch.split(1), whole.split(1), strict=True):
        torch.testing.assert_close(recipe.transport(recipe.latents(part, "source"), part).latents, rows)


def test_pictures_show_both_sides_and_both_ways_between():
    recipe, batch = latent_energy(), code_batch()
    rows = recipe.samples(batch)
    assert list(rows) == ["reconstruction", "mean shift", "latent energy", "target reconstructed"]
    source = recipe.latents(batch, "source")
    assert torch.equal(rows["mean shift"], recipe.autoencoder.decode(source + 0.25))
    assert torch.equal(rows["latent energy"], recipe.autoencoder.decode(recipe.transport(source, batch).latents))
    assert not any(images.requires_grad for images in rows.values())


def test_methods_are_compared_without_noise():
    recipe = latent_energy()
    (direction,), latents = recipe.directions(), torch.randn(2, 8, 8, 8)
    methods = direction.methods
    assert direction.pair == ("a", "b") and direction.energy is recipe.energy
    assert torch.equal(methods["source"](latents), latents)
    assert torch.equal(methods["mean shift"](latents), latents + 0.25)
    plain = LangevinSampler(LangevinConfig(steps=3, step_size=0.5))
    assert torch.equal(methods["latent energy"](latents), plain.sample(recipe.energy, latents).latents)


def test_the_energy_is_saved_with_its_chain_and_its_autoencoder(tmp_path):
    recipe = latent_energy()
    recipe.save(tmp_path / "out", images_seen=7, autoencoder_fingerprint="abc", source="a", target="b")
    energy = load_energy(tmp_path / "out")
    assert energy.fingerprint() == recipe.energy.fingerprint()
    assert energy.extra == {
        "autoencoder_fingerprint": "abc",
        "langevin": {"steps": 3, "step_size": 0.5, "noise_scale": 0.2},
        "images_seen": 7,
        "source": "a",
        "target": "b",
    }
    assert json.loads((tmp_path / "out/config.json").read_text())["kind"] == "mlp"


def test_the_autoencoder_neither_learns_nor_is_saved():
    recipe = latent_energy()
    assert all(name.startswith("energy.") for name in recipe.state_dict())
    recipe.train()
    assert not recipe.autoencoder.training
    assert not any(parameter.requires_grad for parameter in recipe.autoencoder.parameters())
    assert recipe.loss_limit == recipe.config.loss_limit == 1e4


@pytest.mark.parametrize("change", [{"loss_limit": 0}, {"l2": -1}, {"steps": 3}], ids=str)
def test_settings_that_cannot_be_meant_are_refused(change):
    with pytest.raises(ValidationError):
        LatentEnergyConfig(optimizer=RATE, langevin=LangevinConfig(steps=1, step_size=1.0), **change)
