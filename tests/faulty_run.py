"""A tiny run of conftest.py with something that goes wrong in it: RUN SHARDS FAULT [RECIPE]. To be launched.

The fault strikes one rank of two, the second or that of `FAULT@RANK`, in batch number 7: after the checkpoint at 48 of
128 images. FAULT is `none`, one of those below, or what befalls a loss, `VALUE,PHASE,MICROBATCH`: see `spoil`.
"""

import functools
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from conftest import tiny_alae_trainer, tiny_trainer
from two_phases import two_phases_trainer

from letit_dist.data import reader
from letit_dist.errors import UserError, reports_errors
from letit_dist.training import checkpoint

RANK = int(os.environ.get("RANK", "0"))
AT = 7
SEEN = 8 * AT  # images, at the start of that batch


class FaultyFeed:
    """The feed it wraps, with `strike(batch)` in place of one batch."""

    def __init__(self, feed, strike):
        self.feed, self.strike = feed, strike

    def batches(self, *place):
        """The wrapped batches."""
        for number, batch in enumerate(self.feed.batches(*place)):
            yield self.strike(batch) if number == AT else batch

    def preview(self, count):
        """The wrapped preview."""
        return self.feed.preview(count)


def kill(batch):
    """As the kernel does when memory is short. The main process writes the checkpoint in the background: once it is."""
    while not (Path(sys.argv[1]) / "checkpoints/images-000000000048").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(batch):
    """A bug."""
    raise ZeroDivisionError("a bug in one rank")


def sleep(batch):
    """A rank that hangs. By default SIGTERM ends it; the launcher would wait half a minute for it otherwise."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(600)


def stop(batch):
    """A scheduler that tells one rank."""
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def kill_worker(batch):
    """As the kernel does when memory is short, to a process that reads for this rank."""
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    return batch


def kill_once(batch):
    """A fault that is gone when the launcher starts the ranks again."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill(batch)
    return batch


def nan(batch):
    """A loss that is not a number."""
    batch.data["images"][0, 0, 0, 0] = torch.nan
    return batch


def kill_in_save():
    """The main process dies while its second checkpoint is half written."""
    really = checkpoint.save_file

    def save_file(values, path):
        really(values, path)
        if "000000000096" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_file


def full_disk():
    """No file may grow any more once the first checkpoint stands."""
    really = checkpoint.CheckpointStore._finish

    def finish(self, beside, final, *rest):
        if "000000000096" in final.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        really(self, beside, final, *rest)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoint.CheckpointStore._finish = finish


def slow(batch):
    """Time for somebody to send a signal."""
    time.sleep(20)
    return batch


def vanish(folder, batch):
    """Somebody tidies up. What the reader holds open stays readable: here that is one shard of several."""
    for path in folder.rglob("*.tar"):
        path.unlink()
    return batch


def truncate(folder, batch):
    """A copy of the shards that is written anew, and has come half-way."""
    for path in folder.rglob("*.tar"):
        os.truncate(path, path.stat().st_size // 2)
    return batch


STRIKES = {"slow": slow, "kill": kill, "raise": fail, "sleep": sleep, "stop": stop, "nan": nan}
STRIKES |= {"kill once": kill_once, "worker": kill_worker}
ON_STORAGE = {"vanished": vanish, "truncated": truncate}


def spoil(recipe, value: str, phase: str, microbatch: int) -> None:
    """In that batch the loss of `phase` is nan or inf on its microbatch of that number; with `leave` as the value,
    the run is left before the phase begins, by all ranks."""
    really, calls = recipe.step, []

    @functools.wraps(really)
    def step(name, batch):
        if name != phase or batch.images_seen != SEEN:
            return really(name, batch)
        if value == "leave":
            raise UserError(f"left before {phase}")
        result = really(name, batch)
        calls.append(name)
        return replace(result, loss=result.loss * float(value)) if len(calls) == microbatch + 1 else result

    recipe.step = step


@reports_errors
def main() -> int:
    """Train; the exit code is the run's. Of a loss that is refused, the state it leaves goes to `after` beside it."""
    run, shards, fault, *recipe = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    fault, _, rank = fault.partition("@")
    struck = int(rank or 1) == RANK
    wrap = None
    if fault in STRIKES and struck:

        def wrap(feed):
            return FaultyFeed(feed, STRIKES[fault])

    elif fault in ON_STORAGE and struck:
        # This rank alone has such a storage, with more shards than it may hold open.
        mine, reader.OPEN_FILES = run.parent / "mine", 1
        shutil.copytree(shards, mine)
        shards = mine

        def wrap(feed):
            return FaultyFeed(feed, lambda batch: ON_STORAGE[fault](mine, batch))

    elif fault == "kill in save" and RANK == 0:
        kill_in_save()
    elif fault == "full disk" and RANK == 0:
        full_disk()
    training = {"timeout": 5.0 if fault == "sleep" else 120.0}
    value, *where = fault.split(",")
    if recipe == ["two_phases"]:
        trainer = two_phases_trainer(run, shards, feed=wrap, training=training)
    elif recipe == ["alae"]:
        trainer = tiny_alae_trainer(run, shards, feed=wrap, training={**training, "microbatch": (2, 2, 1, 1)})
    else:
        training |= {"microbatch": 2} if where else {}
        trainer = tiny_trainer(run, shards, feed=wrap, workers=int(fault == "worker"), training=training)
    if where and (struck or value == "leave"):
        spoil(trainer.recipe, value, where[0], int(where[1]))
    try:
        code = trainer.train()
    except UserError:
        if where:
            trainer.store = checkpoint.CheckpointStore(run.parent / "after", 2)
            trainer.save()
        raise
    trainer.accelerator.end_training()
    return code


if __name__ == "__main__":
    sys.exit(main())
