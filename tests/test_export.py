"""launch/export.py: published files to folders that the other programs open, and back."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
import export

from letit_dist.autoencoders.base import build_autoencoder, load_autoencoder
from letit_dist.autoencoders.beta_vae import BetaVAE, BetaVAEConfig
from letit_dist.autoencoders.vqvae2 import VQVAE2
from letit_dist.energy.models import load_energy
from letit_dist.energy.translate import open_translator

GOLDEN = Path(__file__).parent / "golden"
FILES = {
    "alae": ("alae_checkpoint.pth", []),
    "vqvae2": ("vqvae2_letit_checkpoint.pt", ["--resolution", "64", "--variant", "letit"]),
    "beta_vae": ("betavae_checkpoint.pt", ["--variant", "letit"]),
}


AT = ("--resolution", 64)


def run(*arguments):
    return export.main([str(argument) for argument in arguments])


def tensors(tree):
    """Every tensor of a nested file by its place."""
    if isinstance(tree, torch.Tensor):
        return {"": tree}
    parts = tree.items() if isinstance(tree, dict) else ()
    return {f"{key}.{place}": t for key, value in parts for place, t in tensors(value).items()}


@pytest.mark.parametrize("kind", FILES)
def test_there_and_back(tmp_path, capsys, kind):
    name, options = FILES[kind]
    assert run("--from", kind, GOLDEN / name, *options, "--out", tmp_path / "folder") == 0
    model = load_autoencoder(tmp_path / "folder")
    assert f"autoencoder {model.fingerprint()}, latents {model.latent_shape}" in capsys.readouterr().out
    assert run("--to", kind, tmp_path / "folder", "--out", tmp_path / "back.pth") == 0
    again = [*options] if kind != "alae" else []
    assert run("--from", kind, tmp_path / "back.pth", *again, "--out", tmp_path / "again") == 0
    assert load_autoencoder(tmp_path / "again").fingerprint() == model.fingerprint()


def test_the_two_sets_of_weights_of_alae_are_asked_for(tmp_path):
    for weights in ("average", "training"):
        out = tmp_path / weights
        assert run("--from", "alae", GOLDEN / "alae_checkpoint.pth", "--weights", weights, "--out", out) == 0


def test_an_energy_comes_with_its_chain_and_its_autoencoder(tmp_path):
    published = torch.load(GOLDEN / "ebm_mlp_layer1.pt", weights_only=True)
    torch.manual_seed(0)
    autoencoder = BetaVAE(BetaVAEConfig(latent_dim=published["mlp.0.weight"].shape[1]))
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    given = ("--from", "energy", GOLDEN / "ebm_mlp_layer1.pt", "--autoencoder", tmp_path / "autoencoder")
    chain = ("--steps", 3, "--step-size", 2, "--source", "a", "--target", "b")
    assert run(*given, *chain, "--out", tmp_path / "energy") == 0
    translator = open_translator(tmp_path / "energy", tmp_path / "autoencoder")
    assert translator.sampler.config.steps == 3 and translator.sampler.config.step_size == 2.0
    assert translator.energy.extra["target"] == "b"
    latents = torch.randn(2, *autoencoder.latent_shape)
    x = torch.nn.functional.linear(latents, published["mlp.0.weight"], published["mlp.0.bias"])
    x = torch.nn.functional.leaky_relu(x, 0.2)
    x = torch.nn.functional.linear(x, published["mlp.2.weight"], published["mlp.2.bias"])
    torch.testing.assert_close(translator.energy(latents), -x.squeeze(1))
    assert run("--to", "energy", tmp_path / "energy", "--out", tmp_path / "back.pt") == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in published.items())
    assert load_energy(tmp_path / "energy").fingerprint() == translator.energy.fingerprint()


def test_vqvae2_is_rosinalitys_by_default(tmp_path):
    file, numbers = (
        GOLDEN / "vqvae2_rosinality_checkpoint.pt",
        load_file(GOLDEN / "vqvae2_rosinality_vectors.safetensors"),
    )
    assert run("--from", "vqvae2", file, "--resolution", 64, "--out", tmp_path / "folder") == 0
    model = load_autoencoder(tmp_path / "folder")
    # The encoder's golden numbers are those of codebooks that have learnt on; LETIT's decoder gives another picture.
    torch.testing.assert_close(model.decode(numbers["eval.latent"]), numbers["eval.decode"], rtol=1e-4, atol=1e-5)
    assert run("--to", "vqvae2", tmp_path / "folder", "--out", tmp_path / "back.pt") == 0
    same_tensors(tmp_path / "back.pt", file)


def test_beta_vae_is_1konnys_by_default(tmp_path):
    """BetaVAE_H takes images in [0, 1] and gives logits of such."""
    file, numbers = GOLDEN / "betavae_checkpoint.pt", load_file(GOLDEN / "betavae_vectors.safetensors")
    assert run("--from", "beta_vae", file, "--out", tmp_path / "folder") == 0
    model = load_autoencoder(tmp_path / "folder")
    torch.testing.assert_close(model.encode(2 * numbers["image"] - 1), numbers["mu"], rtol=1e-4, atol=1e-5)
    expected = 2 * numbers["decode_mu"].sigmoid() - 1
    torch.testing.assert_close(model.decode(numbers["mu"]), expected, rtol=1e-4, atol=1e-5)
    assert run("--to", "beta_vae", tmp_path / "folder", "--out", tmp_path / "back.pt") == 0
    same_tensors(tmp_path / "back.pt", file)


def same_tensors(found, wanted):
    """Two published files hold the same tensors under the same names, one perhaps more than its weights."""
    ours, theirs = (tensors(torch.load(path, weights_only=True)) for path in (found, wanted))
    assert ours and ours.keys() <= theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", ["mlp_layer0", "mlp_layer1", "mlp_layer2", "conv", "conv_attention"])
def test_every_published_energy_there_and_back(tmp_path, name):
    file, numbers = GOLDEN / f"ebm_{name}.pt", load_file(GOLDEN / f"ebm_{name}_vectors.safetensors")
    shape = tuple(numbers["source"].shape[1:])
    if len(shape) == 1:
        config = BetaVAEConfig(latent_dim=shape[0])
    else:
        config = VQVAE2.tiny.model_copy(update={"resolution": 4 * shape[1], "code_dim": shape[0] // 2})
    autoencoder = build_autoencoder(config)
    assert autoencoder.latent_shape == shape
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    given = ("--from", "energy", file, "--autoencoder", tmp_path / "autoencoder", "--steps", 2, "--step-size", 1)
    assert run(*given, "--out", tmp_path / "energy") == 0
    energy = open_translator(tmp_path / "energy", tmp_path / "autoencoder").energy
    # Theirs return -E.
    torch.testing.assert_close(energy(numbers["target"]), -numbers["f_target"].squeeze(1), rtol=1e-4, atol=1e-5)
    assert run("--to", "energy", tmp_path / "energy", "--out", tmp_path / "back.pt") == 0
    same_tensors(tmp_path / "back.pt", file)
    assert len(torch.load(tmp_path / "back.pt", weights_only=True)) == len(torch.load(file, weights_only=True))


def test_pixels_as_latents(tmp_path):
    assert run("--from", "identity", "--resolution", 16, "--out", tmp_path / "pixels") == 0
    model = load_autoencoder(tmp_path / "pixels")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model.decode(model.encode(images)), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "vqvae2", "x.pt"), "--from vqvae2 needs --resolution"),
        (("--from", "alae"), "--from alae needs the path to read"),
        (("--from", "alae", "x.pt", "--key", "a"), "--key has no effect with --from alae: leave it out"),
        (("--from", "identity", "x", "--resolution", "8"), "--from identity reads no file: leave it out"),
        (("--to", "alae", "x", "--weights", "average"), "--weights has no effect with --to alae"),
        (("--from", "energy", "x.pt", "--steps", "3"), "--from energy needs --step-size"),
        (("--from", "beta_vae", "nowhere.pt"), "no such file: nowhere.pt, expected a file of torch.save"),
        (("--from", "taesd", "taef2", *AT), "no such file: taef2, expected a folder with one file called *encoder*"),
        (("--from", "diffusers", "sd/vae", *AT), "no such folder: sd/vae, expected a folder with config.json"),
        (
            ("--from", "diffusers", "sd/vae", *AT),
            "fetch it from the Hub: run `hf download sd/vae --local-dir models/vae`",
        ),
        (
            ("--from", "energy", "x.pt", "--steps", 1, "--step-size", 1, "--autoencoder", "a"),
            "no such file: x.pt, expected a .pt file of torch.save with the energy's",
        ),
        (("--from", "beta_vae", GOLDEN / "betavae_checkpoint.pt", "--variant", "x"), "unknown variant 'x'"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    assert run(*arguments, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    assert run("--from", "identity", "--resolution", 16, "--out", tmp_path) == 2
    assert "exists: name another" in capsys.readouterr().err


def test_a_folder_of_another_kind(tmp_path, capsys):
    assert run("--from", "identity", "--resolution", 16, "--out", tmp_path / "pixels") == 0
    assert run("--to", "alae", tmp_path / "pixels", "--out", tmp_path / "x.pth") == 2
    assert "holds an autoencoder of kind identity, not alae" in capsys.readouterr().err
