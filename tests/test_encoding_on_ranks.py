"""Two processes write the bytes of one, whatever befalls one of them; and folders of pictures are encoded as shards."""

import numpy as np
import pytest
import torch
from conftest import tiny_autoencoder
from PIL import Image
from programs import files, run
from ranks import CPU2, ROOT, start

from letit_dist.autoencoders.identity import Identity, IdentityConfig
from letit_dist.data.encoding import EncodeOptions, Ranks, encode_domain
from letit_dist.data.folders import open_images_of
from letit_dist.data.index import JOURNAL_NAME, Index
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.errors import UserError


def encode(shards, out, fault="none", ranks=2):
    return start("tests/encode_on_ranks.py", shards, out, fault, launch=CPU2 if ranks == 2 else None, timeout=300)


def contents(folder):
    return {path.rpartition("/")[2]: digest for path, digest in files(folder).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fruit_shards):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("one") / "out"
    done = encode(fruit_shards / "apple/train", folder, ranks=1)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("*.tar"))) > 8
    return folder


def test_two_ranks_write_what_one_writes(fruit_shards, tmp_path, whole):
    done = encode(fruit_shards / "apple/train", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "out") == contents(whole)
    again = encode(fruit_shards / "apple/train", tmp_path / "out")
    assert again.returncode == 0 and again.stdout.count("already encoded by autoencoder") == 2
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        # Nothing is said for certain: the launcher may end rank 0 before that has noticed.
        ("kill", ""),
        ("unreadable", "[rank 0] error: picture.png: cannot be read"),
        ("bug", "ZeroDivisionError: a bug in one rank"),
    ],
)
def test_a_fault_of_one_rank_ends_all_and_costs_no_whole_shard(fruit_shards, tmp_path, whole, fault, says):
    out = tmp_path / "out"
    done = encode(fruit_shards / "apple/train", out, fault)
    assert done.returncode != 0 and says in done.stderr, done.stderr[-3000:]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert (out / JOURNAL_NAME).exists() and not (out / "index.json").exists()
    assert 1 <= len(stamps) < len(list(whole.glob("*.tar")))
    # Continued by one process, or by two: it is the same folder.
    again = encode(fruit_shards / "apple/train", out, ranks=1 if fault == "bug" else 2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert contents(out) == contents(whole)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_the_program_on_two_ranks(fruit_shards, tmp_path):
    Identity(IdentityConfig(resolution=32)).save_pretrained(tmp_path / "autoencoder")
    given = ("--autoencoder", tmp_path / "autoencoder", "--shards", fruit_shards / "orange/train", "--crops", 1)
    two = start("launch/encode_latents.py", *given, "--batch", 5, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr[-3000:]
    one = run("launch/encode_latents.py", *given, "--batch", 5, "--out", tmp_path / "one")
    assert one.code == 0, one.err
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    said = [line for line in two.stdout.splitlines() if line.startswith((str(tmp_path), "memory:"))]
    assert len(said) == 2 and "24 images of orange x 2 views as latents" in said[1]


def test_a_problem_of_one_rank_is_everybodys():
    outcomes = iter([[("no space", None), (None, 3)], [(None, 1), (None, 2)]])
    ranks = Ranks(1, 2, lambda mine: next(outcomes))
    with pytest.raises(UserError, match=r"^no space$"):
        ranks.share(lambda: 3)
    assert ranks.share(lambda: 2) == [1, 2]

    def broken(_):
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(UserError, match=r"lost the other ranks \(Connection closed by peer\)"):
        Ranks(0, 2, broken).share(int)


# Folders of pictures


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures of several sizes, formats and depths, some in a folder of their own, two that become one key."""
    folder = tmp_path_factory.mktemp("photos") / "cats"
    draw = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for number in range(12):
        side = (40, 33, 64)[number % 3]
        pixels = draw.integers(0, 256, (side, side + number, 3), dtype=np.uint8)
        name = ("a.b", "a_b", "more/x")[number] if number < 3 else f"{number:02d}"
        kind = ("png", "jpg", "webp")[number % 3]
        image = Image.fromarray(pixels).convert("RGBA" if number == 3 else "L" if number == 4 else "RGB")
        image.save(folder / f"{name}.{kind}", **({"lossless": True} if kind == "webp" else {}))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_gives_the_latents_of_its_shards(photos, tmp_path, workers):
    Identity(IdentityConfig(resolution=32)).save_pretrained(tmp_path / "autoencoder")
    packed = run("shards/pack.py", photos, "--out", tmp_path / "shards", "--resolution", 32)
    assert packed.code == 0, packed.err
    for name, images in (("direct", photos), ("packed", tmp_path / "shards")):
        given = ("--images", images, "--out", tmp_path / name, "--flip", "--batch", 5, "--workers", workers)
        done = run("launch/encode_latents.py", "--autoencoder", tmp_path / "autoencoder", *given)
        assert done.code == 0, done.err
    direct, through = (LatentSet.open(tmp_path / name) for name in ("direct", "packed"))
    assert direct.keys == through.keys and len(direct) == 24 and "a_b-2-flip" in direct.keys
    assert direct.json(0) == {"file": "03.png"} and direct.meta["domain"] == "cats"
    for name, values in through.fields.items():
        assert torch.equal(direct.fields[name], values)
        assert len(values.flatten(1).unique(dim=0)) == 24


def test_two_folders_of_pictures_suffice_for_an_energy(photos, fruit_shards, tmp_path):
    """The command line of the README, at tiny size."""
    dogs = tmp_path / "dogs"
    dogs.mkdir()
    oranges = ShardDataset([fruit_shards / "orange/train"])
    for sample in range(10):
        (dogs / f"{sample}.png").write_bytes(oranges.read(sample)["png"])
    tiny_autoencoder().save_pretrained(tmp_path / "autoencoder")
    for name, folder in (("cats", photos), ("dogs", dogs)):
        given = ("--autoencoder", tmp_path / "autoencoder", "--images", folder, "--out", tmp_path / "latents" / name)
        assert run("launch/encode_latents.py", *given).code == 0
    places = (f"data.source={tmp_path / 'latents/cats'}", f"data.target={tmp_path / 'latents/dogs'}")
    sizes = ("training.images=16", "training.batch=8", "intervals.samples=16", "intervals.checkpoint=16")
    command = (ROOT / "configs/energy/fruit.yaml", "--run", tmp_path / "run", f"autoencoder={tmp_path / 'autoencoder'}")
    done = run("launch/train_energy.py", *command, *places, *sizes, "recipe.optimizer.decay=null")
    assert done.code == 0, done.err
    assert list((tmp_path / "run/export").glob("*/model.safetensors"))


def test_changed_pictures_are_not_taken_for_encoded(photos, tmp_path):
    folder = tmp_path / "cats"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(folder / f"{number}.png")
    autoencoder = tiny_autoencoder().eval()

    def again():
        return encode_domain(autoencoder, open_images_of([str(folder)]), tmp_path / "out", EncodeOptions())

    assert "3 images of cats" in again() and "already encoded" in again()
    Image.open(photos / "03.png").resize((32, 32)).convert("RGB").save(folder / "1.png")
    with pytest.raises(UserError, match=r"other latents than asked for[^\n]*\nimage_shards: "):
        again()


def test_folders_that_cannot_be_encoded(photos, fruit_shards, tmp_path):
    def refused(*paths, match):
        with pytest.raises(UserError, match=match):
            dataset = open_images_of([str(path) for path in paths])
            encode_domain(tiny_autoencoder().eval(), dataset, tmp_path / "out", EncodeOptions())

    for name in ("trainA", "trainB"):
        (tmp_path / "apple2orange" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "apple2orange" / name / "1.png")
    refused(
        tmp_path / "apple2orange", match="taken for cyclegan, with apple/train, orange/train: pack it .* or name one"
    )
    refused(photos, fruit_shards / "apple/train", match="is a folder of images and .*apple/train is not")
    refused(fruit_shards / "apple", match=r"no index.json, there is one in .*apple/test")
    refused(tmp_path / "nowhere", match="no such shard folder")
    (tmp_path / "small").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "small" / "s.png")
    refused(tmp_path / "small", match=r"small/s.png is 40x20, smaller than the autoencoder's 32: .*--enlarge")
    (tmp_path / "small" / "s.png").write_bytes(b"no picture")
    refused(tmp_path / "small", match=r"small/s.png: not an image")
    assert not Index.read(fruit_shards / "apple/train").meta.get("autoencoder_fingerprint")
