"""Which of the processes on its machine one is, by what launchers say."""

import pytest

from letit_dist.ranks import place_on_machine, tasks_of_nodes

NAMES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "RANK", "WORLD_SIZE")


@pytest.fixture
def place(monkeypatch):
    """`place(name=value, ...)`: what `place_on_machine` says where launchers have said this and nothing else."""

    def found(**said):
        with monkeypatch.context() as patched:
            for name in NAMES:
                patched.delenv(name, raising=False)
            for name, value in said.items():
                patched.setenv(name, str(value))
            return place_on_machine()

    return found


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("8(x2),4", [8, 8, 4]),
        ("2", [2]),
        ("1,12(x1),3(x3)", [1, 12, 3, 3, 3]),
        ("", []),
        ("8(x2),", []),
        ("8-4", []),
    ],
)
def test_tasks_of_nodes(text, tasks):
    assert tasks_of_nodes(text) == tasks


def test_what_belongs_together_is_believed(place):
    assert place() == (0, 1)
    assert place(LOCAL_RANK=3, LOCAL_WORLD_SIZE=8) == (3, 8)
    assert place(LOCAL_RANK=3, LOCAL_SIZE=4) == (3, 4)
    assert place(OMPI_COMM_WORLD_LOCAL_RANK=1, OMPI_COMM_WORLD_LOCAL_SIZE=2) == (1, 2)
    assert place(MPI_LOCALRANKID=1, MPI_LOCALNRANKS=2) == (1, 2)
    for odd in ({"LOCAL_RANK": 3}, {"LOCAL_WORLD_SIZE": 8}, {"LOCAL_RANK": 8, "LOCAL_WORLD_SIZE": 8}):
        assert place(**odd) == (0, 1)
    assert place(LOCAL_RANK="x", LOCAL_WORLD_SIZE="") == (0, 1)


def test_slurm_is_believed_where_its_tasks_are_the_ranks(place):
    task = {"RANK": 17, "WORLD_SIZE": 20, "SLURM_PROCID": 17, "SLURM_LOCALID": 1, "SLURM_NODEID": 2}
    job = {"SLURM_TASKS_PER_NODE": "8(x2),4", "SLURM_NTASKS_PER_NODE": 8}
    assert place(**task, **job) == place(**task, **job, LOCAL_RANK=1) == (1, 4)
    step = {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_TASKS_PER_NODE": "8(x3)"}
    assert place(**task, **step) == (1, 4)
    # A rank that another launcher has started inside one task, and a program in a batch script, which is alone.
    assert place(**{**task, **job, "RANK": 3}) == place(**task, **job, LOCAL_RANK=3) == (0, 1)
    assert place(**{**task, **job, "WORLD_SIZE": 8}) == (0, 1)
    alone = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0, "SLURM_TASKS_PER_NODE": "8"}
    assert place(**alone) == (0, 1)
    assert place(**{**task, **job, "SLURM_NODEID": 3}) == place(**{**task, **job, "SLURM_LOCALID": 4}) == (0, 1)
