"""Every program from packing to scores, on one small chain; what each writes, and what it says the second time."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from programs import ROOT, STYLES, files, run

from letit_dist.autoencoders.base import load_autoencoder
from letit_dist.data.index import Index
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import decode, to_images, to_pixels
from letit_dist.energy.models import load_energy
from letit_dist.energy.translate import open_translator
from letit_dist.evaluation.latents import measure_unit
from letit_dist.pretrained import find_folder

PROGRAMS = [
    "launch/pretrain.py",
    "launch/encode_latents.py",
    "launch/train_energy.py",
    "launch/translate.py",
    "launch/export.py",
    "launch/transfer.py",
]
PROGRAMS += [
    "eval/backbones.py",
    "eval/fidelity.py",
    "eval/paper.py",
    "eval/reconstruction.py",
    "eval/scaling.py",
    "eval/report.py",
    "eval/study.py",
    "eval/throughput.py",
    "eval/weights.py",
    "eval/translation.py",
    "shards/pack.py",
    "shards/check.py",
]


@pytest.fixture(scope="module")
def translator(chain):
    return open_translator(chain.energy())


@pytest.fixture(scope="module")
def apples(chain):
    """(names, images (8, 3, 32, 32)) of the test apples."""
    dataset = ShardDataset([chain.images("apple", "test")])
    pixels = torch.stack([dataset.pixels(i) for i in range(len(dataset))])
    return [dataset.key(i) for i in range(len(dataset))], to_images(pixels)


def read(path):
    return decode(path.read_bytes())


# Help


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_quick_and_has_an_example(name):
    command = [sys.executable, "-X", "importtime", ROOT / name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"{name} " in done.stdout.split("options:")[0].split("\n\n", 1)[1]  # below the usage line
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "pydantic", "accelerate"}


# Stage 1


def test_pretraining_leaves_a_run_folder(chain):
    run_folder = chain.autoencoder
    assert {path.name for path in run_folder.iterdir()} == {
        *(".lock", "config.yaml", "environment.json", "stats.jsonl"),
        *("checkpoints", "export", "samples"),
    }
    assert [path.name for path in sorted((run_folder / "checkpoints").iterdir())] == [
        "images-000000000480",
        "images-000000000960",
    ]
    assert len(list((run_folder / "samples").glob("*.png"))) == 2
    losses = [json.loads(line) for line in (run_folder / "stats.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in losses] == [320, 640, 960]
    assert losses[-1]["mse"] < 0.7 * losses[0]["mse"]
    out = chain.done["pretrain"].out
    assert "batch: 16 = 1 rank x 16 images x 1 accumulation" in out and f"exported to {run_folder}/export/" in out
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["autoencoder"]["resolution"] == 32 and config["training"]["images"] == 960
    assert load_autoencoder(find_folder(run_folder)).config.channels == 16


def test_check_shows_what_would_run_and_runs_nothing(chain, tmp_path):
    before = files(chain.root)
    for command in (chain.pretrain, chain.train_energy(*STYLES)):
        command = [*command[:2], "--run", tmp_path / "new", *command[4:], "--check"]
        done = run(*command)
        assert done.code == 0
        shown = yaml.safe_load(done.out)
        assert shown["training"]["batch"] == 16
        assert "# batch: 16 = 1 rank x 16 images" in done.out
        assert f"# steps: {shown['training']['images'] // 16}" in done.out
    assert files(chain.root) == before and not (tmp_path / "new").exists()


def test_an_interrupted_pretraining_ends_in_the_same_weights(chain, tmp_path):
    shutil.copytree(chain.autoencoder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/export")
    shutil.rmtree(tmp_path / "run/checkpoints/images-000000000960")
    done = run(*chain.pretrain[:3], tmp_path / "run", *chain.pretrain[4:])
    assert done.code == 0 and "resumed at 480 of 960 images" in done.out
    expected, found = (load_autoencoder(find_folder(f)).fingerprint() for f in (chain.autoencoder, tmp_path / "run"))
    assert found == expected


# Between the stages


def test_encoding_stores_codes_of_every_view(chain):
    autoencoder = load_autoencoder(find_folder(chain.autoencoder))
    for style in STYLES:
        index = Index.read(chain.latents(style))
        meta = {"domain": style, "split": "train", "views": ["", "flip", "crop0"], "resolution": 32, "images": 24}
        assert index.kind == "codes" and meta.items() <= index.meta.items()
        assert index.meta["autoencoder_fingerprint"] == autoencoder.fingerprint()
        out = chain.done[f"encode {style}"].out
        assert f"24 images of {style} x 3 views as codes, autoencoder {autoencoder.fingerprint()}" in out
        latents = LatentSet.open(chain.latents(style))
        assert latents.keys[:3] == [f"{style}-0000000", f"{style}-0000000-flip", f"{style}-0000000-crop0"]
        assert latents.json(4)["factors"]["style"] == style
        first = to_images(ShardDataset([chain.images(style)]).pixels(0)[None])
        codes = autoencoder.encode_codes(torch.cat([first, first.flip(-1)]))
        for name, values in latents.take([0, 1]).items():
            assert torch.equal(values, codes[name])


def test_an_encoding_that_was_interrupted_continues(chain, tmp_path, monkeypatch):
    """Ctrl-C in the third view; the second call ends with the bytes of a call that was left alone."""
    from letit_dist.autoencoders.vqvae2 import VQVAE2

    encode, calls = VQVAE2.encode_codes, []

    def interrupted(self, images):
        if images.amin() < images.amax():  # a grey image only measures the memory
            calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, images)

    command = list(chain.encode("apple"))
    command[command.index("--out") + 1] = tmp_path / "out"
    monkeypatch.setattr(VQVAE2, "encode_codes", interrupted)
    done = run(*command)
    assert done.code == 130 and done.err == "interrupted: run the same command again to continue\n"
    assert len(calls) == 3 and not (tmp_path / "out/index.json").exists()
    monkeypatch.setattr(VQVAE2, "encode_codes", encode)
    assert run(*command).code == 0
    assert list(files(tmp_path / "out").values()) == list(files(chain.latents("apple")).values())


# Stage 2


@pytest.mark.parametrize("direction", [STYLES, STYLES[::-1]])
def test_an_energy_a_direction(chain, direction):
    source, target = direction
    energy = load_energy(find_folder(chain.energy(*direction)))
    autoencoder = load_autoencoder(find_folder(chain.autoencoder))
    assert energy.extra == {
        "autoencoder_fingerprint": autoencoder.fingerprint(),
        "langevin": {"steps": 3, "step_size": 20.0, "noise_scale": 0.0},
        "source": source,
        "target": target,
        "images_seen": 256,
    }
    assert energy.latent_shape == autoencoder.latent_shape
    assert energy.unit == measure_unit(autoencoder, *(LatentSet.open(chain.latents(style)) for style in direction))
    out = chain.done[f"energy {source} {target}"].out
    assert f"{source} (72 latents) to {target} (72 latents); batch: 16 = " in out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert table[0] == ["method", "energy", "kernel_distance", "samples"]
    assert [row[0] for row in table[2:]] == ["source", "mean shift", "latent energy", "target itself"]
    assert [row[3] for row in table[2:]] == ["72", "72", "72", "36"]
    energies, distances = ({row[0]: float(row[column]) for row in table[2:]} for column in (1, 2))
    assert energies["target itself"] < energies["source"] and energies["latent energy"] < energies["source"]
    assert distances["latent energy"] < 0.5 * distances["source"]


def test_both_directions_differ(chain):
    one, two = (load_energy(find_folder(chain.energy(*d))).fingerprint() for d in (STYLES, STYLES[::-1]))
    assert one != two


# The second time


def test_finished_work_is_recognised(chain):
    weights = {name: value for name, value in files(chain.root).items() if not name.endswith("environment.json")}
    for style in STYLES:
        done = run(*chain.encode(style))
        assert done.code == 0 and "already encoded by autoencoder" in done.out
    for command in (chain.pretrain, chain.train_energy(*STYLES), chain.train_energy(*STYLES[::-1])):
        done = run(*command)
        assert done.code == 0 and "complete: " in done.out and "images were already seen" in done.out
        assert ("| latent energy " in done.out) == (command[0] == "launch/train_energy.py")
    done = run(*chain.pack)
    assert done.code == 0 and done.out.count("already packed with these settings") == 4
    after = {name: value for name, value in files(chain.root).items() if not name.endswith("environment.json")}
    assert after == weights


# Translation


def translate(chain, source, out, *options):
    done = run("launch/translate.py", source, "--energy", chain.energy(), "--out", out, *options)
    assert done.code == 0, done.err
    plan, *lines = done.out.splitlines()
    assert re.fullmatch(r"memory: about \d\.\d GiB at the peak \(.* at once x .*\); budget \d\.\d", plan)
    return lines


def test_translating_shards(chain, translator, apples, tmp_path):
    names, images = apples
    lines = translate(chain, chain.images("apple", "test"), tmp_path / "out", "--batch", 3)
    assert lines == [f"8 translations in {tmp_path / 'out'}"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.png" for name in names]
    expected = to_pixels(translator.translate(images).images)
    for name, pixels in zip(names, expected, strict=True):
        assert (read(tmp_path / "out" / f"{name}.png").int() - pixels.int()).abs().max() <= 1
    assert not torch.equal(expected, to_pixels(translator.decode(translator.autoencoder.encode(images))))


def test_translating_a_folder_and_a_file_gives_the_same_pictures(chain, apples, tmp_path):
    names, images = apples
    (tmp_path / "in/deep").mkdir(parents=True)
    places = [tmp_path / "in/b.png", tmp_path / "in/deep/a.webp", tmp_path / "in/c.png"]
    for path, pixels in zip(places, to_pixels(images), strict=False):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, lossless=True)
    (tmp_path / "in/notes.txt").touch()
    translate(chain, chain.images("apple", "test"), tmp_path / "shards")
    lines = translate(chain, tmp_path / "in", tmp_path / "folder")
    assert lines == [f"3 translations in {tmp_path / 'folder'}"]
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["b.png", "c.png", "deep-a.png"]
    translate(chain, tmp_path / "in/deep/a.webp", tmp_path / "file")
    translate(chain, tmp_path / "in", tmp_path / "two", "--limit", 2, "--format", "jpg")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["b.jpg", "c.jpg"]
    for name, one, two in (("b", "folder/b", "two/b"), ("deep-a", "folder/deep-a", "file/a")):
        shard = {"b": names[0], "deep-a": names[1]}[name]
        expected = read(tmp_path / "shards" / f"{shard}.png").int()
        assert (read(tmp_path / f"{one}.png").int() - expected).abs().max() <= 1
        suffix = "jpg" if two.startswith("two") else "png"
        assert (read(tmp_path / f"{two}.{suffix}").int() - expected).abs().float().mean() < 4


def test_paths_are_strips_and_animations(chain, apples, tmp_path):
    lines = translate(chain, chain.images("apple", "test"), tmp_path / "out", "--path", "--limit", 2, "--steps", 4)
    out = tmp_path / "out"
    assert lines == [f"2 translations in {out}", f"trajectories: {out / 'paths'}"]
    names = apples[0][:2]
    assert sorted(path.name for path in (tmp_path / "out/paths").iterdir()) == sorted(
        f"{name}.{suffix}" for name in names for suffix in ("gif", "png")
    )
    with Image.open(tmp_path / "out/paths" / f"{names[0]}.gif") as animation:
        assert animation.n_frames == 5  # T + 1
    with Image.open(tmp_path / "out/paths" / f"{names[0]}.png") as strip:
        assert strip.width == 3 + 5 * (96 + 3) and strip.height > 99  # the steps are named above the pictures
        left, top = 3 + 4 * 99, strip.height - 99
        last = strip.crop((left, top, left + 96, top + 96)).resize((32, 32), Image.Resampling.NEAREST)
        assert last.tobytes() == Image.open(tmp_path / "out" / f"{names[0]}.png").tobytes()


def test_no_strength_is_the_reconstruction(chain, translator, apples, tmp_path):
    translate(chain, chain.images("apple", "test"), tmp_path / "none", "--strength", 0)
    translate(chain, chain.images("apple", "test"), tmp_path / "steps", "--steps", 0)
    translate(chain, chain.images("apple", "test"), tmp_path / "half", "--strength", 0.5)
    images = apples[1]
    expected = to_pixels(translator.decode(translator.autoencoder.encode(images)))
    half = to_pixels(translator.translate(images, strength=0.5).images)
    for name, reconstruction, between in zip(apples[0], expected, half, strict=True):
        assert torch.equal(read(tmp_path / "none" / f"{name}.png"), reconstruction)
        assert torch.equal(read(tmp_path / "steps" / f"{name}.png"), reconstruction)
        assert (read(tmp_path / "half" / f"{name}.png").int() - between.int()).abs().max() <= 1
    assert not torch.equal(expected, half)


def test_sheets(chain, tmp_path):
    lines = translate(chain, chain.images("apple"), tmp_path / "out", "--sheet", "--limit", 17, "--batch", 5)
    sheets = tmp_path / "out/sheets"
    assert lines == [f"17 translations in {tmp_path / 'out'}", f"sheets: {sheets}/sheet-0000.png to sheet-0002.png"]
    sizes = [Image.open(path).size for path in sorted(sheets.iterdir())]
    assert sizes[0] == sizes[1] and sizes[0][0] - sizes[2][0] == 7 * 99  # eight columns, and the one that is left


def test_the_domain_chooses_among_energies(chain, tmp_path):
    both = ("--energy", chain.energy(*STYLES[::-1]), chain.energy())
    source = chain.images("apple", "test")
    assert run("launch/translate.py", source, *both, "--to", "orange", "--out", tmp_path / "a").code == 0
    assert run("launch/translate.py", source, *both, "--to", "apple", "--out", tmp_path / "b").code == 0
    translate(chain, source, tmp_path / "c")
    one, two, three = (list(files(tmp_path / folder).values()) for folder in "abc")
    assert one == three != two


def test_an_export_needs_its_autoencoder_named(chain, tmp_path):
    export = find_folder(chain.energy())
    command = ("launch/translate.py", chain.images("apple", "test"), "--energy", export, "--out", tmp_path / "out")
    done = run(*command)
    assert done.code == 2 and "name its autoencoder with --autoencoder" in done.err
    assert run(*command, "--autoencoder", chain.autoencoder, "--limit", 1).code == 0


# Scores


def test_scores(chain, tmp_path):
    command = ["eval/translation.py", chain.energy(), "--train", chain.images("apple"), chain.images("orange")]
    command += ["--test", chain.images("apple", "test"), "--judge-steps", 2, "--out", tmp_path / "out"]
    done = run(*command)
    assert done.code == 0, done.err
    assert f"sheet: {tmp_path / 'out/translation.png'}" in done.out
    rows = [json.loads(line) for line in (tmp_path / "out/translation.jsonl").read_text().splitlines()]
    methods = ["real", "reconstruction", "mean shift", "Gaussian transport", "light bridge", "latent energy"]
    assert [row["method"] for row in rows] == methods
    energy = load_energy(find_folder(chain.energy()))
    for row in rows:
        assert (row["samples"], row["seed"], row["source"], row["target"]) == (8, 0, "apple", "orange")
        assert row["energy"] == energy.fingerprint() and row["images_seen"] == 256
        assert 0 <= row["target_accuracy"] <= 1 and row["content_error"] >= 0 and "pair_error" not in row
        assert {f"error_{name}" for name in ("x", "y", "size")} <= set(row)
    first = done.out.splitlines()[0]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        *("method", "target_accuracy", "content_error", "kept_accuracy", "latent_kernel", "l2_to_source"),
    ]
    assert f"all columns: {tmp_path / 'out/translation.md'}" in done.out
    whole = (tmp_path / "out/translation.md").read_text().splitlines()[0]
    assert [cell.strip() for cell in whole.split("|")[1:-1]] == [
        *("method", "target_accuracy", "content_error", "content_correlation", "kept_accuracy", "latent_frechet"),
        *("latent_kernel", "displacement", "l2_to_source", "fit_seconds", "seconds", "mib", "samples"),
    ]
    judge = files(tmp_path / "out/judge")
    assert run(*command).code == 0 and files(tmp_path / "out/judge") == judge
