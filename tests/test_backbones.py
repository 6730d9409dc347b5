"""eval/backbones.py: one pair on several backbones, one table; what it makes, reuses and refuses."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import tiny_autoencoder
from PIL import Image
from programs import ROOT, TINY_ENERGY, files, run, shared_chain

import letit_dist
from letit_dist.autoencoders.taesd import TAESD
from letit_dist.pictures import columns
from letit_dist.training.setup import seed_weights


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return shared_chain(tmp_path_factory)


@pytest.fixture(scope="module")
def place(chain, tmp_path_factory):
    """A folder with a file of two backbones: the chain's, and one of the TAESD family with random weights."""
    root = tmp_path_factory.mktemp("backbones")
    seed_weights(3)
    TAESD(TAESD.tiny).save_pretrained(root / "taesd")
    sides = {}
    for name, style in (("source", "orange"), ("target", "apple")):
        sides[name] = {split: str(chain.images(style, split)) for split in ("train", "test")}
    tree = {
        **sides,
        "pairs": False,
        "flip": True,
        "judge_steps": 60,
        "energy": str(ROOT / "configs/energy/fruit.yaml"),
        "overrides": [*TINY_ENERGY, "training.images=250"],  # ends at 256, with its batch
        "backbones": {"own": str(chain.autoencoder), "taesd": str(root / "taesd")},
    }
    (root / "pair.yaml").write_text(yaml.safe_dump(tree))
    return root


def compare(place, out, *more):
    return run("eval/backbones.py", place / "pair.yaml", "--out", out, *more, "--lpips")


def lines(out):
    return [json.loads(line) for line in (out / "backbones.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(place):
    out = place / "out"
    return out, compare(place, out)


def test_one_table_one_line_a_backbone_one_sheet(finished, place, chain):
    out, done = finished
    assert done.code == 0, done.err
    table = [line for line in done.out.splitlines() if line.startswith("|")]
    assert table[0].split()[1::2][:4] == ["backbone", "latents", "psnr", "ssim"] and "pair_error" not in table[0]
    assert [line.split()[1] for line in table[2:]] == ["own", "taesd"]
    own, taesd = lines(out)
    assert (own["latents"], taesd["latents"]) == ("16x8x8", "4x8x8")
    assert own["autoencoder"] == letit_dist.load_autoencoder(chain.autoencoder).fingerprint()
    assert own["judge"] == taesd["judge"] and own["real_accuracy"] == taesd["real_accuracy"]
    assert all(row[f"{what}_seconds"] > 0 for row in (own, taesd) for what in ("encode", "train", "translate"))
    assert own["train_seconds"] != own["encode_seconds"]
    with Image.open(out / "backbones.png") as sheet:
        assert sheet.width == 5 * (96 + 3) + 3 and sheet.height > 8 * (96 + 3)
    assert (out / "own/translation.png").is_file() and (out / "taesd/translation.jsonl").is_file()


def test_the_numbers_are_those_of_the_other_programs(finished, chain, tmp_path):
    out, _ = finished
    row = lines(out)[0]
    tests = [chain.images(style, "test") for style in ("orange", "apple")]
    done = run("eval/reconstruction.py", "--autoencoder", chain.autoencoder, *tests, "--out", tmp_path / "r", "--lpips")
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "r/reconstruction.jsonl").read_text().splitlines()[-1])
    assert again["data"] == "all" and again["images"] == 16
    assert [row[name] for name in ("psnr", "ssim", "mse")] == [again[name] for name in ("psnr", "ssim", "mse")]
    given = ("--judge", out / "judge", "--judge-steps", 60, "--lpips", "--baselines", "mean-shift")
    train = ("--train", chain.images("orange"), chain.images("apple"))
    done = run("eval/translation.py", out / "own/energy", *train, "--test", tests[0], "--out", tmp_path / "t", *given)
    assert done.code == 0, done.err
    scores = [json.loads(line) for line in (tmp_path / "t/translation.jsonl").read_text().splitlines()]
    real, recon, shift, moved = scores
    assert row["real_accuracy"] == real["target_accuracy"]
    assert row["reconstruction_accuracy"] == recon["target_accuracy"]
    assert row["mean_shift_accuracy"] == shift["target_accuracy"]
    assert row["real_accuracy"] < row["reconstruction_accuracy"] < row["target_accuracy"], "or a mix-up would not show"
    for name in ("target_accuracy", "content_error", "l2_to_source"):
        assert row[name] == pytest.approx(moved[name], rel=1e-4), name


def test_mirrored_latents_teach_the_energy_and_no_baseline(finished):
    """The stored views of an image follow one another: every second one is the mirrored."""
    from letit_dist.data.latents import LatentSet
    from letit_dist.data.reader import ShardDataset
    from letit_dist.data.transforms import to_images
    from letit_dist.energy.translate import open_translator
    from letit_dist.evaluation.backbones import BackbonesConfig, Job, stored_latents

    out, _ = finished
    translator = open_translator(out / "own/energy")
    config = yaml.safe_load((out.parent / "pair.yaml").read_text())
    job = Job(BackbonesConfig(**config), out, lambda *_: None, torch.device("cpu"), 1 << 30)
    source, _ = stored_latents(job, "own", translator)
    assert len(LatentSet.open(out / "own/latents/source")) == 2 * len(source)
    apples = ShardDataset([config["source"]["train"]])
    expected = translator.encode(to_images(torch.stack([apples.pixels(i) for i in range(len(apples))])))
    assert torch.allclose(source, expected, atol=1e-5)


def test_the_same_command_uses_what_is_finished(finished, place):
    out, first = finished
    before = files(out)
    done = compare(place, out)
    assert done.code == 0, done.err
    assert "$ python" in first.out and "$ python" not in done.out
    assert done.out.count("already trained") == 2 and done.out.count("already encoded") == 4
    assert files(out) == before
    assert done.out.splitlines()[-4:] == first.out.splitlines()[-4:]


def test_what_was_lost_is_made_again_and_nothing_else(finished, place):
    out, first = finished
    own, rows = files(out / "own"), lines(out)
    for name in ("latents/target", "energy/export", "energy/checkpoints/images-000000000256"):
        shutil.rmtree(out / "taesd" / name)
    (out / "taesd/backbone.json").unlink()
    done = compare(place, out)
    assert done.code == 0, done.err
    assert done.out.count("$ python launch/train_energy.py") == 1 and done.out.count("already encoded") == 3
    assert files(out / "own") == own

    def measured(row):
        return {name: value for name, value in row.items() if "seconds" not in name}

    assert [measured(row) for row in lines(out)] == [measured(row) for row in rows]
    assert lines(out)[0] == rows[0]
    assert first.out.count("$ python launch/train_energy.py") == 2


def test_another_autoencoder_under_an_old_name_is_refused(finished, place):
    out, _ = finished
    before = files(out)
    tiny_autoencoder(5).save_pretrained(place / "other")
    done = compare(place, out, f"backbones.own={place / 'other'}")
    assert done.code == 2 and "holds other latents than asked for" in done.err
    assert files(out) == before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (("backbones.gone=/nowhere/at/all",), "backbones.gone: no weights at /nowhere/at/all: it does not exist"),
        (("backbones.judge=x",), "'judge' cannot name a backbone"),
        (("backbones=null",), "backbones: Input should be a valid dictionary"),
        (("overrides=[training.imagess=3]",), "did you mean 'images'"),
        (("pairs=true",), "have no counterpart"),
        (("energi=x",), "did you mean 'energy'"),
        (("--batch", "0"), "--batch must be at least 1"),
    ],
)
def test_bad_input_is_seen_before_any_work(place, tmp_path, changes, complaint):
    done = compare(place, tmp_path / "new", *changes)
    assert done.code == 2 and complaint in done.err, done.err
    assert not (tmp_path / "new").exists()


def test_backbones_of_several_sizes_have_no_common_table(place, tmp_path):
    tiny_autoencoder(5, resolution=64).save_pretrained(tmp_path / "larger")
    done = compare(place, tmp_path / "new", f"backbones.larger={tmp_path / 'larger'}")
    assert done.code == 2 and "different sizes (own 32, taesd 32, larger 64): a table needs one" in done.err


def test_columns_of_a_sheet_stand_under_their_names():
    white, black = torch.ones(2, 3, 100, 100), -torch.ones(1, 3, 100, 100)
    sheet = columns({"white": white, "black,\nof two lines": black}, cell=100)
    head = sheet.height - 2 * 103
    assert sheet.width == 2 * 103 + 3 and head > 20
    assert sheet.getpixel((150, head + 50)) == (0, 0, 0) and sheet.getpixel((50, head + 50)) == (255, 255, 255)
    assert sheet.getpixel((150, head + 103 + 50)) == (255, 255, 255), "a column may be shorter"


def test_another_judge_measures_anew_and_trains_nothing(finished, place):
    """Last in this file: it changes what the others look at."""
    out, _ = finished
    before = lines(out)
    done = compare(place, out, "judge_steps=10")
    assert done.code == 0 and "$ python" not in done.out, done.err
    assert all(row["judge"] != old["judge"] for row, old in zip(lines(out), before, strict=True))
    assert all(row["psnr"] == old["psnr"] for row, old in zip(lines(out), before, strict=True))
