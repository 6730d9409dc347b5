"""Ranks that are forks behave as those that a launcher starts itself."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ROOT, start

pytestmark = pytest.mark.alone

# Everything that a rank finds at its start, and what it may find in nobody.
LOOK = """
import json, os, signal, sys, threading
import torch
from torch import distributed
mine = ("MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID")
place = {name: value for name, value in os.environ.items() if name not in mine}
found = {"environment": place, "arguments": sys.argv[1:], "name": __name__, "path": sys.path[0], "folder": os.getcwd()}
found |= {"leads its group": os.getpgid(0) == os.getpid(), "sigterm": signal.getsignal(signal.SIGTERM).name}
found |= {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_initialized()}
found |= {"group": distributed.is_initialized()}
print(json.dumps(found))
print("parent's threads", len(os.listdir(f"/proc/{os.getppid()}/task")), file=sys.stderr)
"""
END = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
print("rank", rank, "begins", flush=True)
if rank == 0:
    {}
open(sys.argv[1], "w").close()
time.sleep(100)
"""


def saved(folder, text):
    path = folder / "program.py"
    path.write_text(text)
    return path


def test_a_fork_finds_what_a_new_process_finds(tmp_path):
    program = saved(tmp_path, LOOK)
    found = {}
    for fresh in (False, True):
        done = start(program, "a", "b c", fresh=fresh, LETIT_SAYS="hello")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found[fresh] = sorted(lines, key=lambda line: line["environment"]["RANK"])
        if not fresh:
            assert done.stderr.count("parent's threads 1\n") == 2
    assert [line["environment"]["LOCAL_RANK"] for line in found[False]] == ["0", "1"]
    assert found[False][0]["environment"]["LETIT_SAYS"] == "hello" and found[False][0]["arguments"] == ["a", "b c"]
    for forked, new in zip(found[False], found[True], strict=True):
        assert forked.pop("environment").items() ^ new.pop("environment").items() == set()
        assert forked == new


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [
        ("sys.exit(7)", 7, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("raise ZeroDivisionError('a bug')", 1, "ZeroDivisionError: a bug"),
    ],
)
def test_how_one_ends_is_told_and_the_other_is_ended(tmp_path, does, code, says):
    done = start(saved(tmp_path, END.format(does)), tmp_path / "reached")
    assert done.returncode == 1 and says in done.stderr
    assert re.search(rf"failed \(exitcode: {code}\) local_rank: 0 \(pid: \d+\)", done.stderr)
    assert re.search(r"Sending process \d+ closing signal SIGTERM", done.stderr)


def test_what_a_rank_says_goes_where_the_launcher_sends_it(tmp_path):
    options = ("--log_dir", str(tmp_path / "logs"), "--tee", "3")
    done = start(saved(tmp_path, LOOK), "a", options=options)
    assert done.returncode == 0 and done.stdout.count('"arguments"') == 2
    for rank in (0, 1):
        (out,) = (tmp_path / "logs").rglob(f"{rank}/stdout.log")
        assert json.loads(out.read_text())["environment"]["RANK"] == str(rank)
        assert "parent's threads 1" in out.with_name("stderr.log").read_text()


def test_ranks_that_do_not_end_are_ended_and_shown(tmp_path):
    program = saved(tmp_path, END.format("time.sleep(100)"))
    with pytest.raises(TimeoutError, match="rank 1 begins"):
        start(program, tmp_path / "reached", timeout=4)
    assert (tmp_path / "reached").exists()


@pytest.mark.parametrize("launch", ["launch/accelerate/cpu2.yaml", None])
@pytest.mark.parametrize("fresh", [False, True])
def test_they_end_with_the_tests(tmp_path, launch, fresh):
    """A test process that is killed, as by a time limit, leaves nothing behind."""
    program = saved(tmp_path, "import os, sys, time\nopen(f'{sys.argv[1]}.{os.getpid()}', 'w').close()\ntime.sleep(99)")
    call = f"start({str(program)!r}, {str(tmp_path / 'pid')!r}, launch={launch!r}, fresh={fresh})"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from ranks import start\n"
    with subprocess.Popen([sys.executable, "-c", code + f"if __name__ == '__main__': {call}"]) as tests:
        ranks = 1 if launch is None else 2
        found = wait_for(
            lambda: [int(path.suffix[1:]) for path in tmp_path.glob("pid.*")], lambda pids: len(pids) == ranks
        )
        tests.kill()
    wait_for(lambda: [pid for pid in found if alive(pid)], lambda left: not left)


def pids_in(folder):
    return [int(path.suffix[1:]) for path in folder.glob("pid.*")]


def alive(pid):
    """Whether it runs: one that has ended and whose parent has not asked is a zombie, Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(look, good):
    end = time.monotonic() + 60
    while not good(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found
