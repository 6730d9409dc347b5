"""Faults that strike one of two processes: what the other one says, what is left, and that the run goes on from it."""

import time
from pathlib import Path

import pytest
import torch
from ranks import ROOT, start
from safetensors.torch import load_file

from letit_dist.training.checkpoint import verify

pytestmark = pytest.mark.ranks


def launch(run: Path, shards: Path, fault: str, *options: str, fresh: bool = False):
    """Both ranks under accelerate with the shipped file; the finished process and the seconds it took."""
    begun = time.monotonic()
    path = f"{ROOT}:{ROOT / 'tests'}"
    words = ("tests/faulty_run.py", run, shards, fault)
    done = start(*words, options=options, timeout=300, fresh=fresh, PYTHONPATH=path)
    return done, time.monotonic() - begun


def checkpoints(run: Path) -> list[int]:
    """Images of those that are whole."""
    return sorted(int(p.name[-12:]) for p in (run / "checkpoints").glob("images-*") if verify(p) is None)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, fruit_shards):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    done, _ = launch(run, fruit_shards, "none")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def assert_goes_on(run: Path, shards: Path, unbroken: Path, at: int) -> None:
    """The same command again ends with the bits of the run that nothing happened to."""
    done, _ = launch(run, shards, "none")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed at {at} of 128 images" in done.stdout
    assert_same_end(run, unbroken)


def assert_same_end(run: Path, unbroken: Path) -> None:
    for name in ("model", "average", "optimizer"):
        mine, theirs = (load_file(r / f"checkpoints/images-000000000128/{name}.safetensors") for r in (run, unbroken))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine), name
    lines = [(r / "stats.jsonl").read_text().splitlines() for r in (run, unbroken)]
    assert len(lines[0]) == len(lines[1])


@pytest.mark.parametrize(
    ("fault", "left", "says"),
    [
        ("kill", 48, "[rank 0] error: lost the other ranks in phase 'reconstruct' at 56 images"),
        pytest.param("raise", 48, "ZeroDivisionError: a bug in one rank", marks=pytest.mark.full),
        ("nan", 48, "[rank 0] error: the loss of phase 'reconstruct' is not finite at 56 images"),
        pytest.param("vanished", 48, "listed in index.json and not there: copy it again", marks=pytest.mark.full),
        ("worker", 48, "[rank 1] error: a loader worker ended"),
        ("kill in save", 48, ""),
        ("full disk", 48, "[rank 0] error: cannot write the checkpoint"),
    ],
)
def test_one_rank_fails_and_nothing_but_time_is_lost(tmp_path, fruit_shards, unbroken, fault, left, says):
    done, _ = launch(tmp_path / "run", fruit_shards, fault)
    assert done.returncode not in (0, 75), done.stdout[-2000:]
    assert says in done.stderr, done.stderr[-3000:]
    assert checkpoints(tmp_path / "run") == [left]
    if fault in ("kill", "kill in save", "full disk"):
        assert_goes_on(tmp_path / "run", fruit_shards, unbroken, left)


def test_a_rank_that_hangs_is_given_up_after_the_time_limit(tmp_path, fruit_shards):
    done, seconds = launch(tmp_path / "run", fruit_shards, "sleep")
    assert done.returncode != 0 and seconds < 150, "the rank would have slept for ten minutes"
    assert "[rank 0] error: lost the other ranks in phase 'reconstruct' at 56 images" in done.stderr
    assert "the newest checkpoint is at 48 images, the same command continues from there" in done.stderr
    assert checkpoints(tmp_path / "run") == [48]


def test_the_launcher_starts_the_ranks_again_and_they_go_on(tmp_path, fruit_shards, unbroken, monkeypatch):
    """torchrun's elastic agent: one rank dies once, and a single command ends with the bits of an unbroken run."""
    # Ranks that are started again may not find in torchrun's store where the dead ones listened.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ("--max_restarts", "1", "--rdzv_backend", "c10d")
    done, _ = launch(tmp_path / "run", fruit_shards, "kill once", *options, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at 48 of 128 images" in done.stdout
    assert_same_end(tmp_path / "run", unbroken)


def test_a_signal_to_one_rank_stops_and_saves_all(tmp_path, fruit_shards, unbroken):
    done, _ = launch(tmp_path / "run", fruit_shards, "stop")
    assert "stopped at 64 of 128 images; the same command continues" in done.stdout
    assert checkpoints(tmp_path / "run") == [48, 64]
    assert_goes_on(tmp_path / "run", fruit_shards, unbroken, 64)
