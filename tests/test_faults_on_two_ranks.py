"""Faults that strike one of two processes: what the other one says, what is left, and that the run goes on from it."""

import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from ranks import CPU2, ROOT, start
from safetensors.torch import load_file

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.sources import Request, open_source
from letit_dist.training.checkpoint import verify

pytestmark = pytest.mark.alone
DEEPSPEED2 = "launch/accelerate/deepspeed_cpu2.yaml"


def launch(
    run: Path, shards: Path, fault: str, *options: str, recipe: str = "vqvae2", yaml: str = CPU2, fresh: bool = False
):
    """Both ranks under accelerate with the shipped file; the finished process and the seconds it took."""
    begun = time.monotonic()
    path = f"{ROOT}:{ROOT / 'tests'}"
    words = ("tests/faulty_run.py", run, shards, fault, recipe)
    done = start(*words, launch=yaml, options=options, timeout=300, fresh=fresh, PYTHONPATH=path)
    return done, time.monotonic() - begun


def checkpoints(run: Path) -> list[int]:
    """Images of those that are whole."""
    return sorted(int(p.name[-12:]) for p in (run / "checkpoints").glob("images-*") if verify(p) is None)


@pytest.fixture(scope="module")
def several_shards(tmp_path_factory):
    """`fruit_shards` in several files: the same samples in the same order, so the same run."""
    folder = tmp_path_factory.mktemp("several")
    (part, *_) = open_source("builtin:fruit", Request(resolution=32, count=24, test=8, seed=0))
    pack(part, folder, PackOptions(resolution=32, shard_bytes=20_000))
    assert len(list((folder / "apple/train").glob("*.tar"))) > 3
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, fruit_shards):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    done, _ = launch(run, fruit_shards, "none")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def assert_goes_on(run: Path, shards: Path, unbroken: Path, at: int, recipe: str = "vqvae2") -> None:
    """The same command again ends with the bits of the run that nothing happened to."""
    done, _ = launch(run, shards, "none", recipe=recipe)
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
        ("kill@0", 48, "[rank 1] error: lost the other ranks in phase 'reconstruct' at 56 images"),
        ("raise", 48, "ZeroDivisionError: a bug in one rank"),
        ("nan", 48, "[rank 0] error: the loss of phase 'reconstruct' is not finite at 56 images"),
        ("vanished", 48, ": No such file or directory: restore the shard, then the same command continues"),
        ("truncated", 48, ": the shard was truncated or replaced while in use; restore it and run again"),
        ("worker", 48, "[rank 1] error: a loader worker ended"),
        ("worker@0", 48, "[rank 0] error: a loader worker ended"),
        ("kill in save", 48, ""),
        ("full disk", 48, "[rank 0] error: cannot write the checkpoint"),
    ],
)
def test_one_rank_fails_and_nothing_but_time_is_lost(tmp_path, several_shards, unbroken, fault, left, says):
    done, _ = launch(tmp_path / "run", several_shards, fault)
    assert done.returncode not in (0, 75), done.stdout[-2000:]
    assert says in done.stderr, done.stderr[-3000:]
    assert checkpoints(tmp_path / "run") == [left]
    if fault in ("vanished", "truncated"):
        (line,) = [line for line in done.stderr.splitlines() if says in line]
        assert line.startswith(f"[rank 1] error: {tmp_path / 'mine/apple/train/shard-'}")
    assert_goes_on(tmp_path / "run", several_shards, unbroken, left)


def test_shards_that_are_not_those_that_were_packed_are_refused(tmp_path, several_shards, unbroken):
    """A bit in the zeros that end a shard: every image decodes. Each rank has hashed half of the shards."""
    shards = tmp_path / "shards"
    shutil.copytree(several_shards, shards)
    whole = [(shards / f"apple/train/shard-{number:05d}.tar").read_bytes() for number in (0, 1)]
    for number, data in enumerate(whole):
        path = shards / f"apple/train/shard-{number:05d}.tar"
        path.write_bytes(data[:-1] + b"\1")
        done, _ = launch(tmp_path / "run", shards, "none")
        assert done.returncode not in (0, 75)
        (line,) = [line for line in done.stderr.splitlines() if "sha256" in line]
        assert line.startswith(f"[rank {number}] error: {path}: sha256 ") and "restore it, then the same" in line
        assert checkpoints(tmp_path / "run") == []
        path.write_bytes(data)
    done, _ = launch(tmp_path / "run", shards, "none")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_end(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("recipe", "value", "phase", "microbatch", "yaml"),
    [
        ("vqvae2", "inf", "reconstruct", 0, CPU2),
        ("vqvae2", "nan", "reconstruct", 1, CPU2),
        ("vqvae2", "nan", "reconstruct", 1, DEEPSPEED2),
        ("alae", "nan", "generator", 1, CPU2),
        ("alae", "inf", "reciprocity", 0, CPU2),
        ("alae", "inf", "reciprocity", 1, DEEPSPEED2),
    ],
)
def test_a_loss_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    tmp_path, fruit_shards, recipe, value, phase, microbatch, yaml
):
    """The state that is left is that of a run which all ranks leave before this phase begins; nothing else is saved."""
    if yaml == DEEPSPEED2:
        pytest.importorskip("deepspeed")
    for name, fault in (("spoilt", value), ("left", "leave")):
        place = (tmp_path / name / "run", fruit_shards, f"{fault},{phase},{microbatch}")
        done, _ = launch(*place, recipe=recipe, yaml=yaml)
        assert done.returncode not in (0, 75), done.stdout[-2000:]
        if name == "spoilt":
            refused = f"error: the loss of phase {phase!r} is not finite at 56 images (this rank: "
            (finite,), (other,) = (
                [
                    line.split(refused)[1]
                    for line in done.stderr.splitlines()
                    if line.startswith(f"[rank {r}] {refused}")
                ]
                for r in (0, 1)
            )
            assert math.isfinite(float(finite.split(")")[0])) and other.startswith(f"{value}); the weights were not")
            assert "the newest checkpoint is at 48 images. The same command with a lower recipe." in other
        assert checkpoints(tmp_path / name / "run") == [48]
    for name in ("model", "average", "optimizer"):
        for folder, seen in (("after", 56), ("run/checkpoints", 48)):
            file = f"{folder}/images-{seen:012d}/{name}.safetensors"
            mine, theirs = (load_file(tmp_path / run / file) for run in ("spoilt", "left"))
            assert mine.keys() == theirs.keys() and len(mine) > 10
            assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
            assert all(value.isfinite().all() for value in mine.values())


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


def test_it_does_in_a_batch_in_which_no_phase_has_its_turn_as_well(tmp_path, fruit_shards):
    whole, _ = launch(tmp_path / "unbroken", fruit_shards, "none", recipe="two_phases")
    assert whole.returncode == 0, whole.stderr[-3000:]
    done, _ = launch(tmp_path / "run", fruit_shards, "stop", recipe="two_phases")
    assert "stopped at 64 of 128 images; the same command continues" in done.stdout
    assert_goes_on(tmp_path / "run", fruit_shards, tmp_path / "unbroken", 64, recipe="two_phases")
