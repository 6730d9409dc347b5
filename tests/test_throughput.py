"""eval/throughput.py: its options, the table for a GPU, what several ranks and checkpoints cost."""

import argparse
import re
import sys

import pytest
import torch
from programs import ROOT, run

from letit_dist.compiled import has_numba

sys.path.insert(0, str(ROOT / "eval"))  # as Python does for a program there

THROUGHPUT = "eval/throughput.py"
TINY = (THROUGHPUT, "alae", "--width", "tiny", "--batch", 2, "--repeats", 2, "--threads", 1)


# The program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", 0), "--batch 0: must be at least 1"),
        (("--repeats", 0), "--repeats 0: must be at least 1"),
        (("--threads", -1), "--threads -1: must be at least 1"),
        (("--resolution", 16, 100), "resolution: must be a power of two from 8 on"),
    ],
)
def test_bad_numbers(options, message):
    done = run(THROUGHPUT, "alae", "--width", "tiny", *options)
    assert done.code == 2 and len(done.errors) == 1
    assert done.errors[0].startswith("error: ") and message in done.errors[0]
    assert not done.out


def test_other_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*TINY, "--out", tmp_path / "file")
    assert done.code == 2 and done.errors == [f"error: --out {tmp_path / 'file'} is a file, expected a folder"]
    assert run(THROUGHPUT).code == 2 and run(THROUGHPUT, "alae", "--width", "huge").code == 2
    if not torch.cuda.is_available():
        done = run(*TINY, "--device", "cuda")
        assert done.code == 2 and done.errors == ["error: --device cuda: torch sees no GPU here"]


def test_the_table_for_a_gpu_on_a_cpu(tmp_path):
    parts = ("vqvae2", "alae", "energy", "decode")
    done = run(THROUGHPUT, "all", "--tiny", "--only", *parts, "--repeats", 1, "--out", tmp_path)
    assert done.code == 0, done.err
    header, _, *rows = (line.split("|")[1:-1] for line in done.out.splitlines() if line.startswith("| "))
    columns = [cell.strip() for cell in header]
    assert {"naive, images/s", "ours, images/s", "naive, MiB", "ours, MiB", "GFLOP an image"} <= set(columns)
    assert {"ours, GFLOP/s", "of the peak"} <= set(columns) and "target" not in columns
    names = [row[0].strip() for row in rows]
    assert names[:3] == ["vqvae2: 32 pixels", "alae: 8 pixels", "alae: 16 pixels"]
    assert sum(name.startswith("energy: ") for name in names) == 6
    assert names[-4:] == [f"decode: {kind}, 64 pixels" for kind in ("vqvae2", "alae", "beta_vae", "taesd")]
    flops = {name: row[columns.index("GFLOP an image")].strip() for name, row in zip(names, rows, strict=True)}
    unseen = [name for name, count in flops.items() if count == "-"]
    narrow = [name for name in names if name.startswith(("energy: alae", "energy: beta_vae"))]
    assert unseen == (narrow if has_numba() else [])
    assert all(float(flops[name]) > 0 for name in flops if name not in unseen)
    text = next(tmp_path.glob("*-all.md")).read_text()
    assert "- plain: yes" in text and "- flops: yes" in text and "model FLOP utilisation" in text


@pytest.mark.parametrize("tiny", [False, True])
def test_every_row_of_that_table_is_a_command(tiny):
    """Of the real one, which no test runs, the options at least."""
    from speed import all as whole

    names = []
    for command, words in whole._commands(tiny):
        found = whole._arguments(argparse.Namespace(compile="inductor", bf16=True), command, words)
        assert found.command == command and found.bf16
        assert (found.compile is None) == (command == "energy")
        names.append(command)
    assert set(names) == set(whole.PARTS)


def test_help_names_every_benchmark():
    done = run(THROUGHPUT, "--help")
    assert done.code == 0
    for name in (
        "alae",
        "vqvae2",
        "beta_vae",
        "energy",
        "langevin",
        "decode",
        "translate",
        "data",
        "ranks",
        "save",
        "zero",
        "startup",
        "all",
    ):
        assert re.search(rf"^ +{name} +\w", done.out, re.MULTILINE), name


# What several ranks and checkpoints cost


def test_the_cost_of_saving_is_measured(fresh_accelerate, tmp_path):
    fresh_accelerate()
    done = run(THROUGHPUT, "save", "--configs", "configs/debug/vqvae2.yaml", "--repeats", 2, "--out", tmp_path)
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("vqvae2: "))
    found = re.search(r"checkpoint of (\d+) MiB every 8000 images: .* for ([\d.]+) s of (\d+) s, ([\d.]+)%", line)
    size, held, interval, share = map(float, found.groups())
    assert size >= 3 and interval > 1 and share == pytest.approx(100 * held / interval, abs=0.01 * 100 / interval)
    assert "target: below 1 %" in next(tmp_path.glob("*-save.md")).read_text()
    resumed = float(re.search(r"resumed in ([\d.]+) s", line)[1])
    assert resumed < 60


@pytest.mark.full
def test_ranks_are_compared_with_one(tmp_path):
    tiny = ("autoencoder.channels=8", "autoencoder.residual_channels=4")
    done = run(THROUGHPUT, "ranks", "--repeats", 1, "--images", 16, "--batch", 8, "--side", 32, "--", *tiny)
    assert done.code == 0, done.err
    lines = done.out.splitlines()[-5:]
    assert all(line.startswith("32 pixels, 8 images a step: ") for line in lines)
    assert "2 runs at once of 4 images a step: " in lines[2]
    one, two, apart, at_once, share = (float(re.search(r": ([\d.]+)[^:]*(\(target: .*)?$", line)[1]) for line in lines)
    assert share == pytest.approx(two / (2 * one), abs=0.02) and at_once == pytest.approx(apart / (2 * one), abs=0.02)


GROWING = "configs/pretrain/ffhq1024_alae.yaml"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--batch", 8, 9), "training.batch: 9 images do not divide over 2 ranks (try 8 or 10)"),
        (("autoencoder.resolution=32",), "autoencoder.resolution: give --side, whose rows say it"),
        (("training.batch=8",), "training.batch: give --batch, whose rows say it"),
        (("--config", GROWING), f"--config {GROWING}: a batch by level, expected one"),
    ],
)
def test_batches_that_cannot_be_dealt_to_ranks(given, says):
    done = run(THROUGHPUT, "ranks", *given)
    assert done.code == 2 and says in done.err


def test_one_process_is_no_launch_file_for_ranks():
    done = run(THROUGHPUT, "ranks", "--launch", "launch/accelerate/one.yaml")
    assert done.code == 2 and "launch/accelerate/one.yaml: starts 1 process, expected several" in done.err
    done = run(THROUGHPUT, "save", "--bf16")
    assert done.code == 2 and "--bf16 has no effect on save: leave it out" in done.err
