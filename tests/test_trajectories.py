"""Trajectories against paths walked with everything kept, the energies on them, and the files they become."""

import json
from itertools import pairwise

import pytest
import torch
from figure_runs import make_runs, opened
from PIL import Image
from programs import run

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.data.inputs import open_images
from letit_dist.data.transforms import to_images, to_pixels
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator
from letit_dist.evaluation import trajectories
from letit_dist.evaluation.energy_run import EnergyRun
from letit_dist.evaluation.trajectories import Trajectory, follow, spread, write_trajectories
from letit_dist.evaluation.translating import TranslateOptions
from letit_dist.pictures import beside, captioned, save_frames, stacked, to_picture, visible_size
from letit_dist.registry import AUTOENCODERS


@pytest.fixture(scope="module")
def runs(tmp_path_factory, fruit_latents):
    return make_runs(tmp_path_factory.mktemp("runs"), fruit_latents)


@pytest.fixture(scope="module")
def apples(fruit_shards):
    return fruit_shards / "apple/test"


def first(path, resolution=32):
    return next(iter(open_images(path, resolution, 1)))


@pytest.mark.parametrize(
    ("strength", "steps"), [(1.0, [0, 1, 2, 3, 4]), (0.6, [0, 1, 2, pytest.approx(2.4)]), (0.0, [0])]
)
def test_energies_are_those_of_the_path(runs, apples, strength, steps):
    translator = opened(runs).translator
    name, pixels = first(apples)
    found = follow(translator, name, pixels, 0, TranslateOptions(strength=strength))
    kept = translator.translate(to_images(pixels[None]), strength=strength, keep_path=True)
    assert found.steps == steps and found.name == name
    expected = torch.cat([translator.energy(z) for z in kept.path])
    torch.testing.assert_close(torch.tensor(found.energies), expected, rtol=1e-4, atol=1e-5)
    assert len(set(found.energies)) == len(steps) and found.energies[-1] <= found.energies[0]
    assert len(found.frames) == len(steps)
    for frame, images in zip(found.frames, kept.path_images, strict=True):
        assert frame.dtype == torch.uint8 and frame.shape == (3, 32, 32)
        # A kept path may lie in memory in another order, in which convolutions round in another way.
        assert (frame.int() - to_pixels(images)[0].int()).abs().max() <= 1
    moved = (found.frames[0].int() - found.frames[-1].int()).abs().max()
    assert moved > 3 if strength else moved == 0


def test_settings_reach_the_chain(runs, apples):
    translator = opened(runs).translator
    _, pixels = first(apples)
    options = TranslateOptions(steps=2, step_size=50.0)
    kept = translator.translate(to_images(pixels[None]), steps=2, step_size=50.0, keep_path=True)
    found = follow(translator, "a", pixels, 0, options)
    expected = torch.cat([translator.energy(z) for z in kept.path])
    torch.testing.assert_close(torch.tensor(found.energies), expected, rtol=1e-4, atol=1e-5)


def test_noise_belongs_to_the_place_and_the_seed(apples):
    """Of the chain and of the decoder, and all frames share the decoder's."""
    torch.manual_seed(0)
    alae = build_autoencoder(AUTOENCODERS.get("alae").tiny).eval().requires_grad_(False)
    for name, parameter in alae.named_parameters():
        if name.endswith(".noise"):  # zero at the start
            torch.nn.init.constant_(parameter, 0.3)
    energy = build_energy(MLPEnergyConfig(hidden=8), alae.latent_shape).requires_grad_(False)
    chain = LangevinConfig(steps=3, step_size=1.0, noise_scale=0.5)
    translator = Translator(alae, energy, LangevinSampler(chain))
    _, pixels = first(apples, alae.config.resolution)
    found = follow(translator, "a", pixels, 3, TranslateOptions(seed=5))
    expected = translator.translate(
        to_images(pixels[None]),
        noise=translator.noise(5, [3]),
        decoder_noise=translator.autoencoder.decoder_noise(5, [3]),
        keep_path=True,
    )
    for frame, images in zip(found.frames, expected.path_images, strict=True):
        assert (frame.int() - to_pixels(images)[0].int()).abs().max() <= 1
    others = [follow(translator, "a", pixels, *change) for change in ((3, TranslateOptions(seed=6)), (4, None))]
    assert all(other.energies[-1] != found.energies[-1] for other in others)
    assert all((other.frames[0].int() - found.frames[0].int()).abs().max() > 1 for other in others)


def test_columns_are_spread_and_keep_both_ends():
    assert spread(5, 8) == [0, 1, 2, 3, 4] and spread(8, 8) == list(range(8)) and spread(1, 2) == [0]
    assert spread(21, 8) == [0, 3, 6, 9, 11, 14, 17, 20]
    assert spread(21, 2) == [0, 20] and spread(36, 6) == [0, 7, 14, 21, 28, 35]
    for count in range(2, 60):
        for columns in range(2, 12):
            chosen = spread(count, columns)
            assert chosen[0] == 0 and chosen[-1] == count - 1 and len(chosen) == min(count, columns)
            gaps = {b - a for a, b in pairwise(chosen)}
            assert chosen == sorted(set(chosen)) and max(gaps) - min(gaps) <= 1


def test_only_the_columns_are_kept(runs, apples, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    kept = []
    draw = trajectories._sheet
    monkeypatch.setattr(trajectories, "_sheet", lambda ways, *rest: kept.extend(ways) or draw(ways, *rest))
    list(write_trajectories(opened(runs), open_images(apples, 32, 2), tmp_path, TranslateOptions(), columns=3))
    for way, (name, pixels) in zip(kept, open_images(apples, 32, 2), strict=True):
        whole = follow(opened(runs).translator, name, pixels, 0)
        assert way.energies == whole.energies and len(whole.frames) == 5
        assert len(way.frames) == 3
        assert all(torch.equal(way.frames[i], whole.frames[t]) for i, t in enumerate((0, 2, 4)))


def test_frames_of_an_animation_have_one_size(runs, apples, tmp_path, monkeypatch):
    """Also where their numbers are of different lengths, and nothing else is wider."""
    pytest.importorskip("matplotlib")
    sizes = []
    monkeypatch.setattr(trajectories, "save_frames", lambda film, *_, **__: sizes.extend(f.size for f in film))
    monkeypatch.setattr(EnergyRun, "title", lambda *_: "t")
    monkeypatch.setattr(Trajectory, "caption", lambda _, point, *__: "9" * (5 + 10 * point))
    list(write_trajectories(opened(runs), open_images(apples, 32, 1), tmp_path, TranslateOptions()))
    assert len(sizes) == 5 and len(set(sizes)) == 1


def test_energies_that_are_no_numbers_stay_json():
    way = Trajectory("a", [0.0, 1.0, 2.0], [1.0, float("inf"), float("nan")], [])
    assert json.loads(json.dumps(trajectories._finite(way))) == [1.0, None, None]


# Pictures


def test_captions_stand_below_their_images():
    pixels = torch.zeros(3, 100, 100, dtype=torch.uint8)
    sheet = captioned([pixels, pixels], ["step 0\nE 1", "step 1"])
    assert sheet.width == 203 and sheet.height > 115
    for left in (0, 103):
        assert sheet.getpixel((left + 50, 99)) == (0, 0, 0)
        text = sheet.crop((left, 101, left + 100, sheet.height))
        assert text.getpixel((1, 1)) == (255, 255, 255)
        assert min(text.convert("L").getextrema()) < 100, "nothing is written there"
    long = "a caption that is wider than its cell in large letters"
    assert captioned([pixels], ["short"], among=["short", long]).height == captioned([pixels], [long]).height
    assert captioned([pixels], [long]).height < captioned([pixels], ["short"]).height


def test_pictures_beside_and_below_one_another():
    red, blue = (Image.new("RGB", size, colour) for size, colour in (((10, 20), "red"), ((30, 5), "blue")))
    row = beside([red, blue])
    assert row.size == (43, 20)
    assert [row.getpixel(place) for place in ((9, 19), (13, 4), (13, 6))] == [(255, 0, 0), (0, 0, 255), (255,) * 3]
    sheet = stacked({"one": red, "two": blue}, "a title that is wider than both", size=12)
    assert sheet.width > 100 and {(255, 0, 0), (0, 0, 255)} <= {colour for _, colour in sheet.getcolors(9999)}
    assert visible_size(64, 256) == 256 and visible_size(100, 256) == 300 and visible_size(1024, 256) == 1024


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_frames_make_an_animation(tmp_path, ending):
    shades = [to_picture(torch.full((3, 32, 32), value, dtype=torch.uint8)) for value in (0, 128, 255)]
    save_frames(iter(shades), 3, tmp_path / f"a.{ending}", milliseconds=70)
    with Image.open(tmp_path / f"a.{ending}") as film:
        assert film.format == ending.upper() and film.n_frames == 3 and film.info["loop"] == 0
        for number, shade in enumerate((0, 128, 255)):
            film.seek(number)
            assert abs(film.convert("RGB").getpixel((16, 16))[0] - shade) <= 3
            film.load()
            assert film.info["duration"] == (70, 70, 1000)[number]


# The command


def call(*arguments):
    return run("eval/paper.py", "trajectories", *arguments)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_the_command_writes_sheet_lines_and_animations(runs, apples, tmp_path, ending):
    pytest.importorskip("matplotlib")
    both = ("--energy", runs / "apple2orange", runs / "orange2apple", "--to", "apple")
    done = call(apples, *both, "--out", tmp_path, "--count", 2, "--columns", 4, "--animation", ending, "--seed", 3)
    assert done.code == 0, done.err
    names = [name for name, _ in open_images(apples, 32, 2)]
    films = {f"{name}.{ending}" for name in names}
    assert {path.name for path in tmp_path.iterdir()} == {"trajectories.png", "trajectories.jsonl", *films}
    lines = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    translator = opened(runs, "orange2apple").translator
    for place, (line, (name, pixels)) in enumerate(zip(lines, open_images(apples, 32, 2), strict=True)):
        assert line["energies"] == follow(translator, name, pixels, place, TranslateOptions(seed=3)).energies
        facts = {key: line[key] for key in ("image", "run", "source", "target", "images_seen", "seed", "steps")}
        assert list(facts.values()) == [name, "orange2apple", "orange", "apple", 1234, 3, [0, 1, 2, 3, 4]]
        with Image.open(tmp_path / f"{name}.{ending}") as film:
            assert film.n_frames == 5 and film.width == 256 and film.height > 300
    assert done.out.splitlines()[0].startswith(f"{names[0]}: E {lines[0]['energies'][0]:.4g} to ")
    assert Image.open(tmp_path / "trajectories.png").width > 4 * 96


def test_the_sheet_shows_the_frames_as_they_are(runs, apples, tmp_path):
    pytest.importorskip("matplotlib")
    list(write_trajectories(opened(runs), open_images(apples, 32, 1), tmp_path, TranslateOptions(), columns=2))
    sheet = Image.open(tmp_path / "trajectories.png").convert("RGB")
    name, pixels = first(apples)
    way = follow(opened(runs).translator, name, pixels, 0)
    found = sheet.tobytes()
    for frame in (way.frames[0], way.frames[-1]):
        row = to_picture(frame, 96).crop((0, 50, 96, 51)).tobytes()
        assert row in found


def test_bad_input_gets_one_line(runs, apples, tmp_path):
    forth = ("--energy", runs / "apple2orange", "--out", tmp_path / "out")
    for arguments, message in (
        ((apples, *forth, "--columns", 1), "--columns must be at least 2"),
        ((apples, *forth, "--count", 0), "--count must be at least 1"),
        ((apples, *forth, "--strength", 1.5), "strength is the fraction of the chain"),
        ((apples, *forth, "--steps", -1), "steps"),
        ((apples, *forth, "--to", "pear"), "pear"),
        ((tmp_path / "nowhere", *forth), "no such image or folder"),
        ((apples, "--energy", runs / "nowhere", "--out", tmp_path / "out"), "no such energy"),
        ((apples, "--energy", runs / "apple2orange", "--out", apples / "inside"), "lies where the input does"),
        ((apples, "--energy", runs / "apple2orange", "--out", apples), "lies where the input does"),
    ):
        done = call(*arguments)
        assert done.code == 2 and len(done.errors) == 1 and message in done.err, (message, done.err)
    assert not list((tmp_path / "out").glob("*"))
