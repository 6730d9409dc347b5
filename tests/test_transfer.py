"""launch/transfer.py: two folders and a frozen autoencoder in, a sheet out; and what pack.py holds out for it."""

import re

import foreign_autoencoders as foreign
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from programs import files, run

import letit_dist
from letit_dist.cards import Card
from letit_dist.data.index import Index
from letit_dist.data.reader import ShardDataset
from letit_dist.data.synthetic import fruit
from letit_dist.interchange.kinds import import_autoencoder

TINY = (
    "energy.multiplier=1",
    "recipe.langevin.steps=2",
    "recipe.optimizer.decay=null",
    "training.images=64",
    "training.batch=8",
    "intervals.report=32",
    "intervals.samples=64",
    "intervals.checkpoint=32",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 20 pictures, and an autoencoder of the TAESD family with random weights."""
    root = tmp_path_factory.mktemp("transfer")
    for style in ("apple", "orange"):
        (root / style).mkdir()
        for number in range(20):
            Image.fromarray(fruit(style, 0, number, 72)[0]).save(root / style / f"{number:02d}.png")
    foreign.taesd("taesd", 64).save_pretrained(root / "autoencoder")
    return root


def transfer(folders, out, *more):
    places = (folders / "apple", folders / "orange", "--autoencoder", folders / "autoencoder", "--out", out)
    return run("launch/transfer.py", *places, "--holdout", 5, "--flip", "--licence", "cc0-1.0", *more, *TINY)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "apple2orange"
    return out, transfer(folders, out)


def test_one_command_from_folders_to_a_sheet(finished):
    out, done = finished
    assert done.code == 0, done.err
    assert [line.split(" (")[0] for line in done.out.splitlines() if line.startswith("== ")] == [
        *("== 1/6 packing apple", "== 2/6 packing orange", "== 3/6 encoding apple", "== 4/6 encoding orange"),
        *("== 5/6 learning the energy from apple to orange", "== 6/6 translating pictures that no step has seen"),
    ]
    assert sum(line.startswith("$ python ") for line in done.out.splitlines()) == 6
    with Image.open(out / "translated/sheets/sheet-0000.png") as sheet:
        assert sheet.height > 3 * 64
    held_out = {f"{number:02d}.png" for number in (0, 4, 8, 12, 16)}
    assert {path.name for path in (out / "translated").glob("*.png")} == held_out
    assert Index.read(out / "latents/apple").meta["views"] == ["", "flip"]
    [times] = [line for line in done.out.splitlines() if line.startswith("done in ")]
    steps = ("packing", "encoding", "learning", "translating")
    shares = re.fullmatch(
        r"done in (\d+) s, by step \(and of processor time\): "
        + ", ".join(rf"{step} (\d+) \((\d+)\)" for step in steps),
        times,
    )
    whole, *parts = map(int, shares.groups())
    clock, processor = parts[::2], parts[1::2]
    assert whole - 20 < sum(clock) <= whole + 2 and all(seconds > 0 for seconds in processor)


def test_the_translator_folder_stands_alone(finished, folders):
    out, _ = finished
    translator = letit_dist.Translator.from_pretrained(out / "translator")
    picture = letit_dist.translate_picture(translator, Image.open(folders / "apple/04.png"))
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(out / "translated/04.png")))
    card = (out / "translator/README.md").read_text()
    assert "apple to orange" in card and "python launch/transfer.py" in card and "--holdout 5" in card
    front = ModelCard.load(out / "translator/README.md").data.to_dict()
    assert front["license"] == "cc0-1.0" and "## Licence\n\ncc0-1.0" in card
    assert front["letit_dist"]["data"] == "apple and orange, two folders of pictures"
    assert front["letit_dist"]["metrics"]["apple to orange: kernel distance, target itself"] < 1
    inside = Card.read(out / "translator/energies/apple2orange")
    assert inside.licence == "cc0-1.0" and inside.command.startswith("python launch/train_energy.py")
    assert inside.metrics == front["letit_dist"]["metrics"] and inside.data == front["letit_dist"]["data"]
    assert "not stated" in (out / "translator/autoencoder/README.md").read_text()  # nobody said it of that one
    assert translator.energy.extra["images_seen"] == 64


def of_published(folders, published, out, *more, to="orange"):
    (published / "LICENSE").write_text("MIT License\n\nCopyright")
    places = (folders / "apple", folders / to, "--autoencoder", published, "--out", out)
    return run("launch/transfer.py", *places, *more, *TINY)


def read(folder, kind, published):
    """Whether the autoencoder of a folder is the published one, licence and all."""
    wanted = import_autoencoder(kind, published, resolution=64).fingerprint()
    found = letit_dist.load_autoencoder(folder)
    return found.fingerprint() == wanted and found.card.licence == "mit"


def test_published_files_need_no_other_command(folders, tmp_path):
    published, out = tmp_path / "theirs", tmp_path / "out"
    foreign.publish(foreign.taesd("taesd"), published, "pth")
    done = of_published(folders, published, out)
    assert done.code == 2 and "give --resolution" in done.err and not out.exists()
    done = of_published(folders, published, out, "--resolution", 64, "--holdout", 5)
    assert done.code == 0, done.err
    assert "== 1/7 reading the autoencoder" in done.out and f"--from taesd {published} --resolution 64" in done.out
    assert read(out / "translator/autoencoder", "taesd", published)
    # What is there is not read again, so that the first step is to pack, which other settings end.
    again = of_published(folders, published, out, "--resolution", 64, "--holdout", 4)
    assert again.code == 2 and "== 1/6 packing" in again.out and "stopped in step 1" in again.err
    other = of_published(folders, published, out, "--resolution", 32)
    assert other.code == 2 and "for another --resolution: name another --out" in other.err


def test_so_do_those_of_diffusers(folders, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    published, out = tmp_path / "theirs", tmp_path / "out"
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
    ).save_pretrained(published)
    # What follows is as above: it ends where it finds no picture.
    (folders / "none").mkdir()
    done = of_published(folders, published, out, "--resolution", 64, to="none")
    assert done.code == 2 and "== 1/7 reading the autoencoder" in done.out and "== 3/7" in done.out
    assert f"--from diffusers {published} --resolution 64" in done.out
    assert read(out / "autoencoder", "diffusers", published)


def test_the_same_command_continues(finished, folders, tmp_path):
    import shutil

    out, _ = finished
    for name in ("shards/orange", "latents", "energy/export", "energy/checkpoints/images-000000000064", "translated"):
        shutil.rmtree(out / name)
    kept = files(out / "shards/apple")
    energy = letit_dist.Translator.from_pretrained(out / "translator").energy.fingerprint()
    done = transfer(folders, out)
    assert done.code == 0, done.err
    assert files(out / "shards/apple") == kept
    assert letit_dist.Translator.from_pretrained(out / "translator").energy.fingerprint() == energy
    assert (out / "translated/sheets/sheet-0000.png").is_file()


def test_a_step_that_fails_ends_it(finished, folders):
    out, _ = finished
    done = transfer(folders, out, "--holdout", 4)
    assert done.code == 2 and "stopped in step 1: the same command continues there" in done.err
    assert "== 2/6" not in done.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("training.imagess=3",), "did you mean 'images'"),
        (("--names", "a", "a"), "both folders are called a: name the domains with --names A B"),
        (("--names", "a", "b/c"), "--names 'b/c': a name, not a path"),
        (("--test", "nowhere"), "--test nowhere: no such folder"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--resolution", "64"), "which is for images of 64 pixels: leave it out"),
    ],
)
def test_bad_input_is_seen_before_the_first_step(folders, tmp_path, more, message):
    done = transfer(folders, tmp_path / "out", *more)
    assert done.code == 2 and message in done.err
    assert not (tmp_path / "out").exists() and "==" not in done.out


def test_folders_that_cannot_be(folders, tmp_path):
    given = ("--autoencoder", folders / "autoencoder", "--out")
    done = run("launch/transfer.py", folders / "apple", folders / "gone", *given, tmp_path / "out")
    assert done.code == 2 and f"no such folder: {folders / 'gone'}" in done.err
    done = run("launch/transfer.py", folders / "apple", folders / "apple", *given, tmp_path / "out")
    assert done.code == 2 and "is given twice" in done.err
    done = run("launch/transfer.py", folders / "apple", folders / "orange", *given, folders / "apple/run")
    assert done.code == 2 and "lies inside" in done.err and not (folders / "apple/run").exists()
    other = ("--autoencoder", tmp_path / "none", "--out", tmp_path / "out")
    done = run("launch/transfer.py", folders / "apple", folders / "orange", *other)
    assert done.code == 2 and "does not exist" in done.err and not (tmp_path / "out").exists()


# What pack.py holds out


def test_held_out_images_are_spread_and_in_no_other_part(folders, tmp_path):
    done = run("shards/pack.py", folders / "apple", "--out", tmp_path / "a", "--holdout", 6)
    assert done.code == 0, done.err
    train, test = (ShardDataset([tmp_path / "a" / split]) for split in ("train", "test"))
    keys = [[dataset.key(i) for i in range(len(dataset))] for dataset in (train, test)]
    assert keys[1] == ["00", "03", "06", "10", "13", "16"]
    assert sorted(keys[0] + keys[1]) == [f"{number:02d}" for number in range(20)]
    assert Index.read(tmp_path / "a/test").meta["split"] == "test"
    again = run("shards/pack.py", folders / "apple", "--out", tmp_path / "a", "--holdout", 6)
    assert again.code == 0 and again.out.count("already packed") == 2
    other = run("shards/pack.py", folders / "apple", "--out", tmp_path / "a", "--holdout", 7)
    assert other.code == 2 and "holdout: 6 -> 7" in other.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--holdout", 20), "--holdout 20: 1 to 19, there are 20 images"),
        (("--holdout", 0), "--holdout 0: 1 to 19"),
        (("--holdout", 2, "--split", "val"), "--holdout has no effect on a set that has splits (val)"),
    ],
)
def test_holdouts_that_cannot_be(folders, tmp_path, more, message):
    done = run("shards/pack.py", folders / "apple", "--out", tmp_path / "out", *more)
    assert done.code == 2 and message in done.err and not (tmp_path / "out").exists()
