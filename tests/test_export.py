"""launch/export.py: published files to folders that the other programs open, and back."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
import export

from letit_dist.autoencoders.base import load_autoencoder
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
    return {f"{key}.{place}": t for key, value in (tree or {}).items() for place, t in tensors(value).items()}


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
    from letit_dist.autoencoders.beta_vae import BetaVAE, BetaVAEConfig

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
