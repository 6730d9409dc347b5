"""Bad input to encoding, and latents that an energy cannot learn from: clear lines, and nothing on disk touched."""

import shutil

import pytest
from programs import run
from refusals import energy_command, one, photograph

from letit_dist.data.writer import ShardWriter
from letit_dist.pretrained import find_folder

# Encoding


def encode(chain, out, **changed):
    given = {"autoencoder": chain.autoencoder, "shards": chain.images("apple"), "out": out, **changed}
    return ("launch/encode_latents.py", *(part for key, value in given.items() for part in (f"--{key}", value)))


def test_encoding_with_wrong_options(refused, chain, tmp_path):
    command = encode(chain, tmp_path / "out", crops=-1, batch=0, workers=-2)
    assert refused(*command) == ["--crops -1: 0 or more", "--batch 0: 1 or more", "--workers -2: 0 or more"]
    assert "--seed has no effect without --crops" in one(refused(*encode(chain, tmp_path / "out", seed=3)))
    assert "--dtype float16 has no effect here" in one(refused(*encode(chain, tmp_path / "out", dtype="float16")))
    line = one(refused(*encode(chain, tmp_path / "out", shards=chain.fruit / "apples")))
    assert line.startswith("no such shard folder: ") and line.endswith("apple?")
    assert "--memory nan: expected GiB, more than 0" in one(refused(*encode(chain, tmp_path / "out", memory="nan")))
    line = one(refused(*encode(chain, tmp_path / "out", memory=0.01)))
    assert line.startswith("one image at a time takes about ") and ", the budget is 0.01: give --memory " in line
    line = one(refused(*encode(chain, tmp_path / "out", shards=chain.latents("apple"))))
    assert line == f"{chain.latents('apple')} holds codes, not images"
    assert not (tmp_path / "out").exists()


def test_encoding_with_no_autoencoder(refused, chain, tmp_path):
    def line(autoencoder):
        return one(refused(*encode(chain, tmp_path / "out", autoencoder=autoencoder)))

    assert "no weights at" in (nowhere := line(tmp_path / "nowhere")) and "does not exist" in nowhere
    shutil.copytree(chain.autoencoder, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    assert "the run has not finished, start it again" in line(tmp_path / "run")
    # What a kill during the export leaves behind is no export.
    (tmp_path / "run/export/.images-000000000960.writing-123").mkdir(parents=True)
    assert "the run has not finished, start it again" in line(tmp_path / "run")
    assert "neither weights" in line(chain.fruit)
    assert "MLPEnergy" in (other := line(chain.energy())) or "kind" in other
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_damaged_weights(refused, chain, tmp_path, damage):
    shutil.copytree(find_folder(chain.autoencoder), tmp_path / "weights")
    path = tmp_path / "weights/model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-100] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    line = one(refused(*encode(chain, tmp_path / "out", autoencoder=tmp_path / "weights"), keeps=[tmp_path]))
    expected = {"truncated": "is damaged", "flipped": "fingerprint", "gone": "no model.safetensors in it"}
    assert expected[damage] in line and str(tmp_path / "weights") in line


def test_encoding_images_of_another_size(refused, chain, tmp_path):
    run("shards/pack.py", "builtin:fruit", "--out", tmp_path / "big", "--resolution", 40, "--count", 2, "--test", 1)
    line = one(refused(*encode(chain, tmp_path / "out", shards=tmp_path / "big/apple/train")))
    assert "holds images of 40x40, the autoencoder takes 32x32" in line and "--resolution 32" in line


def test_encoding_into_a_folder_of_something_else(refused, chain, stranger, tmp_path):
    lines = refused(*encode(chain, chain.latents("apple")))
    assert "holds other latents than asked for" in lines[0]
    assert lines[1:] == ["views: ['', 'flip', 'crop0'] -> ['']", "crop_seed: 0 -> None"]
    lines = refused(*chain.encode("apple"), "--autoencoder", stranger)
    assert "holds other latents than asked for" in lines[0] and lines[1].startswith("autoencoder_fingerprint: ")
    lines = refused(*chain.encode("apple"), "--shards", chain.images("orange"))
    assert [line.partition(":")[0] for line in lines[1:]] == ["domain", "image_shards"]
    line = one(refused(*encode(chain, chain.images("apple"))))
    assert line == f"{chain.images('apple')} holds images: choose another folder for the latents with --out"


def test_other_images_under_the_same_names_are_other_latents(refused, chain, tmp_path):
    again = (*chain.pack[:3], tmp_path / "other", *chain.pack[4:])
    assert run(*again, "--seed", 1).code == 0
    lines = refused(*chain.encode("apple"), "--shards", tmp_path / "other/apple/train")
    assert [line.partition(":")[0] for line in lines[1:]] == ["image_shards"]


def test_encoding_an_image_that_cannot_be_read(refused, chain, tmp_path):
    with ShardWriter(tmp_path / "shards", meta={"resolution": 32}) as writer:
        writer.write("good", {"png": photograph(tmp_path / "a.png", size=(32, 32)).read_bytes()})
        writer.write("bad", {"png": b"no image"})
    line = one(refused(*encode(chain, tmp_path / "out", shards=tmp_path / "shards")))
    assert f"{tmp_path / 'shards/shard-00000.tar'}: bad: not an image" in line
    assert not (tmp_path / "out/index.json").exists()


# Energies


def test_latents_of_another_autoencoder(refused, chain, stranger, tmp_path):
    line = one(refused(*energy_command(chain, tmp_path / "new", autoencoder=stranger)))
    assert f"{chain.latents('apple')}: encoded by autoencoder " in line and "use that one, or encode again" in line
    assert not (tmp_path / "new").exists()


def test_wrong_latents(refused, chain, tmp_path):
    def line(**changed):
        return one(refused(*energy_command(chain, tmp_path / "new", **changed)))

    assert "data: the same folder twice: " in line(source=chain.latents("orange"))
    assert "holds images, not latents: encode them first" in line(target=chain.images("orange"))
    assert "no such shard folder" in line(target=tmp_path / "nowhere")
    assert "no weights at" in line(autoencoder=tmp_path / "nowhere")
    assert not (tmp_path / "new").exists()
