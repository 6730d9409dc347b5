"""Shards whose bytes are no longer those of their index, though every image in them decodes."""

import errno
import os
import re
import threading
import time

import pytest
from conftest import tiny_autoencoder
from programs import STYLES, run

from letit_dist import files
from letit_dist.data import verifying
from letit_dist.data.encoding import EncodeOptions, encode_domain
from letit_dist.data.index import Index
from letit_dist.data.latents import LatentSet
from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, open_source
from letit_dist.errors import UserError
from letit_dist.schemas import ImagesConfig
from letit_dist.training.feeds import ImageFeed, LatentFeed


def flip(path, offset=-1):
    """Another bit in the zeros that end a tar: nothing that reads samples can notice."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def shards(tmp_path):
    """24 apples in several shards."""
    (part, *_) = open_source("builtin:fruit", Request(resolution=32, count=24, test=8, seed=0))
    pack(part, tmp_path, PackOptions(resolution=32, shard_bytes=20_000))
    folder = tmp_path / "apple/train"
    assert len(list(folder.glob("*.tar"))) > 3
    return folder


def feed(*folders, **options):
    return ImageFeed(ImagesConfig(train=tuple(map(str, folders)), **{"workers": 0, **options}), seed=0)


def first(feed, rank=0, ranks=1):
    return sound(next(feed.batches(0, 4, rank, ranks, None)))


def require(verification):
    if problem := verification.check():
        raise UserError(problem)


def sound(batch):
    """As training does it: what a batch says of the data ends the run."""
    if batch.problem:
        raise UserError(batch.problem)
    return batch


@pytest.mark.parametrize("workers", [0, 1])
def test_a_small_set_is_known_to_be_whole_before_anything_is_learnt(shards, workers):
    first(feed(shards))
    flip(shards / "shard-00002.tar")
    with pytest.raises(UserError) as caught:
        first(feed(shards, workers=workers))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{shards / 'shard-00002.tar'}: sha256 ")
    assert lines[0].endswith(": it is not as it was packed: restore it, then the same command continues")
    first(feed(shards, verify="sizes"))


# What launchers tell the ranks of two machines, eight on one and four on the other: by (rank, machine, number there).
LAUNCHERS = {
    "torchrun": lambda rank, node, local: {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": (8, 4)[node]},
    "deepspeed": lambda rank, node, local: {"LOCAL_RANK": local, "LOCAL_SIZE": (8, 4)[node]},
    "mpirun": lambda rank, node, local: {
        "OMPI_COMM_WORLD_LOCAL_RANK": local,
        "OMPI_COMM_WORLD_LOCAL_SIZE": (8, 4)[node],
    },
    "srun": lambda rank, node, local: {
        **{"RANK": rank, "WORLD_SIZE": 12, "LOCAL_RANK": local, "SLURM_PROCID": rank, "SLURM_LOCALID": local},
        **{"SLURM_NODEID": node, "SLURM_TASKS_PER_NODE": "8,4", "SLURM_NTASKS_PER_NODE": 8},
    },
    "a batch script": lambda rank, node, local: {
        **{"RANK": rank, "WORLD_SIZE": 12, "LOCAL_RANK": local, "SLURM_PROCID": 0, "SLURM_LOCALID": 0},
        **{"SLURM_NODEID": 0, "SLURM_TASKS_PER_NODE": "8,4", "SLURM_NTASKS_PER_NODE": 8},
    },
    "nobody": lambda rank, node, local: {"LOCAL_RANK": local, "SLURM_NTASKS_PER_NODE": 8},
}


@pytest.fixture
def hashed(monkeypatch):
    """Names of the shards that are hashed, in turn."""
    names, really = [], Index.hash_problem
    monkeypatch.setattr(Index, "hash_problem", lambda index, shard: names.append(shard.name) or really(index, shard))
    return names


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_a_machine_share_the_work_and_each_machine_does_all(shards, monkeypatch, hashed, launcher):
    index = Index.read(shards)
    everything = sorted(shard.name for shard in index.shards)
    places = [(rank, rank // 8, rank % 8) for rank in range(12)]
    for machine in (0, 1):
        del hashed[:]
        for place in (place for place in places if place[1] == machine):
            with monkeypatch.context() as patched:
                for name, value in LAUNCHERS[launcher](*place).items():
                    patched.setenv(name, str(value))
                require(verifying.Verification([index]))
        # Each says nothing of how many there are, or not of these ranks: then it is done more than once.
        at_least = {"a batch script": set, "nobody": set}.get(launcher, list)
        assert sorted(at_least(hashed)) == everything


def test_ranks_of_all_machines_share_the_work_where_they_share_the_storage(shards, hashed):
    index = Index.read(shards)
    for rank in range(3):
        require(verifying.Verification([index], (rank, 3)))
    assert sorted(hashed) == sorted(shard.name for shard in index.shards)


@pytest.mark.parametrize(("verify", "each"), [("hashes", 2), ("once", 1), ("sizes", 0)])
def test_what_a_run_asks_for(shards, monkeypatch, hashed, verify, each):
    """Two machines of one rank each."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for rank in (0, 1):
        first(feed(shards, verify=verify), rank, 2)
    assert sorted(hashed) == sorted(shard.name for shard in Index.read(shards).shards for _ in range(each))


def test_a_large_set_delays_nothing_and_is_found_out_on_the_way(shards, monkeypatch, capsys):
    flip(shards / "shard-00003.tar")
    monkeypatch.setattr(verifying, "PATIENCE", 0.05)
    really = Index.hash_problem

    def slow(index, shard):
        time.sleep(0.2)
        return really(index, shard)

    monkeypatch.setattr(Index, "hash_problem", slow)
    batches = feed(shards).batches(0, 4, 0, 1, None)
    assert len(next(batches).positions) == 4
    found = Index.read(shards).shards
    total = f"{len(found)} shards ({sum(shard.bytes for shard in found) / 1e9:.3g} GB)"
    assert f"data.verify: {total} are hashed in the background\n" in capsys.readouterr().out
    end = time.monotonic() + 30
    with pytest.raises(UserError, match=r"shard-00003\.tar: sha256"):
        while time.monotonic() < end:
            sound(next(batches))
            time.sleep(0.01)


def test_one_that_cannot_be_read_is_named(shards):
    index = Index.read(shards)
    (shards / "shard-00004.tar").unlink()
    end = r"cannot be read: No such file or directory: restore it, then the same command continues$"
    with pytest.raises(UserError, match=rf"shard-00004\.tar: {end}"):
        require(verifying.Verification([index]))


class Flaky:
    """`hash_file` on storage that fails `times` times."""

    def __init__(self, times):
        self.left = times

    def __call__(self, path):
        self.left -= 1
        if self.left >= 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return files.hash_file(path)


def test_an_outage_of_the_storage_is_no_damage(shards, monkeypatch):
    index = Index.read(shards)
    monkeypatch.setattr("letit_dist.data.index.WAITS", (0, 0))
    monkeypatch.setattr("letit_dist.data.index.hash_file", Flaky(2))
    verification = verifying.Verification([index])
    require(verification)
    assert verification.unfinished is None
    monkeypatch.setattr("letit_dist.data.index.hash_file", Flaky(3))
    with pytest.raises(UserError) as caught:
        require(verifying.Verification([index]))
    assert str(caught.value) == (
        f"{shards / 'shard-00000.tar'}: cannot be read, in 3 attempts: {os.strerror(errno.ESTALE)}: restore it, or the "
        "disk or server that it lies on, then the same command continues"
    )


def test_a_thread_that_ends_is_heard_of(shards, monkeypatch):
    def broken(path):
        raise MemoryError("no more\nof it")

    monkeypatch.setattr("letit_dist.data.index.hash_file", broken)
    with pytest.raises(UserError, match=r"shard-00000\.tar: could not be hashed: MemoryError: no more of it: remove"):
        require(verifying.Verification([Index.read(shards)]))


def test_a_run_that_ends_before_them_says_so(shards, monkeypatch, capsys):
    index = Index.read(shards)
    monkeypatch.setattr(verifying, "PATIENCE", 0)
    go, really = threading.Semaphore(2), Index.hash_problem
    monkeypatch.setattr(Index, "hash_problem", lambda index, shard: go.acquire() and really(index, shard))
    verification = verifying.Verification([index])
    count = len(index.shards)
    wait_until(lambda: verification.unfinished == said(2, count))
    require(verification)
    go.release(count)
    wait_until(lambda: verification.unfinished is None)
    verification._thread.join()
    capsys.readouterr()
    for line in (r"data\.verify: the shards of this rank have the bytes of their index \(\d+ s\)\n", ""):
        require(verification)
        assert re.fullmatch(line, capsys.readouterr().out)


def said(hashed, count):
    return f"data.verify: {hashed} of {count} shards were hashed, the others may have changed"


def wait_until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_latents_as_well(shards, fruit_latents, tmp_path):
    encode_domain(tiny_autoencoder(), ShardDataset([shards]), tmp_path / "latents", EncodeOptions())
    tar = tmp_path / "latents/shard-00000.tar"
    sides = (LatentSet.open(fruit_latents / "orange"), LatentSet.open(tmp_path / "latents"))
    first(LatentFeed(*sides, seed=0))
    flip(tar)
    with pytest.raises(UserError, match=r"latents/shard-00000\.tar: sha256"):
        first(LatentFeed(*sides, seed=0))


def test_a_run_that_ends_before_its_shards_were_hashed_says_so(chain, tmp_path, monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(verifying, "PATIENCE", 0.01)
    monkeypatch.setattr(Index, "hash_problem", lambda index, shard: end.wait(60) and None)
    for command in (list(chain.pretrain), list(chain.train_energy(*STYLES))):
        command[command.index("--run") + 1] = tmp_path / command[0].rpartition("/")[2]
        done = run(*command)
        assert done.code == 0, done.err
        assert re.search(r"^data\.verify: 0 of \d+ shards were hashed, the others may have changed$", done.out, re.M)
    end.set()
