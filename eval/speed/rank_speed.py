"""`throughput.py ranks`: the same run by one process and by several, started as a user starts it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.sources import Request, open_source
from letit_dist.errors import UserError

ROOT = Path(__file__).parent.parent.parent
_INTERVALS = 4  # of a run; the first one, in which everything is started, is left out


def ranks_of(launch: Path) -> int:
    """How many processes an accelerate file starts; UserError unless it is more than one."""
    try:
        found = yaml.safe_load(launch.read_text())["num_processes"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"--launch {launch}: not a file of accelerate: {error}") from None
    if not isinstance(found, int) or found < 2:
        raise UserError(f"--launch {launch}: starts {found} process, expected several")
    return found


class RankSpeed:
    """Images a second of `config` on the built-in fruit, by one process and by those of `launch`."""

    def __init__(self, folder: Path, config: Path, launch: Path, *, images: int, overrides: list[str]):
        self.folder, self.config, self.launch, self.overrides = folder, config, launch, overrides
        self.ranks = ranks_of(launch)
        if (cores := len(os.sched_getaffinity(0))) < self.ranks:
            raise UserError(f"--launch {launch}: starts {self.ranks} processes, and there are {cores} cores for them")
        self.images = images
        self.count = 0
        self.shards = []
        for part in open_source("builtin:fruit", Request(resolution=64, count=256, test=0, seed=0)):
            self.shards.append(Path(pack(part, folder / "shards", PackOptions(resolution=64)).folder))

    def rate(self, *, several: bool) -> float:
        """Of one run from start to end: the median of its later intervals, in images a second of all ranks."""
        self.count += 1
        run = self.folder / f"run{self.count}"
        start = [sys.executable]
        if several:
            start += ["-m", "accelerate.commands.launch", "--config_file", str(self.launch)]
        total = _INTERVALS * self.images
        keys = [f"data.train=[{', '.join(map(str, self.shards))}]", "data.workers=0", f"training.images={total}"]
        keys += [f"intervals.report={self.images}", f"intervals.samples={total}", f"intervals.checkpoint={total}"]
        command = [
            *start,
            "eval/speed/own_core.py",
            "launch/pretrain.py",
            str(self.config),
            "--run",
            str(run),
            *keys,
            *self.overrides,
        ]
        # One thread and one core a rank: with more, one rank would use the cores of the others.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the run failed: {' '.join(command)}\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
        return statistics.median(line["images_per_second"] for line in lines[1:])
