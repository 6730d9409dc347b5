"""Programs in processes of their own, one or several ranks, without waiting for imports.

A server process has imported the launcher and what programs need. Each start is a fork of it, which forks once more:
one of the two does what `accelerate launch` or `python PROGRAM` does; the other, in which nothing else ever runs, forks
the ranks that torchrun asks for. So no process that forks has threads, a process group or a GPU. What such ranks share,
unlike a user's, is the order of their sets of strings: `start(..., fresh=True)` lets the launcher start real ones.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parent.parent
CPU2 = "launch/accelerate/cpu2.yaml"
_PATIENCE = 35  # seconds that a program is given to end: torchrun gives its ranks 30
_PRELOADED = (
    *("accelerate.commands.launch", "torch.distributed.run", "torch._dynamo", "letit_dist.training.trainer"),
    *("letit_dist.training.feeds", "letit_dist.autoencoders.vqvae2", "ranks"),
)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(_PRELOADED))
_forks = multiprocessing.get_context("fork")


def start(*command, launch=CPU2, options=(), timeout=400, fresh=False, **environment) -> CompletedProcess:
    """`command`, a program and its arguments, from the root of the repository, until it ends: under a file of
    accelerate's, or with `launch` None alone. A thread a process; `environment` is added to this one's. With `fresh`
    the launcher starts its ranks itself, as for a user: new processes that import everything."""
    words = [str(word) for word in command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    if launch is not None:
        words = ["accelerate", "--config_file", str(launch), *options, *words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        process = _server.Process(target=_become, args=(words, env, files, launch is not None, fresh))
        process.start()
        process.join(timeout)
        late = process.exitcode is None
        if late:
            process.terminate()
            process.join(_PATIENCE)
            process.kill()
            process.join()
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in files]
    if late:
        raise TimeoutError(f"{' '.join(words)}\n{texts[0][-2000:]}\n{texts[1][-4000:]}")
    return CompletedProcess(words, process.exitcode, *texts)


def _become(words: list[str], env: dict[str, str], files: list[Path], launched: bool, fresh: bool) -> None:
    for number, file in enumerate(files, 1):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, number)
    os.chdir(ROOT)
    here, there = _forks.Pipe()
    if launched and not fresh:
        work = _forks.Process(target=_launch, args=(words, env, there, here))
    else:
        work = _forks.Process(target=_launch if launched else _run, args=(words, env))
    work.start()
    there.close()
    _serve(work, here)


def _end_with_parent() -> None:
    """Have the system end this process where its parent ends without a word."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _run(words: list[str], env: dict[str, str]) -> None:
    """What `python PROGRAM ...` does."""
    _end_with_parent()
    os.environ.clear()
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    sys.argv = words
    sys.path.insert(0, str((ROOT / words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def _launch(words: list[str], env: dict[str, str], ranks: Connection | None = None, other: Connection | None = None):
    _end_with_parent()
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    if ranks is not None:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

        other.close()
        codes: dict[int, int] = {}
        SubprocessHandler._popen = lambda handler, args, env: _Rank(handler, args, env, ranks, codes)
    from accelerate.commands.launch import main

    main()


# ----------------------------------------------------------------------------------------------- ranks that are forks


class _Rank:
    """What the launcher holds in place of a `subprocess.Popen`."""

    def __init__(self, handler, args: tuple[str, ...], env: dict[str, str], asked: Connection, codes: dict[int, int]):
        python, unbuffered, *words = args
        assert (python, unbuffered) == (sys.executable, "-u") and words[0].endswith(".py"), args
        redirected = [file and file.name for file in (handler._stdout, handler._stderr)]
        self._asked, self._codes = asked, codes
        asked.send((words, env, redirected))
        while not isinstance(answer := asked.recv(), int):
            codes.update(answer)
        self.pid = answer
        self.args = args

    @property
    def returncode(self) -> int | None:
        while self._asked.poll():
            self._codes.update(self._asked.recv())
        return self._codes.get(self.pid)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.returncode) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return code


def _serve(launcher, asked: Connection) -> None:
    """Fork a rank for every request, tell how each one ended, and end as the launcher does, or with the tests."""
    tests = multiprocessing.parent_process()
    signal.signal(signal.SIGTERM, lambda *_: launcher.terminate())
    running: list[int] = []
    while launcher.is_alive() and tests.is_alive():
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            if asked.poll(0.02):
                rank = _forks.Process(target=_rank, args=(*asked.recv(), asked))
                rank.start()
                # Here as well as there: the launcher may want to end the group at once.
                with suppress(OSError):  # it has ended already
                    os.setpgid(rank.pid, rank.pid)
                running.append(rank.pid)
                asked.send(rank.pid)
            for pid in list(running):
                # Not reaped while the launcher may still signal its group, just as it would be its own child.
                if found := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                    running.remove(pid)
                    asked.send({pid: found.si_status if found.si_code == os.CLD_EXITED else -found.si_status})
    if launcher.is_alive():
        launcher.terminate()
        # Not without the processes that it has started itself.
        launcher.join(_PATIENCE)
        launcher.kill()
        launcher.join()
    for pid in running:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    if launcher.exitcode < 0:
        signal.signal(-launcher.exitcode, signal.SIG_DFL)
        os.kill(os.getpid(), -launcher.exitcode)
    sys.exit(launcher.exitcode)


def _rank(words: list[str], env: dict[str, str], redirected: list[str | None], asked: Connection) -> None:
    os.setpgid(0, 0)
    asked.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, file in enumerate(redirected, 1):
        if file:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    _run(words, env)
