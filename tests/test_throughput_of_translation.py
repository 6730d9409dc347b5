"""eval/throughput.py beta_vae, decode and translate: what they set against each other, and that a fault is seen."""

import re
import sys

import pytest
import torch
from programs import ROOT, run

from letit_dist.autoencoders.beta_vae import BetaVAEConfig
from letit_dist.errors import UserError

sys.path.insert(0, str(ROOT / "eval"))  # as Python does for a program there

from speed.beta_vae_sides import BetaVaeSides
from speed.models import make_translator
from speed.training_sides import Setting
from speed.translate_sides import DecodeSides, TranslateSides, make_pictures

THROUGHPUT = "eval/throughput.py"
SIZES = {"vqvae2": 32, "alae": 32, "beta_vae": 64, "taesd": 64}


def rows_of(done) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines() if line[:2] == "| "]


# An iteration of a beta-VAE


@pytest.fixture
def beta_vae_sides(fresh_accelerate, tmp_path):
    fresh_accelerate()
    return BetaVaeSides(BetaVAEConfig(latent_dim=4), tmp_path, Setting(2, "fp64"))


def test_an_iteration_of_a_beta_vae_is_the_published_one(beta_vae_sides):
    for _ in range(2):  # the second one with moments of the first
        found = beta_vae_sides.compare(1e-6)
    assert set(found) == {"loss", "weights"}


def wrong_beta(sides):
    sides.naive.beta *= 1.01


def wrong_rate(sides):
    sides.naive.optimizer.param_groups[0]["lr"] *= 1.01


def wrong_bias(sides):
    with torch.no_grad():
        sides.recipe.autoencoder.decoder[3].bias += 0.1


@pytest.mark.parametrize(("fault", "kind"), [(wrong_beta, "loss"), (wrong_rate, "weights"), (wrong_bias, "loss")])
def test_a_wrong_formula_of_a_beta_vae_is_seen(beta_vae_sides, fault, kind):
    fault(beta_vae_sides)
    with pytest.raises(UserError, match=f"the two sides disagree: {kind} by"):
        beta_vae_sides.compare(1e-6)


def test_beta_vae(tmp_path):
    done = run(THROUGHPUT, "beta_vae", "--latent", 4, "--batch", 4, "--repeats", 2, "--flops", "--out", tmp_path)
    assert done.code == 0, done.err
    header, _, row = rows_of(done)
    cells = dict(zip(header, row, strict=True))
    assert re.match(r"float64: loss .*, weights .*; float32: loss", cells["agreement"])
    assert float(cells["ours, images/s"]) > 0 and cells["of the peak"] == "-"
    rate = float(cells["GFLOP an image"]) * float(cells["ours, images/s"])
    assert float(cells["ours, GFLOP/s"]) == pytest.approx(rate, rel=0.02)
    assert "model FLOP utilisation" in next(tmp_path.glob("*-beta_vae.md")).read_text()


# Frozen autoencoders


@pytest.fixture
def translator():
    return lambda kind: make_translator(kind, SIZES[kind], "tiny", steps=2)


@pytest.mark.parametrize("kind", SIZES)
def test_decoding_is_the_published_one(translator, kind):
    sides = DecodeSides(translator(kind), torch.device("cpu"), batch=2)
    found = sides.compare()
    assert found["float64"] < 1e-12 and found["float32"] < 1e-4


@pytest.mark.parametrize("kind", SIZES)
def test_a_decoder_of_other_weights_is_seen(translator, kind, monkeypatch):
    sides = DecodeSides(translator(kind), torch.device("cpu"), batch=2)
    names = [n for n in sides.naive.network.weights if n.startswith(("decoder", "generator")) and n.endswith("weight")]
    sides.naive.network.weights[names[0]] *= 2
    with pytest.raises(UserError, match="the two sides disagree: float32 by"):
        sides.compare()
    sides = DecodeSides(translator(kind), torch.device("cpu"), batch=2)
    work = type(sides.translator).decode
    wrong = {"decode": lambda self, latents, **noise: 1.01 * work(self, latents, **noise)}
    monkeypatch.setattr(type(sides.translator), *wrong.popitem())
    with pytest.raises(UserError, match="the two sides disagree"):
        sides.compare()


def test_decode(tmp_path):
    tiny = ("--width", "tiny", "--resolution", 64, "--batch", 2, "--repeats", 1)
    done = run(THROUGHPUT, "decode", *tiny, "--bf16", "--plain", "--out", tmp_path)
    assert done.code == 0, done.err
    _, _, *rows = rows_of(done)
    assert [row[0] for row in rows] == [f"{kind}, 64 pixels" for kind in ("vqvae2", "alae", "beta_vae", "taesd")]
    assert all(re.match(r"float64 \de[-+]\d+, float32 ", row[-1]) for row in rows)


# Whole translations


@pytest.mark.parametrize("kind", SIZES)
def test_a_translation_is_the_published_one(translator, kind, tmp_path):
    sides = TranslateSides(translator(kind), tmp_path, torch.device("cpu"), images=3, batch=2)
    found = sides.compare()
    assert list(found) == ["latents", "chains", "images", "files"]
    assert max(found["latents"], found["chains"], found["images"]) < 1e-9
    assert len(list((tmp_path / "ours").iterdir())) == len(list((tmp_path / "naive").iterdir())) == 3
    assert set(sides.shares(1)) == {"encode", "chain", "decode"}
    # Both leave the parameters' flags alone, and the plain chain made their gradients.
    assert all(weight.grad is not None for weight in sides.chain.weights.values())


def lost_file(sides):
    run = sides.run_ours
    sides.run_ours = lambda: (run(), next((sides.folder / "ours").iterdir()).unlink())


def dark_file(sides):
    run = sides.run_naive

    def darker():
        run()
        from PIL import Image

        path = next((sides.folder / "naive").iterdir())
        Image.open(path).point(lambda value: max(0, value - 8)).save(path)

    sides.run_naive = darker


@pytest.mark.parametrize(("fault", "message"), [(lost_file, "different files"), (dark_file, "files by")])
def test_wrong_files_are_seen(translator, tmp_path, fault, message):
    sides = TranslateSides(translator("alae"), tmp_path, torch.device("cpu"), images=3, batch=2)
    fault(sides)
    with pytest.raises(UserError, match=message):
        sides.compare()


@pytest.mark.parametrize("part", ["encode", "transport", "decode"])
def test_a_wrong_part_is_seen(translator, tmp_path, monkeypatch, part):
    sides = TranslateSides(translator("vqvae2"), tmp_path, torch.device("cpu"), images=1, batch=1)
    work = getattr(type(sides.translator), part)

    def wrong(self, given, **options):
        result = work(self, given, **options)
        if part == "transport":
            return type(result)(result.latents * 1.001, result.shift, result.steps)
        return result * 1.001

    monkeypatch.setattr(type(sides.translator), part, wrong)
    kind = {"encode": "latents", "transport": "chains", "decode": "images"}[part]
    with pytest.raises(UserError, match=f"the two sides disagree: {kind} by 0.001"):
        sides.compare()


def test_translate(tmp_path):
    tiny = ("--width", "tiny", "--resolution", 64, "--batch", 2, "--images", 3, "--steps", 2, "--repeats", 1)
    done = run(THROUGHPUT, "translate", *tiny, "--flops", "--out", tmp_path)
    assert done.code == 0, done.err
    header, _, *rows = rows_of(done)
    assert len(rows) == 4 and "ours, images/s" in header and "ours, MiB" in header
    for kind in ("vqvae2", "alae", "beta_vae", "taesd"):
        line = next(line for line in done.out.splitlines() if line.startswith(f"{kind}, 64 pixels: "))
        parts = [float(share) for share in re.findall(r"\(([\d.]+)%\)", line)]
        assert len(parts) == 3 and sum(parts) == pytest.approx(100, abs=0.2)
    done = run(THROUGHPUT, "translate", "--steps", 0)
    assert done.code == 2 and "--steps 0: must be at least 1" in done.err


def test_pictures_are_the_same_every_time(tmp_path):
    one, two = (make_pictures(tmp_path / name, 16, 2) for name in ("one", "two"))
    files = [[path.read_bytes() for path in sorted(folder.iterdir())] for folder in (one, two)]
    assert files[0] == files[1] and files[0][0] != files[0][1]
