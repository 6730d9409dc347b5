"""beta-VAE against numbers of the published implementation; its files; its recipe."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from letit_dist.autoencoders.beta_vae import BetaVAE, BetaVAEConfig
from letit_dist.errors import UserError
from letit_dist.interchange.beta_vae import export_beta_vae, import_beta_vae
from letit_dist.recipes.base import Batch, OptimizerConfig
from letit_dist.recipes.beta_vae import BetaVAERecipe, BetaVAERecipeConfig
from letit_dist.schemas import TrainingConfig

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "betavae_checkpoint.pt"
RATE = OptimizerConfig(learning_rate=1e-4)


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "betavae_vectors.safetensors")


@pytest.fixture(scope="module")
def golden() -> BetaVAE:
    """The published weights. The golden numbers show the encoder images in [-1, 1], and compare in [0, 1]."""
    model = BetaVAE(BetaVAEConfig(inputs="signed", output="sigmoid"))
    model.load_state_dict(import_beta_vae(CHECKPOINT).state_dict())
    return model.eval()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_encoding_and_decoding_are_the_published_ones(golden, numbers):
    mean, log_variance = golden.posterior(numbers["image"])
    close(mean, numbers["mu"])
    close(log_variance, numbers["logvar"])
    close(golden.encode(numbers["image"]), numbers["mu"])
    close(golden.decode(numbers["mu"]), 2 * torch.sigmoid(numbers["decode_mu"]) - 1)
    linear = BetaVAE(BetaVAEConfig(output="linear"))
    linear.load_state_dict(golden.state_dict())
    close(linear.decode(numbers["mu"]), numbers["decode_mu"])


def test_the_loss_is_the_published_one(golden, numbers):
    recipe = BetaVAERecipe(BetaVAERecipeConfig(optimizer=RATE), golden, seed=0, precision="fp32")
    result = recipe.loss(numbers["image"], numbers["eps"])
    close(result.loss, numbers["beta10_loss"][0])
    close(result.metrics["squared_error"], numbers["gaussian_reconstruction"][0])
    close(result.metrics["divergence"], numbers["kl"][0])


def test_the_linear_variant_compares_images_as_they_are(numbers):
    torch.manual_seed(0)
    model = BetaVAE(BetaVAEConfig(output="linear", latent_dim=4))
    recipe = BetaVAERecipe(BetaVAERecipeConfig(optimizer=RATE, beta=3.0), model, seed=0, precision="fp32")
    eps = torch.randn(2, 4)
    result = recipe.loss(numbers["image"], eps)
    mean, log_variance = model.posterior(numbers["image"])
    error = (model.decode(mean + torch.exp(0.5 * log_variance) * eps) - numbers["image"]).square().sum() / 2
    close(result.metrics["squared_error"], error.detach())
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 2
    close(result.metrics["divergence"], divergence.detach())
    close(result.loss, error + 3 * divergence)


def test_draws_belong_to_samples():
    torch.manual_seed(0)
    model = BetaVAE(BetaVAEConfig(latent_dim=4))
    recipe = BetaVAERecipe(BetaVAERecipeConfig(optimizer=RATE), model, seed=5, precision="fp32")
    batch = Batch({"images": torch.rand(6, 3, 64, 64) * 2 - 1}, torch.arange(12, 18), 12, 6)
    whole = recipe.step("reconstruct", batch).loss
    parts = [recipe.step("reconstruct", part).loss * part.size / 6 for part in batch.split(2)]
    torch.testing.assert_close(sum(parts), whole)
    rows = recipe.samples(batch)
    assert list(rows) == ["image", "reconstruction", "sample"] and rows["sample"].shape == (6, 3, 64, 64)


def test_the_start_is_kaimings_but_for_transposed_convolutions():
    torch.manual_seed(0)
    model = BetaVAE(BetaVAEConfig())
    assert float(model.encoder[8].weight.detach().std()) == pytest.approx((2 / (64 * 16)) ** 0.5, rel=0.02)
    assert float(model.encoder[11].weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert model.encoder[8].bias.abs().max() == 0 < model.decoder[3].bias.abs().max()
    assert float(model.decoder[3].weight.detach().std()) == pytest.approx((1 / (3 * 64 * 16)) ** 0.5, rel=0.02)


def test_a_published_checkpoint_makes_a_round_trip(tmp_path):
    model = import_beta_vae(CHECKPOINT)
    assert (model.config.inputs, model.config.output, model.config.latent_dim) == ("unit", "sigmoid", 32)
    letit = import_beta_vae(CHECKPOINT, variant="letit")
    assert (letit.config.inputs, letit.config.output) == ("signed", "linear")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.encode(2 * images - 1), letit.encode(images))
    torch.save(export_beta_vae(model), tmp_path / "again.pt")
    again = import_beta_vae(tmp_path / "again.pt")
    assert again.fingerprint() == model.fingerprint()
    assert not any(parameter.requires_grad for parameter in again.parameters()) and not again.training
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert import_beta_vae(tmp_path / "bare.pt").fingerprint() == model.fingerprint()
    keys = json.loads((GOLDEN / "betavae_h32_keys.json").read_text())["state_dict"]
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == {
        name: entry["shape"] for name, entry in keys.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.pop("encoder.2.bias"), "encoder.2.bias"),
        (lambda net: net.update(extra=torch.zeros(1)), "extra"),
        (lambda net: net.update({"encoder.0.weight": torch.zeros(3, 3, 4, 4)}), "encoder.0.weight"),
        (lambda net: net.pop("decoder.0.weight"), "not a published beta-VAE: no decoder.0.weight"),
    ],
)
def test_other_keys_are_named(tmp_path, change, message):
    net = dict(import_beta_vae(CHECKPOINT).state_dict())
    change(net)
    torch.save({"model_states": {"net": net}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=message):
        import_beta_vae(tmp_path / "bad.pt")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown variant 'other'"):
        import_beta_vae(CHECKPOINT, variant="other")
    with pytest.raises(UserError, match="no such file"):
        import_beta_vae(tmp_path / "none.pt")
    torch.save({"model_states": {}}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="expected a state dict, found a NoneType"):
        import_beta_vae(tmp_path / "empty.pt")


def test_a_recipe_wants_its_own_network():
    from letit_dist.autoencoders.alae import ALAE

    config = BetaVAERecipeConfig(optimizer=RATE)
    message = "recipe.kind: beta_vae trains a beta_vae, autoencoder.kind is 'alae'"
    with pytest.raises(UserError, match=message):
        BetaVAERecipe(config, ALAE(ALAE.tiny), seed=0, precision="fp32")
    assert config.problems(ALAE.tiny, TrainingConfig(images=1, batch=1)) == [message]
    with pytest.raises(UserError, match=r"expected images of shape \(B, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        BetaVAE(BetaVAE.tiny).encode(torch.zeros(1, 3, 32, 32))
