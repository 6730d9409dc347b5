"""Bad input to the programs: one clear line a problem, exit code 2, and nothing on disk touched."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, STYLES, Chain, files, run, shared_chain

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.autoencoders.vqvae2 import VQVAE2Config
from letit_dist.data.writer import ShardWriter
from letit_dist.pretrained import find_folder

PRETRAIN = ("launch/pretrain.py", ROOT / "configs/debug/vqvae2.yaml")
ENERGY = ("launch/train_energy.py", ROOT / "configs/energy/fruit.yaml")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return shared_chain(tmp_path_factory)


@pytest.fixture(scope="module")
def stranger(chain, tmp_path_factory):
    """Another autoencoder with the same shapes."""
    torch.manual_seed(1)
    config = {"resolution": 32, "channels": 16, "residual_blocks": 1, "residual_channels": 8, "code_dim": 8}
    folder = tmp_path_factory.mktemp("stranger") / "autoencoder"
    build_autoencoder(VQVAE2Config(**config, codes=32)).save_pretrained(folder)
    return folder


@pytest.fixture
def refused(chain):
    """Call a program: its error lines, having seen that it exits with 2 and leaves every file as it was."""

    def call(*command, keeps=()):
        before = files(chain.root, *keeps)
        done = run(*command)
        assert done.code == 2, done.out
        assert files(chain.root, *keeps) == before
        assert done.errors and all(line.startswith("error: ") for line in done.errors), done.err
        return [line.removeprefix("error: ") for line in done.errors]

    return call


def one(lines):
    assert len(lines) == 1, lines
    return lines[0]


def energy_command(chain: Chain, run_folder, **changed):
    places = {"autoencoder": chain.autoencoder, "source": chain.latents("apple"), "target": chain.latents("orange")}
    places |= changed
    data = (f"data.source={places['source']}", f"data.target={places['target']}")
    return (*ENERGY, "--run", run_folder, f"autoencoder={places['autoencoder']}", *data)


def photograph(path, number=0, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(array).save(path)
    return path


# Configurations


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.imagess=3"], ["command line: training.imagess: unknown key, did you mean 'images'?"]),
        (["colour=3"], ["command line: colour: unknown key (known here: autoencoder, recipe, data, "]),
        (["training.batch"], ["cannot read the override 'training.batch': expected key=value"]),
        (
            ["autoencoder.resolution=36"],
            ["autoencoder.resolution: must be divisible by 8 (the top level has stride 8)"],
        ),
        (["autoencoder.kind=vqvea2"], ["unknown autoencoder kind 'vqvea2', did you mean 'vqvae2'?"]),
        (["training.batch=[16, 8]"], ["training.batch: 2 values, but this recipe does not grow: give 1"]),
        (
            ["training.batch=0", "data.flip=perhaps", "autoencoder.codes=1"],
            ["autoencoder.codes: ", "data.flip: ", "training.batch: "],
        ),
        (["data.train=[nowhere]"], ["no such shard folder: nowhere"]),
    ],
)
def test_configurations_of_pretraining(refused, chain, tmp_path, overrides, expected):
    lines = refused(*PRETRAIN, "--run", tmp_path / "new", *chain.pretrain[4:], *overrides)
    assert len(lines) == len(expected)
    for line, part in zip(sorted(lines), expected, strict=True):
        assert part in line
    assert not (tmp_path / "new").exists()


def test_configuration_files(refused, tmp_path):
    missing = one(refused("launch/pretrain.py", ROOT / "configs/debug/vqvae.yaml", "--run", tmp_path / "new"))
    assert missing.startswith("no such file: ") and missing.endswith("vqvae2.yaml?")
    own = tmp_path / "own.yaml"
    own.write_text(f"base: {ROOT}/configs/debug/vqvae2.yaml\ntraining:\n  bach: 4\n")
    line = one(refused("launch/pretrain.py", own, "--run", tmp_path / "new"))
    assert line == f"{own}: training.bach: unknown key, did you mean 'batch'?"
    own.write_text("training: [1")
    assert "is not valid YAML" in one(refused("launch/pretrain.py", own, "--run", tmp_path / "new"))
    lines = refused(*ENERGY, "--run", tmp_path / "new")
    assert lines == ["autoencoder: required and not given", "data: required and not given"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [PRETRAIN, ENERGY])
def test_a_run_folder_must_be_named(chain, command):
    done = run(*command)
    assert done.code == 2 and done.errors[-1].endswith("error: --run is required (or --check)")


def test_batches_that_do_not_divide_over_the_ranks(chain, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for command in (chain.pretrain, chain.train_energy(*STYLES)):
        done = run(*command, "--check")
        assert done.code == 2
        line = "[rank 0] error: training.batch: 16 images do not divide over 3 ranks (try 15 or 18)\n"
        assert done.err == line


def test_a_recipe_of_the_other_stage(refused, chain, tmp_path):
    other = "recipe={kind: vqvae2, optimizer: {learning_rate: 1e-3}}"
    line = one(refused(*energy_command(chain, tmp_path / "new"), other))
    assert "recipe.kind: vqvae2 trains autoencoders (launch/pretrain.py)" in line
    other = "recipe={kind: latent_energy, optimizer: {learning_rate: 1e-3}, langevin: {steps: 1, step_size: 1.0}}"
    line = one(refused(*PRETRAIN, "--run", tmp_path / "new", *chain.pretrain[4:], other))
    assert "recipe.kind: latent_energy trains energies (launch/train_energy.py)" in line
    assert not (tmp_path / "new").exists()


# Run folders


def test_images_of_another_size(refused, chain, tmp_path):
    command = (*PRETRAIN, "--run", tmp_path / "new", *chain.pretrain[4:], "autoencoder.resolution=64")
    line = one(refused(*command))
    assert "data.train holds images of 32x32, autoencoder.resolution is 64" in line and "--resolution 64" in line
    assert not (tmp_path / "new").exists()


def test_a_run_folder_of_another_configuration(refused, chain):
    lines = refused(*chain.pretrain, "training.seed=7", "autoencoder.codes=16")
    assert f"{chain.autoencoder} belongs to another configuration" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["autoencoder.codes: 32 -> 16", "training.seed: 0 -> 7"]
    lines = refused(*chain.train_energy(*STYLES), "recipe.langevin.steps=9")
    assert [line.strip() for line in lines[1:]] == ["recipe.langevin.steps: 3 -> 9"]
    command = list(chain.pretrain)
    command[3] = chain.fruit
    assert f"{chain.fruit} is not empty and is no run folder" in one(refused(*command))
    command[3] = chain.autoencoder / "config.yaml"
    assert "is a file, expected a run folder" in one(refused(*command))


def test_the_checkpoint_of_another_architecture(refused, chain, tmp_path):
    shutil.copytree(chain.autoencoder, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("channels: 16", "channels: 24"))
    checkpoints = tmp_path / "run/checkpoints"
    lines = refused(
        *PRETRAIN, "--run", tmp_path / "run", *chain.pretrain[4:], "autoencoder.channels=24", keeps=[checkpoints]
    )
    assert len(lines) > 5
    assert all("checkpoints/images-000000000960: autoencoder." in line for line in lines)
    assert all("expected shape" in line and "got" in line for line in lines)


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
