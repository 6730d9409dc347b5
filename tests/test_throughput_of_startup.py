"""eval/throughput.py startup: what it runs, and that a failure is told."""

import re
import sys

import pytest
from programs import ROOT, run
from test_launch import PROGRAMS

from letit_dist.errors import UserError

sys.path.insert(0, str(ROOT / "eval"))  # as Python does for a program there

from speed.programs import STEP, DebugRuns, programs, seconds_of

THROUGHPUT = "eval/throughput.py"


def test_every_program_is_measured():
    assert sorted(PROGRAMS) == programs()


def test_seconds_until_a_line_and_until_the_end():
    code = "import time; print('       8/64 images  loss 1'); time.sleep(1); print('end')"
    step, whole = (seconds_of(["-c", code], until=until) for until in (STEP, None))
    assert step.passed < whole.passed - 0.5 and whole.passed > 1 > whole.busy > 0
    stopped = seconds_of(["-c", code + "; time.sleep(60)"], until=STEP, stop=True)
    assert stopped.passed < 30
    assert re.fullmatch(r"\d+\.\d\d s, \d+\.\d\d s of processor time", str(step))


def test_a_program_that_fails_is_shown():
    with pytest.raises(UserError, match=r"(?s)import sys; .* ended with 3:\nlast words"):
        seconds_of(["-c", "import sys; print('last words'); sys.exit(3)"])
    with pytest.raises(UserError, match="printed no line of its first step"):
        seconds_of(["-c", "print('nothing')"], until=STEP)


def test_what_a_run_left_is_removed_before_the_next(tmp_path):
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'run')!r}).mkdir()"
    seconds_of(["-c", code], repeats=2, clean=tmp_path / "run")
    with pytest.raises(UserError, match="FileExistsError"):
        seconds_of(["-c", code])


def test_options_without_effect():
    done = run(THROUGHPUT, "startup", "--bf16", "--flops")
    assert done.code == 2 and "--bf16 and --flops has no effect on startup: leave it out" in done.err


@pytest.mark.full
def test_debug_runs_reach_their_first_step(tmp_path):
    found = dict(DebugRuns(tmp_path).all(1))
    assert len(found) == 8 and all(took.busy > 0 for took in found.values())
    # Processor time tells on a busy machine, and holds more than the time to the first step.
    assert found["launch/train_energy.py"].busy < 30
