"""Models of diffusers as ours: their folders, their scaling, their tiles."""

import sys

import pytest
import torch
from foreign_autoencoders import error_of, images
from programs import run
from safetensors.torch import load_file, save_file

from letit_dist.autoencoders.base import build_autoencoder, load_autoencoder
from letit_dist.interchange.taesd import import_taesd

DIFFUSERS = {
    "AutoencoderKL": {
        "block_out_channels": [4, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "norm_num_groups": 2,
        "latent_channels": 3,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": [4, 8, 8],
        "decoder_block_out_channels": [4, 8, 8],
        "encoder_layers_per_block": [1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1],
        "encoder_qkv_multiscales": [[], [], []],
        "decoder_qkv_multiscales": [[], [], []],
        "latent_channels": 8,
    },
    "AutoencoderTiny": {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4},
    "VQModel": {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "vq_embed_dim": 5,
        "num_vq_embeddings": 7,
    },
}


@pytest.fixture(params=DIFFUSERS)
def theirs(request, tmp_path):
    """(a model of diffusers with random weights, the folder that diffusers saves it to)."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = getattr(diffusers, request.param)(**DIFFUSERS[request.param]).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


@torch.no_grad()
def test_a_model_of_diffusers_as_ours(theirs, tmp_path):
    from letit_dist.interchange.diffusers_models import import_diffusers

    model, folder = theirs
    ours = import_diffusers(folder, resolution=32)
    x = images(32)
    found = model.encode(x)
    name, factor = type(model).__name__, model.config.get("scaling_factor")
    if name == "AutoencoderKL":
        raw = found.latent_dist.mode()
    elif name == "AutoencoderDC":
        raw = found.latent
    else:
        raw = found.latents
    if name == "VQModel":
        # Encoding snaps to the codebook, as diffusers' decoder would.
        torch.testing.assert_close(ours.encode(x) / factor, model.quantize(raw)[0])
        # Decoding does not: a chain that has moved a little is seen.
        latents = ours.encode(x)
        assert not torch.equal(ours.decode(latents + 1e-3), ours.decode(latents))
    else:
        torch.testing.assert_close(ours.encode(x) / factor, raw)
    torch.testing.assert_close(ours.decode(ours.encode(x)), model.decode(raw).sample)
    assert ours.latent_shape == tuple(ours.encode(x).shape[1:])
    ours.save_pretrained(tmp_path / "ours")
    back = load_autoencoder(tmp_path / "ours")
    assert back.fingerprint() == ours.fingerprint()
    assert torch.equal(back.decode(back.encode(x)), ours.decode(ours.encode(x)))
    assert import_diffusers(folder, resolution=64, tile=32).encode(images(64)).shape[1:] == (
        ours.latent_shape[0],
        *(2 * side for side in ours.latent_shape[1:]),
    )


@torch.no_grad()
def test_means_and_deviations_of_latents_are_taken_over(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from letit_dist.interchange.diffusers_models import import_diffusers

    settings = {**DIFFUSERS["AutoencoderKL"], "latents_mean": [1.0, 2.0, 3.0], "latents_std": [0.5, 1.0, 2.0]}
    model = diffusers.AutoencoderKL(**settings, scaling_factor=0.5).eval()
    model.save_pretrained(tmp_path / "pipeline" / "vae", safe_serialization=False)
    ours, x = import_diffusers(tmp_path / "pipeline", resolution=16), images(16)
    mean, spread = (torch.tensor(settings[k]).view(1, 3, 1, 1) for k in ("latents_mean", "latents_std"))
    torch.testing.assert_close(ours.encode(x), (model.encode(x).latent_dist.mode() - mean) * 0.5 / spread)
    diffusers.AutoencoderKL(**DIFFUSERS["AutoencoderKL"], scaling_factor=0.5, shift_factor=0.25).save_pretrained(
        tmp_path / "flux"
    )
    found = import_diffusers(tmp_path / "flux", resolution=16).config
    assert (found.scale, found.shift) == ((0.5,), (0.25,))
    given = import_diffusers(tmp_path / "flux", resolution=16, scale=[3.0], shift=[0.0]).config
    assert (given.scale, given.shift) == ((3.0,), (0.0,))


def test_a_tiny_autoencoder_saved_by_diffusers_is_one_of_the_family(tmp_path):
    """Their file, read without their library: the same images."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(**DIFFUSERS["AutoencoderTiny"]).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "theirs")
    ours, x = import_taesd(tmp_path / "theirs/diffusion_pytorch_model.safetensors", resolution=32), images(32)
    torch.testing.assert_close(ours.encode(x), model.encode(x).latents)
    torch.testing.assert_close(ours.decode(ours.encode(x)), model.decode(model.encode(x).latents).sample)


def test_folders_of_diffusers_that_cannot_be_read(theirs, tmp_path):
    import json

    from letit_dist.interchange.diffusers_models import import_diffusers

    _, folder = theirs
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps({**tree, "_class_name": "UNet2DModel"}))
    assert "its class is UNet2DModel, known here are AutoencoderKL" in error_of(import_diffusers, folder, resolution=32)
    config.write_text(json.dumps({**tree, "colour": 3}))
    assert "has no colour" in error_of(import_diffusers, folder, resolution=32)
    config.write_text(json.dumps(tree))
    assert "resolution 33 is no multiple of" in error_of(import_diffusers, folder, resolution=33)
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file({**tensors, "stray": torch.zeros(1)}, weights)
    assert "unexpected network.stray (1,)" in error_of(import_diffusers, folder, resolution=32)
    save_file({k: v for k, v in tensors.items() if k != first}, weights)
    assert f"missing network.{first}" in error_of(import_diffusers, folder, resolution=32)
    weights.unlink()
    assert "no diffusion_pytorch_model.safetensors" in error_of(import_diffusers, folder, resolution=32)
    config.unlink()
    assert "no config.json in it" in error_of(import_diffusers, folder, resolution=32)
    assert "no such folder" in error_of(import_diffusers, tmp_path / "nowhere", resolution=32)


def test_without_diffusers_one_line_says_what_to_install(monkeypatch):
    from letit_dist.autoencoders.diffusers_models import DiffusersAutoencoder

    monkeypatch.setitem(sys.modules, "diffusers", None)  # what the import system keeps for a module that is not there
    message = error_of(build_autoencoder, DiffusersAutoencoder.tiny)
    assert "pip install 'letit_dist[diffusers]'" in message and "\n" not in message


def test_the_program_reads_folders_of_diffusers(theirs, tmp_path):
    model, folder = theirs
    done = run("launch/export.py", "--from", "diffusers", folder, "--resolution", 32, "--out", tmp_path / "ours")
    assert done.code == 0, done.err
    assert load_autoencoder(tmp_path / "ours").config.model == type(model).__name__


# Tiles of large images

LARGE = {
    # Eight pixels a cell, with the attention in the middle that the published ones have.
    "AutoencoderKL": {
        "block_out_channels": [4, 8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 512,  # the side of the tiles of diffusers
    },
    "AutoencoderTiny": DIFFUSERS["AutoencoderTiny"],
}
# How far tiles may be from the whole, as (root mean square) / (spread of the whole): encoded, decoded. The tiny one is
# convolutions alone, which see no further than what tiles share; the other normalises and attends over a whole tile.
NEAR = {"AutoencoderKL": (0.05, 0.22), "AutoencoderTiny": (1e-4, 1e-5)}


@pytest.mark.parametrize("name", LARGE)
@torch.no_grad()
def test_1024_pixels_in_tiles_are_near_the_whole_and_nearer_than_those_of_diffusers(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from letit_dist.interchange.diffusers_models import import_diffusers

    torch.manual_seed(0)
    theirs = getattr(diffusers, name)(**LARGE[name]).eval().requires_grad_(False)
    theirs.save_pretrained(tmp_path / "theirs")
    tiled = import_diffusers(tmp_path / "theirs", resolution=1024)
    whole = import_diffusers(tmp_path / "theirs", resolution=1024, tile=0)
    assert (tiled.config.tile_pixels, whole.config.tile_pixels) == (512, 1024)
    x = torch.nn.functional.interpolate(images(128, 1), size=1024, mode="bicubic").clamp(-1, 1)
    factor = theirs.config.scaling_factor
    theirs.enable_tiling()
    assert theirs.tile_sample_min_size == 512
    latents = whole.encode(x)
    encoded = theirs.encode(x)
    encoded = (encoded.latent_dist.mode() if name == "AutoencoderKL" else encoded.latents) * factor
    sides = (
        (tiled.encode(x), encoded, latents),
        (tiled.decode(latents), theirs.decode(latents / factor).sample, whole.decode(latents)),
    )
    assert latents.shape == (1, 4, 128, 128) and sides[1][0].shape == (1, 3, 1024, 1024)
    for (ours, other, expected), most in zip(sides, NEAR[name], strict=True):
        spread = expected.std()
        far = [((a - b).square().mean().sqrt() / spread).item() for a, b in ((ours, expected), (other, expected))]
        assert 0 < far[0] < most and far[0] < far[1], far
        # Both are about the same picture: what sets them apart is no more than what sets each apart from the whole.
        assert (ours - other).square().mean().sqrt() / spread < sum(far)
