"""A small ALAE with random weights through the programs of stage 2: encode, learn an energy, translate, score."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, TINY_ENERGY, run

from letit_dist.autoencoders.alae import ALAE, ALAEConfig
from letit_dist.autoencoders.base import load_autoencoder
from letit_dist.data.index import Index
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import decode, to_images, to_pixels
from letit_dist.energy.translate import open_translator


@pytest.fixture(scope="module")
def stage2(tmp_path_factory, fruit_shards):
    """An autoencoder for 32 pixels, latents of both styles, and an energy, all but the first by the programs."""
    root = tmp_path_factory.mktemp("alae")
    torch.manual_seed(0)
    autoencoder = ALAE(ALAEConfig(resolution=32, start_channels=8, max_channels=16, latent_dim=16, mapping_layers=2))
    for name, parameter in autoencoder.named_parameters():
        if name.endswith(".noise"):  # zero at the start
            torch.nn.init.constant_(parameter, 0.3)
    autoencoder.save_pretrained(root / "autoencoder")
    done = {}
    for style in ("apple", "orange"):
        command = ("--autoencoder", root / "autoencoder", "--shards", fruit_shards / style / "train")
        done[style] = run("launch/encode_latents.py", *command, "--out", root / "latents" / style, "--flip")
    data = (f"autoencoder={root / 'autoencoder'}", f"data.source={root / 'latents/apple'}")
    data += (f"data.target={root / 'latents/orange'}", "energy={kind: mlp, hidden: 64, latent_unit: auto}")
    command = ("launch/train_energy.py", ROOT / "configs/energy/fruit.yaml", "--run", root / "energy")
    done["energy"] = run(*command, *data, *TINY_ENERGY)
    failed = {name: item.err for name, item in done.items() if item.code != 0}
    assert not failed, failed
    return SimpleNamespace(root=root, done=done, apples=fruit_shards / "apple/test", shards=fruit_shards)


@pytest.fixture
def translate(stage2, tmp_path):
    """Translate the test apples into a folder of this name; returns name -> pixels, and the lines."""

    def call(name, *options):
        command = ("launch/translate.py", stage2.apples, "--energy", stage2.root / "energy", "--out", tmp_path / name)
        done = run(*command, *options)
        assert done.code == 0, done.err
        found = {path.stem: decode(path.read_bytes()) for path in sorted((tmp_path / name).glob("*.png"))}
        return found, done.out.splitlines()

    return call


def close(one, other):
    return one.keys() == other.keys() and all((one[key].int() - other[key].int()).abs().max() <= 1 for key in one)


def test_latents_are_vectors(stage2, fruit_shards):
    autoencoder = load_autoencoder(stage2.root / "autoencoder")
    lines = stage2.done["apple"].out.splitlines()
    assert re.match(r"memory: about .* \(weights 0\.0, 24 images at once x .*; budget 4\.0$", lines[0])
    assert lines[1].endswith(f"24 images of apple x 2 views as latents, autoencoder {autoencoder.fingerprint()}")
    assert Index.read(stage2.root / "latents/apple").kind == "latents"
    pixels = ShardDataset([fruit_shards / "apple/train"]).pixels(3)[None]
    expected = autoencoder.encode(to_images(torch.cat([pixels, pixels.flip(-1)])))
    found = LatentSet.open(stage2.root / "latents/apple").take([6, 7])["latent"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_energy_is_learnt(stage2):
    table = [line.split("|") for line in stage2.done["energy"].out.splitlines() if line.startswith("| ")][2:]
    energies = {cells[1].strip(): float(cells[2]) for cells in table}
    assert energies["latent energy"] < energies["source"]
    assert open_translator(stage2.root / "energy").energy.latent_shape == (16,)


def test_no_picture_depends_on_its_neighbours(translate, stage2):
    """Decoder noise belongs to the place: the same pictures at any number at once, others with another seed."""
    whole, lines = translate("whole")
    assert lines[0].startswith("memory: about ") and "8 images at once x " in lines[0]
    assert close(translate("one", "--batch", 1)[0], whole) and close(translate("three", "--batch", 3)[0], whole)
    few, _ = translate("few", "--limit", 2)
    assert close(few, {name: whole[name] for name in few})
    other, _ = translate("other", "--seed", 1)
    assert not close(other, whole)
    translator = open_translator(stage2.root / "energy")
    dataset = ShardDataset([stage2.apples])
    images = to_images(torch.stack([dataset.pixels(place) for place in range(8)]))
    expected = to_pixels(
        translator.translate(images, decoder_noise=translator.autoencoder.decoder_noise(0, range(8))).images
    )
    assert close(dict(zip(whole, expected, strict=True)), whole)
    assert not close(dict(zip(whole, to_pixels(translator.translate(images).images), strict=True)), whole)


def test_noise_is_the_same_along_a_path_and_in_the_reconstruction(translate, tmp_path):
    """With a chain of no steps all three are one picture, which they would not be with noise of their own."""
    still, _ = translate("still", "--steps", 0, "--path", "--sheet", "--batch", 3)
    moved, _ = translate("moved", "--path", "--batch", 3, "--strength", 0.5)
    for name, pixels in still.items():
        expected = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((96, 96), Image.Resampling.NEAREST)
        starts = []
        for folder, steps in (("still", 1), ("moved", 3)):
            with Image.open(tmp_path / folder / "paths" / f"{name}.png") as strip:
                assert strip.width == 3 + steps * (96 + 3)
                starts.append(strip.crop((3, strip.height - 3 - 96, 3 + 96, strip.height - 3)))  # names stand above
        assert starts[0].tobytes() == expected.tobytes()
        still_at, moved_at = (np.asarray(start, dtype=np.int16) for start in starts)
        assert abs(still_at - moved_at).max() <= 1
        assert not torch.equal(moved[name], pixels)
    with Image.open(tmp_path / "still/sheets/sheet-0000.png") as sheet:
        rows = [sheet.crop((sheet.width - 99 * 8, 3 + 99 * i, sheet.width - 3, 99 + 99 * i)) for i in range(3)]
    assert rows[0].tobytes() != rows[1].tobytes() == rows[2].tobytes()


def test_bf16(translate):
    low, _ = translate("low", "--precision", "bf16")
    full, _ = translate("full")
    difference = torch.stack([(low[name].int() - full[name].int()).abs().float().mean() for name in full])
    assert 0 < difference.mean() < 12


def test_scores(stage2, tmp_path):
    """The judge sees decoded images with noise; real and reconstructed ones of eight test apples."""
    command = ["eval/translation.py", stage2.root / "energy", "--test", stage2.apples, "--judge-steps", 2]
    command += ["--train", *(stage2.shards / style / "train" for style in ("apple", "orange"))]
    done = run(*command, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    methods = [line.split("|")[1].strip() for line in done.out.splitlines() if line.startswith("| ")][2:]
    baselines = ["mean shift", "Gaussian transport", "light bridge"]
    assert methods == ["real", "reconstruction", *baselines, "latent energy"]
