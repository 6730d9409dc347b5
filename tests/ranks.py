"""Programs in processes of their own, one or several ranks, without waiting for imports.

A server process has imported the launcher and what programs need; each start is a fork of it that then does what
`accelerate launch` or `python PROGRAM` does. The ranks that accelerate starts are new processes, as for a user.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parent.parent
CPU2 = "launch/accelerate/cpu2.yaml"
_PRELOADED = ("accelerate.commands.launch", "torch.distributed.run", "letit_dist.training.trainer", "ranks")

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(_PRELOADED))


def start(*command, launch=CPU2, options=(), timeout=400, **environment) -> CompletedProcess:
    """`command`, a program and its arguments, from the root of the repository, until it ends: under a file of
    accelerate's, or with `launch` None alone. A thread a process; `environment` is added to this one's."""
    words = [str(word) for word in command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    if launch is not None:
        words = ["accelerate", "--config_file", str(launch), *options, *words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        process = _server.Process(target=_become, args=(words, env, files, launch is not None))
        process.start()
        process.join(timeout)
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in files]
    if process.exitcode is None:
        process.terminate()
        process.join()
        raise TimeoutError(f"{' '.join(words)}\n{texts[0][-2000:]}\n{texts[1][-4000:]}")
    return CompletedProcess(words, process.exitcode, *texts)


def _become(words: list[str], env: dict[str, str], files: list[Path], launched: bool) -> None:
    for number, file in enumerate(files, 1):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = words
    if launched:
        from accelerate.commands.launch import main

        main()
        return
    import torch

    torch.set_num_threads(1)
    sys.path[0] = str((ROOT / words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
