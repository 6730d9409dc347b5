"""Programs in processes of their own, and how long they take: to their end, or to a line that they print."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from letit_dist.errors import UserError

ROOT = Path(__file__).parent.parent.parent
_STOPPED = 75  # of a training that was asked to end
STEP = r"^ *\d+/\d+ images"  # a training's line of numbers
_SMALL = ("training.batch=8", "intervals.report=8", "intervals.samples=8", "intervals.checkpoint=8")


def programs() -> list[str]:
    """Every program of the repository."""
    found = (path for folder in ("launch", "shards", "eval") for path in (ROOT / folder).glob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in found if "__main__" in path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Took:
    """Seconds that passed, and of processor time until the process ended."""

    passed: float
    busy: float

    def __str__(self) -> str:
        return f"{self.passed:.2f} s, {self.busy:.2f} s of processor time"


def seconds_of(
    command: Sequence[object],
    *,
    until: str | None = None,
    stop: bool = False,
    repeats: int = 1,
    clean: Path | None = None,
) -> Took:
    """Medians for a program with its arguments: to its end, or to the first line that matches `until`.

    With `stop` it is asked to end there. `clean` is removed before each run. UserError where it fails, or prints no
    such line.
    """
    runs = []
    for _ in range(repeats):
        if clean is not None:
            shutil.rmtree(clean, ignore_errors=True)
        runs.append(_run([sys.executable, "-u", *map(str, command)], until, stop))
    return Took(statistics.median(run.passed for run in runs), statistics.median(run.busy for run in runs))


def _run(command: list[str], until: str | None, stop: bool) -> Took:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun, lines = time.perf_counter(), []
    passed: float | None = None
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    out, err = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if passed is None and until is not None and re.search(until, line):
                passed = time.perf_counter() - begun
                if stop:
                    process.terminate()
    passed = time.perf_counter() - begun if until is None else passed
    if passed is None or process.returncode not in ({0, _STOPPED, -signal.SIGTERM} if stop else {0}):
        what = f"ended with {process.returncode}" if process.returncode else "printed no line of its first step"
        raise UserError(f"{' '.join(command[2:])} {what}:\n{''.join(lines[-10:])}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


class DebugRuns:
    """The main job on 16 pictures, program by program; each builds on what those before it left in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.apples, self.oranges = (folder / "fruit" / style / "train" for style in ("apple", "orange"))

    def all(self, repeats: int) -> Iterator[tuple[str, Took]]:
        """(name, time) of each."""
        at = self.folder
        pack = ["shards/pack.py", "builtin:fruit", "--out", at / "fruit", "--resolution", 64, "--count", 8, "--test", 8]
        yield "shards/pack.py", seconds_of(pack, repeats=repeats, clean=at / "fruit")
        yield "shards/check.py", seconds_of(["shards/check.py", self.apples], repeats=repeats)
        data = [f"data.train=[{self.apples}, {self.oranges}]", "data.workers=0"]
        for config in ("alae_fruit", "beta_vae", "vqvae2"):  # the last one is built upon
            train = ["launch/pretrain.py", f"configs/debug/{config}.yaml", "--run", at / config, *data, *_SMALL]
            last = config == "vqvae2"
            train += ["training.images=8"] * last
            took = seconds_of(train, until=STEP, stop=not last, repeats=repeats, clean=at / config)
            yield f"launch/pretrain.py, {config}", took
        model = ["--autoencoder", at / "vqvae2"]
        for shards in (self.oranges, self.apples):
            latents = at / "latents" / shards.parent.name
            encode = ["launch/encode_latents.py", *model, "--shards", shards, "--out", latents]
            took = seconds_of(encode, repeats=repeats, clean=latents)
        yield "launch/encode_latents.py", took
        domains = [f"data.source={at / 'latents/apple'}", f"data.target={at / 'latents/orange'}"]
        energy = ["launch/train_energy.py", "configs/energy/fruit.yaml", "--run", at / "energy"]
        energy += [f"autoencoder={at / 'vqvae2'}", *domains, *_SMALL, "training.images=8"]
        yield "launch/train_energy.py", seconds_of(energy, until=STEP, repeats=repeats, clean=at / "energy")
        translate = ["launch/translate.py", self.apples, "--energy", at / "energy", "--out", at / "out", "--limit", 1]
        yield "launch/translate.py", seconds_of(translate, repeats=repeats, clean=at / "out")
