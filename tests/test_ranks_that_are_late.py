"""Ranks that meet once, at the end of their work: how long they wait, and what is said if one is gone."""

import os
import subprocess
import sys

import pytest
import torch
from programs import ROOT

from letit_dist.errors import UserError
from letit_dist.evaluation.features import gather_features

# The group's own options: what a collective that waits for a late rank will really go by.
JOIN = """
import os
from pathlib import Path
import torch
from letit_dist.errors import reports_errors
from letit_dist.training.setup import join_ranks

def gloo():
    return sum("gloo" in Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task"))

@reports_errors
def main():
    rank, world, _, gather = join_ranks()
    group = torch.distributed.distributed_c10d._get_default_group()
    seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    print("waits", rank, gather(seconds), flush=True)
    assert gloo() > 0

main()
print("threads left", gloo())
"""


@pytest.mark.alone
def test_a_rank_may_be_days_late():
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000)}
    place |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
        )
        for rank in range(2)
    ]
    for rank, job in enumerate(jobs):
        said, _ = job.communicate(timeout=240)
        assert job.returncode == 0, said
        assert f"waits {rank} [{7 * 86_400.0}, {7 * 86_400.0}]" in said
        # They could end the process with SIGABRT, after all went well.
        assert "threads left 0" in said


def test_a_rank_that_has_gone_is_told_in_one_line():
    class Images:
        label, stamp, split, pixels = "x", "y", None, (8, 8)

        def __len__(self):
            return 4

        def read(self, rows):
            return torch.zeros(len(rows), 3, 8, 8), {}

    def broken(_):
        raise RuntimeError("[gloo] Timed out waiting\n 5000ms for recv")

    message = r"^lost the other ranks \(\[gloo\] Timed out waiting 5000ms for recv\): the same command continues"
    with pytest.raises(UserError, match=message):
        gather_features(Images(), lambda pixels: {"features": pixels.flatten(1)}, broken, world=2)
