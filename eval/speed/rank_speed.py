"""`throughput.py ranks`: a run by one process and by several, started as a user starts it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from letit_dist.config import load_config
from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.sources import Request, open_source
from letit_dist.errors import UserError
from letit_dist.schemas import PretrainConfig
from letit_dist.training.plan import plan_batch

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


class Work(NamedTuple):
    """Of a step: pixels of a side of the images, and how many of all ranks together."""

    side: int
    batch: int

    def __str__(self) -> str:
        return f"{self.side} pixels, {self.batch} images a step"


class _Run(NamedTuple):
    folder: Path
    command: list[str]
    process: subprocess.Popen[bytes]


class RankSpeed:
    """Images a second of `config` on the built-in fruit, by one process and by those of `launch`."""

    def __init__(self, folder: Path, config: Path, launch: Path, *, images: int, overrides: list[str]):
        self.folder, self.config, self.launch, self.overrides = folder, config, launch, overrides
        self.ranks = ranks_of(launch)
        if (cores := len(os.sched_getaffinity(0))) < self.ranks:
            raise UserError(f"--launch {launch}: starts {self.ranks} processes, and there are {cores} cores for them")
        self.images = images
        self.count = 0
        self.shards: dict[int, list[Path]] = {}  # by side

    def _packed(self, side: int) -> list[Path]:
        if side not in self.shards:
            found = open_source("builtin:fruit", Request(resolution=side, count=256, test=0, seed=0))
            folder = self.folder / f"shards{side}"
            self.shards[side] = [Path(pack(part, folder, PackOptions(resolution=side)).folder) for part in found]
        return self.shards[side]

    def own_work(self, batches: list[int], side: int | None) -> Work:
        """The configuration's, at `side` if given; UserError for a batch that the ranks cannot share."""
        for key, option in (("training.batch", "batch"), ("autoencoder.resolution", "side")):
            if any(override.startswith(f"{key}=") for override in self.overrides):
                raise UserError(f"{key}: give --{option}, whose rows say it")
        own = [f"autoencoder.resolution={side}"] if side else []
        config = load_config(PretrainConfig, str(self.config), ["data.train=[none]", *own, *self.overrides])
        batch = config.training.batch
        if isinstance(batch, tuple):
            raise UserError(f"--config {self.config}: a batch by level, expected one")
        for number in (*batches, batch):
            plan_batch(number, None, self.ranks)
        return Work(config.autoencoder.resolution, batch)

    def one(self, work: Work) -> float:
        """Images a second of one process: the median of the later intervals of its run."""
        return self._rate(self._start([sys.executable], work, self.images))

    def several(self, work: Work) -> float:
        """Of all ranks together."""
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self.launch)]
        return self._rate(self._start(launcher, work, self.images))

    def at_once(self, work: Work) -> float:
        """Of as many single processes at the same time, each with a rank's part of the batch."""
        part = Work(work.side, work.batch // self.ranks)
        self._packed(work.side)
        runs = [self._start([sys.executable], part, self.images // self.ranks, core=core) for core in range(self.ranks)]
        for run in runs:
            run.process.wait()  # all of them, before one that failed is said
        return sum(self._rate(run) for run in runs)

    def _start(self, start: list[str], work: Work, images: int, core: int = 0) -> _Run:
        self.count += 1
        run = self.folder / f"run{self.count}"
        total = _INTERVALS * images
        keys = [
            f"data.train=[{', '.join(map(str, self._packed(work.side)))}]",
            "data.workers=0",
            f"training.images={total}",
        ]
        keys += [f"intervals.report={images}", f"intervals.samples={total}", f"intervals.checkpoint={total}"]
        command = [
            *start,
            "eval/speed/own_core.py",
            "launch/pretrain.py",
            str(self.config),
            "--run",
            str(run),
            *keys,
            *self.overrides,
            f"autoencoder.resolution={work.side}",
            f"training.batch={work.batch}",
        ]
        # One thread and one core a rank: with more, one rank would use the cores of the others.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OWN_CORE": str(core)}
        with run.with_suffix(".log").open("w") as log:
            return _Run(run, command, subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))

    def _rate(self, run: _Run) -> float:
        if run.process.wait():
            said = run.folder.with_suffix(".log").read_text()[-2000:]
            raise UserError(f"the run failed: {' '.join(run.command)}\n{said}")
        lines = [json.loads(line) for line in (run.folder / "stats.jsonl").read_text().splitlines()]
        return statistics.median(line["images_per_second"] for line in lines[1:])
