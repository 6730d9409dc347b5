"""How many processes there are, and which of its machine's this one is, as whatever launched them says it."""

from __future__ import annotations

import os
import re

# (this process's number on its machine, processes there): torchrun and accelerate; DeepSpeed's launcher; Open MPI;
# Intel's MPI; MVAPICH.
_NAMES = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("LOCAL_RANK", "LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
# Of the step, and of the job where srun says nothing of its own.
_SLURM_TASKS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else -1


def tasks_of_nodes(text: str) -> list[int]:
    """Tasks of each node, from Slurm's "8(x2),4"; [] for what is not of this form."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(match[1]) for match in found if match for _ in range(int(match[2] or 1))] if all(found) else []


def _place_by_slurm() -> tuple[int, int] | None:
    """What Slurm says, where its tasks are the ranks: in a batch script, and around another launcher, they are not."""
    node, rank, world = _number("SLURM_NODEID"), _number("SLURM_LOCALID"), _number("WORLD_SIZE")
    same = _number("RANK") == _number("SLURM_PROCID") and _number("LOCAL_RANK") in (-1, rank)
    for tasks in (tasks_of_nodes(os.environ.get(name, "")) for name in _SLURM_TASKS):
        if same and sum(tasks) == world and 0 <= node < len(tasks) and 0 <= rank < tasks[node]:
            return rank, tasks[node]
    return None


def launched_ranks() -> int:
    """The number of processes this program was started with."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def known_place() -> tuple[int, int] | None:
    """(this process's number on its machine, processes there); None where no launcher says both."""
    for rank, ranks in ((_number(rank), _number(ranks)) for rank, ranks in _NAMES):
        if 0 <= rank < ranks:
            return rank, ranks
    return _place_by_slurm()


def place_on_machine() -> tuple[int, int]:
    """`known_place`, or (0, 1): work that is dealt by it is then done twice, and never left out."""
    return known_place() or (0, 1)
