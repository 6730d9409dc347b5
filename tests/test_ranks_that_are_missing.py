"""Two real processes without a launcher, which would end the one when the other ends: each must do so by itself."""

import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from letit_dist.training.ends import silent_ranks, why_it_ended

pytestmark = pytest.mark.alone

RUN = """
import os, resource, signal, sys, time
from pathlib import Path
from conftest import SignalFeed, tiny_trainer
from letit_dist.errors import reports_errors

RANK = int(os.environ["RANK"])

class Hanging:
    def __init__(self, feed):
        self.feed = feed

    def batches(self, *place):
        for number, batch in enumerate(self.feed.batches(*place)):
            if number == 3 and RANK == 1 and fault == "hang":
                time.sleep(600)
            if number == 3 and RANK == 0 and fault == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            yield batch

    def preview(self, count):
        return self.feed.preview(count)

class Filling(Hanging):
    def batches(self, *place):
        for number, batch in enumerate(self.feed.batches(*place)):
            if number == 3 and RANK == 0:  # a file's size, which no folder that is made meets
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            yield batch

@reports_errors
def main():
    global fault
    run, shards, fault, every = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    stop = lambda feed: SignalFeed(feed, 3, signal.SIGTERM)
    wrap = {"hang": Hanging, "freeze": Hanging, "stop": stop, "full": Filling, "none": None, "crash": None}[fault]
    timeout = 5.0 if wrap is Hanging else 300.0
    trainer = tiny_trainer(run, shards, feed=wrap, training={"timeout": timeout}, intervals={"checkpoint": every})
    if fault == "crash" and RANK == 0:
        trainer.store.save = lambda *_, **__: 1 / 0
    return trainer.train()

code = main()
if RANK == 0 and sys.argv[3] != "hang":
    time.sleep(60)  # as one that takes long to end: nothing of the other may wait for that
os._exit(code)
"""


@pytest.fixture
def ranks(tmp_path, fruit_shards):
    """`ranks(fault, every)`: two processes, checkpoints `every` so many images; they end with the test."""
    jobs = []

    def begin(fault, every):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        place |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(fruit_shards), fault, str(every)]
        for rank in range(2):
            env = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (tmp_path / f"{rank}.log").open("w") as log:
                jobs.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
        return jobs

    yield begin
    for job in jobs:
        job.kill()
        job.wait()


def said(tmp_path, rank):
    return (tmp_path / f"{rank}.log").read_text()


@pytest.mark.parametrize(
    ("fault", "every", "blocked", "line"),
    [
        ("stop", 1_000_000, "checkpoints", "cannot write the checkpoint"),
        ("full", 48, None, "cannot write the checkpoint"),
        ("none", 1_000_000, "samples", "cannot write "),
    ],
)
def test_a_file_that_cannot_be_written_ends_the_other_rank_at_once(ranks, tmp_path, fault, every, blocked, line):
    """A checkpoint at a stop, where all wait for the writer, and in the background, where none should; a picture."""
    if blocked:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / blocked).write_text("in the way")
    main, other = ranks(fault, every)
    assert other.wait(timeout=150) == 2, said(tmp_path, 1)
    assert main.poll() is None, "it had not even ended"
    assert "lost the other ranks" not in said(tmp_path, 1) and "Traceback" not in said(tmp_path, 1)
    begun = time.monotonic()
    while "error: " not in said(tmp_path, 0) and time.monotonic() - begun < 20:
        time.sleep(0.1)
    assert f"[rank 0] error: {line}" in said(tmp_path, 0) and (blocked or "") in said(tmp_path, 0)


def test_an_error_of_the_main_process_in_a_save_ends_the_other_rank_at_once(ranks, tmp_path):
    main, other = ranks("crash", 48)
    assert other.wait(timeout=150) == 2, said(tmp_path, 1)
    assert "Traceback" not in said(tmp_path, 1) and "lost the other ranks" not in said(tmp_path, 1)
    assert main.wait(timeout=60) == 1 and "ZeroDivisionError" in said(tmp_path, 0)


def test_the_rank_that_hangs_is_named(ranks, tmp_path):
    main, other = ranks("hang", 1_000_000)
    assert main.wait(timeout=150) == 2, said(tmp_path, 0)
    assert other.poll() is None
    assert "[rank 0] error: lost the other ranks in phase 'reconstruct' at 24 images" in said(tmp_path, 0)
    assert "No word in 3 s from rank 1: hanging, gone, or busy." in said(tmp_path, 0)


def test_the_rank_that_holds_the_store_may_be_the_one_that_hangs(ranks, tmp_path):
    _, other = ranks("freeze", 1_000_000)
    assert other.wait(timeout=150) == 2, said(tmp_path, 1)
    assert "[rank 1] error: lost the other ranks in phase 'reconstruct' at 24 images" in said(tmp_path, 1)
    assert "No word in 3 s from rank 0: hanging, gone, or busy." in said(tmp_path, 1)


def test_without_a_store_nobody_is_named():
    assert silent_ranks(0, 2) == []
    line = why_it_ended(RuntimeError("Timed out waiting"), 0, 2, "in a phase", "none is saved yet")
    assert line.startswith("lost the other ranks in a phase (Timed out waiting); none is saved yet. What a rank")
