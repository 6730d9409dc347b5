"""The TAESD family: its published files as ours, and the published taef2 where it is at hand."""

import importlib.util
import math
import os
import pickle
from pathlib import Path

import foreign_autoencoders as foreign
import pytest
import torch
from foreign_autoencoders import error_of

from letit_dist.interchange.taesd import import_taesd

TAEF2 = Path(os.environ.get("LETIT_TAEF2", "none"))
needs_taef2 = pytest.mark.skipif(
    not (TAEF2 / "taef2_encoder.pth").is_file(), reason="no published weights of taef2: their folder as LETIT_TAEF2"
)


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


@needs_taef2
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


@needs_taef2
@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="no photographs: pip install scikit-learn")
@torch.no_grad()
def test_the_published_taef2_gives_photographs_back():
    """The two that scikit-learn brings, at 256 pixels: as docs/experiments.md measured by the programs."""
    from PIL import Image, ImageOps
    from sklearn.datasets import load_sample_images

    from letit_dist.data.transforms import picture_pixels, to_images

    model = import_taesd(TAEF2, resolution=256)
    found = load_sample_images()
    decibels = {}
    for file, pixels in zip(found.filenames, found.images, strict=True):
        small = ImageOps.fit(Image.fromarray(pixels), (256, 256), Image.Resampling.BILINEAR)
        x = to_images(picture_pixels(small)[None])
        error = (model.decode(model.encode(x)).clamp(-1, 1) - x).square().mean().item()
        decibels[Path(file).stem] = 10 * math.log10(4 / error)
    assert sum(decibels.values()) / 2 >= 28, decibels
    assert decibels == pytest.approx({"china": 26.6, "flower": 31.3}, abs=0.15)
