"""Other people's autoencoders as ours: tiles, scaling, bf16, and the way from their files to our folder."""

import functools
import os
import pickle
import sys
from pathlib import Path

import foreign_autoencoders as foreign
import pytest
import torch
from programs import ROOT, run
from safetensors.torch import load_file, save_file

from letit_dist.autoencoders.base import build_autoencoder, load_autoencoder
from letit_dist.autoencoders.custom import CustomConfig
from letit_dist.autoencoders.frozen import in_tiles
from letit_dist.errors import UserError
from letit_dist.interchange.custom import import_custom
from letit_dist.interchange.taesd import import_taesd
from letit_dist.memory import lowered, peak_bytes

TAEF2 = Path(os.environ.get("LETIT_TAEF2", ROOT / "data/taef2"))
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


def images(side: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


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


def test_tiles_that_do_not_fit_are_refused():
    assert "a multiple of 32 is needed" in error_of(foreign.taesd, "taesd", 256, tile=72)
    flat = {"module": "foreign_autoencoders:Codec", "arguments": {"side": 32}, "resolution": 32, "tile": 16}
    assert "latents (6,) are no map of an image, give tile 0" in error_of(import_custom, None, **flat, images="unit")
    assert "tile: a side in pixels" in error_of(import_taesd, TAEF2_LIKE, resolution=32, tile=-1)


@pytest.fixture(scope="module", autouse=True)
def taef2_like(tmp_path_factory):
    global TAEF2_LIKE
    TAEF2_LIKE = foreign.publish(foreign.taesd("taef2"), tmp_path_factory.mktemp("taef2"))


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


# The TAESD family


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("member", foreign.FAMILY)
def test_the_layers_are_read_off_the_published_files(tmp_path, member, ending):
    model = foreign.taesd(member)
    folder = foreign.publish(model, tmp_path, ending)
    for found in (
        import_taesd(folder, resolution=32),
        import_taesd(folder / f"tiny_encoder.{ending}", decoder=folder / f"tiny_decoder.{ending}", resolution=32),
    ):
        assert found.config == model.config and found.fingerprint() == model.fingerprint()


def test_the_layers_are_in_the_order_of_the_reference():
    """Indices as in the files that are published: what stands where, and where no weights are."""
    model = foreign.taesd("taef2")
    encoder, decoder = (list(side.state_dict()) for side in (model.encoder, model.decoder))
    assert [name for name in encoder if name.count(".") == 1] == [
        *("0.weight", "0.bias", "2.weight", "6.weight", "10.weight", "14.weight", "14.bias")
    ]
    assert [name for name in decoder if name.count(".") == 1] == [
        *("1.weight", "1.bias", "7.weight", "12.weight", "17.weight", "19.weight", "19.bias")
    ]
    assert {name.split(".")[0] for name in encoder if ".pool." in name} == {"11", "12", "13"}
    assert {name.split(".")[0] for name in decoder if ".pool." in name} == {"3", "4", "5"}


@torch.no_grad()
def test_convolutions_run_in_the_order_that_is_faster_on_a_cpu():
    model, images = foreign.taesd("taesd", 32), torch.randn(2, 3, 32, 32)
    by_rows = model.decoder(model.encoder((images + 1) / 2)) * 2 - 1
    orders = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 4:
            module.register_forward_pre_hook(
                lambda _, given: orders.append(given[0].is_contiguous(memory_format=torch.channels_last))
            )
    latents = model.encode(images)
    again = model.decode(latents)
    assert len(orders) > 20 and all(orders)
    assert latents.is_contiguous() and again.is_contiguous()
    assert torch.allclose(again, by_rows, atol=1e-4)


@torch.no_grad()
def test_latents_are_bounded_before_they_are_decoded():
    model = foreign.taesd("taesd")
    far = torch.full((1, 4, 4, 4), 1e4)
    torch.testing.assert_close(model.decode(far), model.decode(far * 10))


def test_half_precision_files_become_float32(tmp_path):
    folder = foreign.publish(foreign.taesd("taesd").half(), tmp_path, "pth")
    assert {p.dtype for p in import_taesd(folder, resolution=32).parameters()} == {torch.float32}


def test_files_that_are_no_such_autoencoder(tmp_path):
    folder = foreign.publish(foreign.taesd("taesd"), tmp_path / "a", "pth")
    encoder, decoder = folder / "tiny_encoder.pth", folder / "tiny_decoder.pth"
    state = torch.load(encoder, weights_only=True)
    torch.save({**state, "stray.weight": torch.zeros(2), "0.bias": torch.zeros(3)}, tmp_path / "strange.pth")
    lines = error_of(import_taesd, tmp_path / "strange.pth", decoder=decoder, resolution=32).splitlines()
    assert len(lines) == 2
    assert "unexpected encoder.stray.weight (2,)" in lines[0]
    assert "encoder.0.bias: expected shape (8,), got (3,)" in lines[1]
    assert "--decoder" in error_of(import_taesd, encoder, resolution=32)
    assert "no encoder of the TAESD family" in error_of(import_taesd, decoder, decoder=decoder, resolution=32)
    assert "no multiple of 8" in error_of(import_taesd, folder, resolution=30)
    torch.save(state, folder / "second_encoder.pth")
    assert "found second_encoder.pth, tiny_encoder.pth" in error_of(import_taesd, folder, resolution=32)
    assert "no such file" in error_of(import_taesd, tmp_path / "x.safetensors", decoder=decoder, resolution=32)
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    assert "damaged" in error_of(import_taesd, tmp_path / "cut.safetensors", decoder=decoder, resolution=32)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path(os.environ["TRAP"]),))


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"0.weight": torch.zeros(1), "trap": Trap()}, tmp_path / "trap.pth")
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists()  # so it works
    (tmp_path / "sprung").unlink()
    message = error_of(import_taesd, tmp_path / "trap.pth", decoder=tmp_path / "trap.pth", resolution=32)
    assert "holds more than tensors" in message and "\n" not in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.skipif(
    not (TAEF2 / "taef2_encoder.pth").is_file(),
    reason=f"the published weights of taef2 are not in {TAEF2} ($LETIT_TAEF2 names their folder)",
)
@torch.no_grad()
def test_the_published_taef2_gives_pictures_back(tmp_path):
    from letit_dist.data.synthetic import fruit
    from letit_dist.data.transforms import to_images

    model = import_taesd(TAEF2, resolution=256)
    assert model.latent_shape == (32, 32, 32) and sum(p.numel() for p in model.parameters()) > 2.6e6
    drawn = torch.stack([torch.from_numpy(fruit(style, 0, 0, 256)[0]) for style in ("apple", "orange")])
    x = to_images(drawn.permute(0, 3, 1, 2))
    again = model.decode(model.encode(x)).clamp(-1, 1)
    assert (10 * torch.log10(4 / (again - x).square().mean((1, 2, 3)))).min() > 30
    large = import_taesd(TAEF2, resolution=512, tile=256)
    whole = import_taesd(TAEF2, resolution=512, tile=0)
    big = torch.nn.functional.interpolate(x[:1], scale_factor=2, mode="bicubic", antialias=True).clamp(-1, 1)
    tiled, once = (m.decode(m.encode(big)).clamp(-1, 1) for m in (large, whole))
    assert 10 * torch.log10(4 / (tiled - once).square().mean()) > 35


# diffusers


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


# Modules of somebody's own


@torch.no_grad()
def test_a_module_by_its_name(tmp_path):
    torch.manual_seed(0)
    model = foreign.Codec(16, width=5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    named = {"module": "foreign_autoencoders:Codec", "arguments": {"side": 16, "width": 5}, "images": "unit"}
    ours, x = import_custom(tmp_path / "weights.pth", resolution=16, **named), images(16)
    torch.testing.assert_close(ours.encode(x), model.encode((x + 1) / 2))
    torch.testing.assert_close(ours.decode(ours.encode(x)), model.decode(ours.encode(x)) * 2 - 1)
    ours.save_pretrained(tmp_path / "ours")
    back = load_autoencoder(tmp_path / "ours")
    assert back.config.latent_shape == (5,) and back.fingerprint() == ours.fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": "os"}, "'os': expected package.module:Class"),
        ({"module": "nowhere.nets:Codec"}, "nowhere.nets:Codec: cannot import nowhere.nets (ModuleNotFoundError"),
        ({"module": "foreign_autoencoders:Codek"}, "no torch module (a class) of that name"),
        ({"module": "foreign_autoencoders:Encoder"}, "has no `decode`, which letit_dist would call"),
        ({"arguments": {"side": 16, "depth": 2}}, "refuses arguments"),
        ({"module": "foreign_autoencoders:Tuples"}, "encode gives a tuple, expected a tensor"),
        ({"arguments": {"side": 8}}, "fails on a grey image of 16 pixels: RuntimeError"),
    ],
)
def test_modules_that_cannot_be_used(settings, message):
    given = {"module": "foreign_autoencoders:Codec", "arguments": {"side": 16}, "images": "unit", **settings}
    assert message in error_of(import_custom, None, resolution=16, **given)


def test_a_folder_from_elsewhere_calls_nothing_but_torch_modules(tmp_path):
    for name in ("subprocess:Popen", "os:system", "builtins:exec"):
        config = CustomConfig(resolution=16, module=name, arguments={"args": ["touch", str(tmp_path / "ran")]})
        assert "has no torch module" in error_of(build_autoencoder, config)
    assert not (tmp_path / "ran").exists()


# All of them


@pytest.mark.parametrize("kind", ["taesd", "diffusers", "custom"])
@torch.no_grad()
def test_bf16_is_near_float32(kind):
    from letit_dist.registry import AUTOENCODERS

    if kind == "diffusers":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = build_autoencoder(AUTOENCODERS.get(kind).tiny).eval()
    x = images(model.config.resolution)
    with lowered("bf16"):
        latents = model.encode(x)
        again = model.decode(latents)
    expected = model.encode(x)
    torch.testing.assert_close(latents.float(), expected, rtol=0.05, atol=0.05 * expected.std().item())
    torch.testing.assert_close(again.float(), model.decode(expected), rtol=0.1, atol=0.1)


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


def test_the_program_reads_folders_of_diffusers(theirs, tmp_path):
    model, folder = theirs
    done = run("launch/export.py", "--from", "diffusers", folder, "--resolution", 32, "--out", tmp_path / "ours")
    assert done.code == 0, done.err
    assert load_autoencoder(tmp_path / "ours").config.model == type(model).__name__
