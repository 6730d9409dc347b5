"""What other people's autoencoders have in common as ours: tiles, scaling, bf16, and the program that reads them."""

import functools

import foreign_autoencoders as foreign
import pytest
import torch
from foreign_autoencoders import error_of, images
from programs import run

from letit_dist.autoencoders.base import build_autoencoder, load_autoencoder
from letit_dist.autoencoders.frozen import in_tiles
from letit_dist.interchange.custom import import_custom
from letit_dist.interchange.taesd import import_taesd
from letit_dist.memory import lowered, peak_bytes

# Tiles


def local(scale: int):
    """A function that reaches one cell far and changes the size by `scale` (2 = twice, -2 = half)."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1) if scale > 0 else torch.nn.Conv2d(3, 4, 4, stride=2, padding=1)
    up = torch.nn.Upsample(scale_factor=scale) if scale > 0 else torch.nn.Identity()
    return torch.nn.Sequential(conv, up).requires_grad_(False)


@pytest.mark.parametrize("scale", [1, 2, -2])
@pytest.mark.parametrize(("side", "tile"), [(64, 32), (80, 32), (72, 48), (128, 16)])
def test_tiles_give_what_the_whole_gives_where_a_function_is_local(scale, side, tile):
    x = images(side)
    torch.testing.assert_close(in_tiles(local(scale), x, tile), local(scale)(x), rtol=1e-4, atol=1e-5)


def test_tiles_fade_into_each_other():
    """A function that shifts all of a tile by its mean: no jump between two neighbouring pixels."""
    ramp = torch.linspace(0, 1, 128).expand(1, 1, 128, 128)
    tiled = in_tiles(lambda x: x * 0 + x.mean((1, 2, 3), keepdim=True), ramp, 32)[0, 0]
    means = [tiled[0, 2].item(), tiled[0, -2].item()]
    assert means[0] < 0.2 and means[1] > 0.8
    assert tiled.diff(dim=1).abs().max() < 0.06  # means of neighbouring tiles are 0.19 apart


def test_large_images_are_taken_in_tiles_by_default():
    def config(resolution, **more):
        return foreign.TAESDConfig(resolution=resolution, **more).tile_pixels

    assert [config(side) for side in (256, 512, 1016, 1024, 2048)] == [256, 512, 1016, 512, 512]
    assert config(1024, tile=0) == 1024 and config(1024, tile=256) == 256 and config(256, tile=512) == 256


@torch.no_grad()
def test_tiles_of_a_real_network_are_near_the_whole_and_take_less_memory():
    whole, tiled = (foreign.taesd("taesd", 256, tile=tile) for tile in (0, 128))
    x = images(256, 1)
    expected = whole.encode(x)
    again = whole.decode(expected)
    for found, wanted in ((tiled.encode(x), expected), (tiled.decode(expected), again)):
        assert (found - wanted).square().mean().sqrt() < 0.02 * wanted.std()
        assert (found - wanted).abs().max() < 0.1 * wanted.std()
    for name, given in (("encode", x), ("decode", expected)):
        needed = [peak_bytes(functools.partial(getattr(model, name), given)) for model in (whole, tiled)]
        assert needed[1] < 0.5 * needed[0], name


def test_tiles_that_do_not_fit_are_refused(tmp_path):
    assert "a multiple of 32 is needed" in error_of(foreign.taesd, "taesd", 256, tile=72)
    flat = {"module": "foreign_autoencoders:Codec", "arguments": {"side": 32}, "resolution": 32, "tile": 16}
    assert "latents (6,) are no map of an image, give tile 0" in error_of(import_custom, None, **flat, images="unit")
    published = foreign.publish(foreign.taesd("taef2"), tmp_path)
    assert "tile: a side in pixels" in error_of(import_taesd, published, resolution=32, tile=-1)


# Scaling


@torch.no_grad()
def test_latents_are_shifted_then_scaled_and_back():
    plain = foreign.taesd("taesd")
    scaled = foreign.taesd("taesd", scale=(2.0,), shift=(1.0, 0.0, -1.0, 0.5))
    x = images(32)
    latents = plain.encode(x)
    expected = (latents - torch.tensor([1.0, 0.0, -1.0, 0.5]).view(1, 4, 1, 1)) * 2
    torch.testing.assert_close(scaled.encode(x), expected)
    torch.testing.assert_close(scaled.decode(expected), plain.decode(latents))
    assert scaled.fingerprint() != plain.fingerprint()
    assert "scale: 3 numbers for 4 channels" in error_of(foreign.taesd, "taesd", scale=(1.0, 2.0, 3.0))


# bf16


@pytest.mark.parametrize("kind", ["taesd", "diffusers", "custom"])
@torch.no_grad()
def test_bf16_lowers_the_layers_and_stays_near_float32(kind):
    from letit_dist.registry import AUTOENCODERS

    if kind == "diffusers":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if kind == "custom":  # whose tiny one only cuts and turns
        given = {"module": "foreign_autoencoders:Codec", "arguments": {"side": 16}, "images": "unit"}
        model = import_custom(None, resolution=16, **given)
    else:
        model = build_autoencoder(AUTOENCODERS.get(kind).tiny).eval()
    x = images(model.config.resolution)
    kinds: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)):
            module.register_forward_hook(lambda _, given, result: kinds.append(result.dtype))
    latents, again = {}, {}
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        kinds.clear()
        with lowered(precision):
            latents[precision] = model.encode(x)
            again[precision] = model.decode(latents["fp32"])
        assert kinds and set(kinds) == {expected}
    for found in (latents, again):
        # A bfloat16 has eight bits, so that no layer can be nearer than about 2^-9 of what it gives.
        spread = (found["bf16"].float() - found["fp32"]).square().mean().sqrt() / found["fp32"].std()
        assert 2e-4 < spread < 0.03, spread


# launch/export.py


def test_the_program_makes_folders_of_them(tmp_path):
    folder = foreign.publish(foreign.taesd("taef2"), tmp_path / "published")
    options = ("--resolution", 64, "--scale", 2, "--shift", -0.5, "--tile", 32)
    done = run("launch/export.py", "--from", "taesd", folder, *options, "--out", tmp_path / "taef2")
    assert done.code == 0, done.err
    model = load_autoencoder(tmp_path / "taef2")
    assert f"autoencoder {model.fingerprint()}, latents (32, 8, 8)" in done.out
    assert (model.config.scale, model.config.shift, model.config.tile) == ((2.0,), (-0.5,), 32)
    command = ("launch/export.py", "--from", "custom", "--module", "foreign_autoencoders:Codec", "--resolution", 16)
    done = run(*command, "--arguments", '{"side": 16}', "--images", "unit", "--out", tmp_path / "mine")
    assert done.code == 0, done.err
    assert load_autoencoder(tmp_path / "mine").latent_shape == (6,)
    for arguments, message in (
        ((*command, "--arguments", "{"), "--arguments {: not valid JSON"),
        ((*command, "--arguments", "3"), "expected an object such as"),
        (command[:5], "--from custom needs --resolution"),
        (("launch/export.py", "--from", "taesd", folder), "--from taesd needs --resolution"),
        ((*command, "--decoder", "x"), "--decoder has no effect with --from custom"),
    ):
        done = run(*arguments, "--out", tmp_path / "none")
        assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "none").exists()
