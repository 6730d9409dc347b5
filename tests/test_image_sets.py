"""Sets of images: folders, shards, and what an energy makes of them on the fly."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from programs import files, run
from small_inception import command, pictures

from letit_dist.energy.translate import open_translator
from letit_dist.errors import UserError
from letit_dist.evaluation.image_distances import faithfulness
from letit_dist.evaluation.image_sets import TranslatedImages, open_image_set

pytest.importorskip("torch_fidelity")


def test_sets_of_images_and_their_stamps(fruit_shards, tmp_path):
    shards = open_image_set(fruit_shards / "apple/test")
    assert len(shards) == 8 and shards.split == "test"
    folder = tmp_path / "f"
    folder.mkdir()
    for row, image in enumerate(shards.read(range(8))[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{row}.png")
    copied = open_image_set(folder)
    assert torch.equal(copied.read([3, 1])[0], shards.read([3, 1])[0]) and copied.stamp != shards.stamp
    stamp = copied.stamp
    (folder / "7.png").rename(folder / "6b.png")
    assert open_image_set(folder).stamp != stamp
    resized = open_image_set(folder, 20).read([0])[0][0]
    expected = Image.open(folder / "0.png").resize((20, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(resized.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_images_that_cannot_be_compared(tmp_path, fruit_shards, fruit_latents):
    folder = pictures(tmp_path / "mixed", 3)
    pictures(tmp_path / "mixed/more", 1, side=16)
    with pytest.raises(UserError, match=r"000\.png is 16x16, others in .*mixed are 32x32: give one --resize"):
        open_image_set(folder).read([0])
    assert open_image_set(folder, 24).read(range(4))[0].shape == (4, 3, 24, 24)
    (tmp_path / "empty").mkdir()
    for path, words in (
        ("empty", "no images below this folder"),
        ("nowhere", "no such folder"),
        ("mixed/000.png", "is a file"),
    ):
        with pytest.raises(UserError, match=words):
            open_image_set(tmp_path / path)
    with pytest.raises(UserError, match="holds codes, not images"):
        open_image_set(fruit_latents / "apple")
    (folder / "more/000.png").write_bytes((folder / "000.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"more/000\.png"):
        images = open_image_set(folder)
        images.read(range(len(images)))


def test_an_energy_translates_on_the_fly(chain, tmp_path):
    """The same pixels as those that launch/translate.py writes, whatever the batch, and a result that names the run."""
    source = chain.images("apple", "test")
    done = run("launch/translate.py", source, "--energy", chain.energy(), "--out", tmp_path / "written")
    assert done.code == 0
    written = open_image_set(tmp_path / "written")
    translator = open_translator(chain.energy())
    sets = [TranslatedImages(translator, open_image_set(source), batch=batch) for batch in (16, 3)]
    pixels = [s.read(range(8))[0].int() for s in sets]
    for found in pixels:
        assert (found - written.read(range(8))[0]).abs().max() <= 1
    assert sets[0].stamp == sets[1].stamp
    target = chain.images("orange", "test")
    before = files(chain.energy())
    given = command(f"run:{chain.energy()}", target, "--source", source, "--out", tmp_path / "o")
    done = run("eval/fidelity.py", *given)
    assert done.code == 0, done.err
    row = json.loads(done.out.splitlines()[0])
    assert row["snapshot"]["images_seen"] == 256 and row["snapshot"]["energy"] == translator.energy.fingerprint()
    assert row["snapshot"]["run"] == str(chain.energy()) and row["counts"] == [8, 8]
    assert files(chain.energy()) == before


def test_several_outputs_need_noise(chain):
    source = open_image_set(chain.images("apple", "test"))
    translator = open_translator(chain.energy())
    config = translator.sampler.config
    noisy = type(translator.sampler)(config.model_copy(update={"noise_scale": 0.5}))
    quiet = type(translator.sampler)(config.model_copy(update={"noise_scale": 0.0}))
    translator.sampler = noisy
    both = TranslatedImages(translator, source, outputs=2, beside=faithfulness)
    pixels, columns = both.read([0, 8])
    assert len(both) == 16 and not torch.equal(pixels[0], pixels[1])
    difference = (pixels[0].double() - source.read([0])[0][0].double()) / 255
    assert float(columns["l2_to_source"][0]) == pytest.approx(float(difference.square().sum().sqrt()), rel=1e-9)
    translator.sampler = quiet
    if not translator.autoencoder.decodes_with_noise:
        with pytest.raises(UserError, match="2 outputs a source: this energy's chain has no noise"):
            TranslatedImages(translator, source, outputs=2)
