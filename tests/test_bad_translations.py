"""Bad input to translating and to its scores: clear lines, and nothing on disk touched."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from programs import STYLES, run
from refusals import one, photograph

from letit_dist.data.writer import ShardWriter

# Translating


def translate(chain, source, out, *options, energy=None):
    return ("launch/translate.py", source, "--energy", energy or chain.energy(), "--out", out, *options)


def test_an_energy_of_another_autoencoder(refused, chain, stranger, tmp_path):
    line = one(refused(*translate(chain, chain.images("apple"), tmp_path / "out", "--autoencoder", stranger)))
    assert "was trained on the latents of autoencoder " in line and f"{stranger} is autoencoder" in line


def test_no_energy(refused, chain, tmp_path):
    def line(energy):
        return one(refused(*translate(chain, chain.images("apple"), tmp_path / "out", energy=energy)))

    assert line(tmp_path / "nowhere").startswith(f"no such energy: {tmp_path / 'nowhere'}")
    assert line(chain.autoencoder).startswith(f"{chain.autoencoder} is no run of launch/train_energy.py")
    shutil.copytree(chain.energy(), tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    assert "the run has not finished, start it again" in line(tmp_path / "run")
    shutil.copytree(chain.energy(), tmp_path / "moved")
    config = tmp_path / "moved/config.yaml"
    config.write_text(config.read_text().replace(str(chain.autoencoder), "runs/elsewhere"))
    assert "its autoencoder runs/elsewhere is not there: name it with --autoencoder" in line(tmp_path / "moved")
    assert not (tmp_path / "out").exists()


def test_which_domain_to_go_to(refused, chain, tmp_path):
    both = ("--energy", chain.energy(*STYLES[::-1]), chain.energy())
    command = translate(chain, chain.images("apple"), tmp_path / "out", *both)
    ways = "they go: orange to apple, apple to orange"
    assert one(refused(*command)) == f"several energies fit, {ways}; give --to"
    assert one(refused(*command, "--to", "pear")) == f"--to pear: none of the energies goes there, {ways}"
    twice = (*command, chain.energy(), "--to", "orange")
    assert one(refused(*twice)) == f"--to orange: several energies fit, {ways}, apple to orange; give --from"
    command = translate(chain, chain.images("apple"), tmp_path / "out", "--to", "apple")
    assert one(refused(*command)) == "--to apple: none of the energies goes there, they go: apple to orange"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--strength", 1.5], "strength is the fraction of the chain to walk, in [0, 1], got 1.5"),
        (["--steps", -1], "steps: "),
        (["--step-size", 0], "step_size: "),
        (["--batch", 0], "--batch and --limit must be at least 1"),
        (["--limit", 0], "--batch and --limit must be at least 1"),
        (["--memory", 0], "--memory 0: expected GiB, more than 0"),
        (["--memory", -1.5], "--memory -1.5: expected GiB, more than 0"),
        (["--memory", 0.01], "one image at a time takes about "),
    ],
)
def test_settings_of_the_chain(refused, chain, tmp_path, options, expected):
    assert one(refused(*translate(chain, chain.images("apple"), tmp_path / "out", *options))).startswith(expected)
    assert not (tmp_path / "out").exists()


def test_results_never_lie_among_the_input(refused, chain, tmp_path):
    photograph(tmp_path / "in/a.png")

    def line(source, out):
        return one(refused(*translate(chain, source, out), keeps=[tmp_path]))

    assert "is where the input lies" in line(tmp_path / "in", tmp_path / "in")
    assert "is where the input lies" in line(tmp_path / "in/a.png", tmp_path / "in")
    assert "is where the input lies" in line(chain.images("apple"), chain.images("apple"))
    assert "lies inside" in line(tmp_path / "in", tmp_path / "in/results")
    assert "is a file, expected a folder" in line(chain.images("apple"), tmp_path / "in/a.png")
    assert "cannot write to" in line(chain.images("apple"), tmp_path / "in/a.png/results")
    # Beside the input is fine.
    assert run(*translate(chain, tmp_path / "in", tmp_path / "out")).code == 0
    assert run(*translate(chain, tmp_path / "in/a.png", tmp_path / "in/results")).code == 0


def test_nothing_to_translate(refused, chain, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/notes.txt").write_text("no image")
    for name in ("empty", "text"):
        line = one(refused(*translate(chain, tmp_path / name, tmp_path / "out")))
        assert line.startswith(f"{tmp_path / name} holds no images (")
    line = one(refused(*translate(chain, tmp_path / "nowhere", tmp_path / "out")))
    assert line == f"no such image or folder: {tmp_path / 'nowhere'}"
    assert "one image a sample was expected" in one(
        refused(*translate(chain, chain.latents("apple"), tmp_path / "out"))
    )


@pytest.fixture
def photos(tmp_path):
    """Four images that can be read, two of them unusual, and four that cannot."""
    folder = tmp_path / "photos"
    good = photograph(folder / "good.png").read_bytes()
    photograph(folder / "more.jpg", 1)
    rows = np.random.default_rng(2).integers(0, 65536, (40, 40), np.uint16)
    Image.fromarray(rows).save(folder / "deep.png")
    Image.fromarray(np.zeros((40, 40, 4), np.uint8), "CMYK").save(folder / "ink.jpg")
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.webp").touch()
    frames = [Image.fromarray(np.full((40, 40, 3), shade, np.uint8)) for shade in (0, 99, 200)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / ".hidden.png").write_text("not looked at")
    return folder


def test_unreadable_images_are_left_out_and_listed(chain, photos, tmp_path):
    done = run(*translate(chain, photos, tmp_path / "out", "--max-bad-fraction", 0.2, "--sheet"))
    assert done.code == 0 and not done.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        *("deep.png", "good.png", "ink.png", "more.png")
    ]
    left_out = dict(line.removeprefix("left out: ").split(": ", 1) for line in done.out.splitlines()[1:5])
    assert sorted(left_out) == [str(photos / name) for name in ("cut.png", "empty.webp", "moving.gif", "text.png")]
    assert left_out[str(photos / "empty.webp")] == "empty file"
    assert "3 frames" in left_out[str(photos / "moving.gif")] and "truncated" in left_out[str(photos / "cut.png")]
    assert done.out.splitlines()[5] == f"4 translations in {tmp_path / 'out'}, 4 unreadable images left out"


def test_too_many_unreadable_images_stop_the_program(refused, chain, photos, tmp_path):
    line = one(refused(*translate(chain, photos, tmp_path / "out"), keeps=[photos]))
    # A twentieth of twenty images at least: the second one is too much.
    assert "2 of 8 images cannot be read, more than --max-bad-fraction 0.05 allows; the first: " in line
    assert f"{photos / 'cut.png'} (" in line and f"{photos / 'empty.webp'} (empty file)" in line


@pytest.mark.parametrize("name", ["cut.png", "text.png", "empty.webp", "moving.gif"])
def test_a_single_unreadable_image_is_an_error(refused, chain, photos, tmp_path, name):
    line = one(refused(*translate(chain, photos / name, tmp_path / "out", "--max-bad-fraction", 1)))
    assert line.startswith(f"cannot be read: {photos / name} (")
    assert not (tmp_path / "out").exists()


# Scores


def score(chain, *options, train=None, test=None):
    train = train or [chain.images(style) for style in STYLES]
    command = ("eval/translation.py", chain.energy(), "--train", *train, "--judge-steps", 1)
    return (*command, "--test", test or chain.images("apple", "test"), *options)


def test_wrong_images_to_score(refused, chain, tmp_path):
    out = ("--out", tmp_path / "out")
    run("shards/pack.py", "builtin:fruit", "--out", tmp_path / "big", "--resolution", 40, "--count", 2, "--test", 1)
    apples, oranges = (tmp_path / "big" / style / "train" for style in STYLES)
    lines = refused(*score(chain, *out, "--pairs", oranges, train=[apples, oranges], test=apples))
    assert lines == [f"--{n} holds images of 40x40, the autoencoder takes 32x32" for n in ("train", "test", "pairs")]
    line = one(refused(*score(chain, *out, train=[chain.images("apple"), oranges])))
    assert "the two domains have images of different sizes (32x32 and 40x40)" in line
    line = one(refused(*score(chain, *out, "--pairs", chain.images("orange", "test"))))
    assert line == "--pairs: 8 of 8 test images have no counterpart, e.g. 'apple-1000000'"
    assert "no such shard folder" in one(refused(*score(chain, *out, test=tmp_path / "nowhere")))
    with ShardWriter(tmp_path / "plain", meta={"resolution": 32}) as writer:
        writer.write("a", {"png": photograph(tmp_path / "a.png", size=(32, 32)).read_bytes()})
    line = one(refused(*score(chain, *out, test=tmp_path / "plain")))
    assert line.startswith("--test has the factors none, --train has background_brightness, ")
    with ShardWriter(tmp_path / "bad", meta={"resolution": 32}) as writer:
        writer.write("a", {"png": b"no image"})
    line = one(refused(*score(chain, *out, train=[tmp_path / "bad", chain.images("orange")])))
    assert f"{tmp_path / 'bad/shard-00000.tar'}: a: not an image" in line
    (tmp_path / "file").touch()
    assert "is a file, expected a folder" in one(refused(*score(chain, "--out", tmp_path / "file")))
    assert "must be at least 1" in one(refused(*score(chain, *out, "--judge-steps", 0)))


def test_a_judge_folder_that_holds_something_else(refused, chain, tmp_path):
    out = ("--out", tmp_path / "out", "--judge", tmp_path / "judge")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/config.json").write_text(json.dumps({"names": []}))
    assert "no model.safetensors in it" in one(refused(*score(chain, *out), keeps=[tmp_path / "judge"]))
    os.remove(tmp_path / "judge/config.json")
    (tmp_path / "judge/thesis.tex").touch()
    assert "thesis.tex" in one(refused(*score(chain, *out), keeps=[tmp_path / "judge"]))
