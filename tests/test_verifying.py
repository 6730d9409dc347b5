"""Shards whose bytes are no longer those of their index, though every image in them decodes."""

import time

import pytest
from conftest import tiny_autoencoder

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
    assert lines[0].endswith(": it is not as it was packed; copy it again, then the same command continues")
    first(feed(shards, verify="sizes"))


def test_ranks_of_a_machine_share_the_work_and_each_machine_does_all(shards, monkeypatch):
    flip(shards / "shard-00001.tar")
    for rank, bad in ((0, False), (1, True)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        if bad:
            with pytest.raises(UserError, match=r"shard-00001\.tar: sha256"):
                first(feed(shards), rank, 2)
        else:
            first(feed(shards), rank, 2)
    # No launcher says how many there are here, or Slurm alone does: nothing is left out.
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert verifying.place_on_machine() == (0, 1)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    assert verifying.place_on_machine() == (1, 8)
    monkeypatch.delenv("LOCAL_RANK")
    assert verifying.place_on_machine() == (0, 1)


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
    count = len(list(shards.glob("*.tar")))
    assert f"data.verify: {count} shards (0.000123 GB) are hashed in the background\n" in capsys.readouterr().out
    end = time.monotonic() + 30
    with pytest.raises(UserError, match=r"shard-00003\.tar: sha256"):
        while time.monotonic() < end:
            sound(next(batches))
            time.sleep(0.01)


def test_one_that_cannot_be_read_is_named(shards):
    index = Index.read(shards)
    (shards / "shard-00004.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00004\.tar: cannot be read: No such file"):
        raise UserError(str(verifying.Verification([index]).problem))


def test_latents_as_well(shards, fruit_latents, tmp_path):
    encode_domain(tiny_autoencoder(), ShardDataset([shards]), tmp_path / "latents", EncodeOptions())
    tar = tmp_path / "latents/shard-00000.tar"
    sides = (LatentSet.open(fruit_latents / "orange"), LatentSet.open(tmp_path / "latents"))
    first(LatentFeed(*sides, seed=0))
    flip(tar)
    with pytest.raises(UserError, match=r"latents/shard-00000\.tar: sha256"):
        first(LatentFeed(*sides, seed=0))
