"""The tiny VQ-VAE-2 run of conftest.py with something that goes wrong in it: RUN SHARDS FAULT. To be launched.

The fault strikes one rank of two, in its batch number 7: after the checkpoint at 48 of 128 images.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import tiny_trainer

from letit_dist.errors import reports_errors
from letit_dist.training import checkpoint

RANK = int(os.environ.get("RANK", "0"))
AT = 7


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
    """As the kernel does when memory is short."""
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


STRIKES = {"slow": slow, "kill": kill, "raise": fail, "sleep": sleep, "stop": stop, "nan": nan}
STRIKES |= {"kill once": kill_once, "worker": kill_worker}


@reports_errors
def main() -> int:
    """Train; the exit code is the run's."""
    run, shards, fault = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    wrap = None
    if fault in STRIKES and RANK == 1:

        def wrap(feed):
            return FaultyFeed(feed, STRIKES[fault])

    elif fault == "vanished" and RANK == 1:
        # This rank alone sees a storage from which a shard has gone.
        mine = run.parent / "mine"
        shutil.copytree(shards, mine, dirs_exist_ok=True)

        def wrap(feed):
            return FaultyFeed(feed, lambda batch: vanish(mine, batch))

    elif fault == "kill in save" and RANK == 0:
        kill_in_save()
    elif fault == "full disk" and RANK == 0:
        full_disk()
    timeout = 5.0 if fault == "sleep" else 120.0
    workers = int(fault == "worker")
    trainer = tiny_trainer(run, shards, feed=wrap, workers=workers, training={"timeout": timeout})
    code = trainer.train()
    trainer.accelerator.end_training()
    return code


def vanish(folder, batch):
    """The shard's file is gone, and the reader's handle with it."""
    from letit_dist.data.reader import ShardDataset

    for path in folder.rglob("*.tar"):
        path.unlink()
    return ShardDataset([folder / "apple" / "train"]).pixels(0)


if __name__ == "__main__":
    sys.exit(main())
