"""Encoded domains that do not fit into memory are read from the shards, row by row, and are the same."""

import contextlib
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from letit_dist.data.latents import LatentSet, LatentWriter
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError
from letit_dist.memory import available_bytes


@contextlib.contextmanager
def room_for(size):
    """This process may take `size` bytes more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def write(folder, count=96, shape=(1 << 18,), dtype="float32"):
    with LatentWriter(folder, kind="latents", autoencoder_fingerprint="f", dtype=dtype, shard_bytes=1 << 25) as writer:
        for number in range(count):
            value = torch.full(shape, number / 4)
            value[number] = -1
            writer.write(f"k{number}", {"latent": value}, json_data={"n": number})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_does_not_fit_is_read_from_the_shards(tmp_path, dtype):
    write(tmp_path, count=96 if dtype == "float32" else 192, dtype=dtype)  # 96 MiB
    whole = LatentSet.open(tmp_path)
    rows = torch.tensor([90, 3, 3, 41])
    expected = whole.take(rows)["latent"]
    with room_for(64 << 20):
        assert available_bytes() <= 64 << 20
        found = LatentSet.open(tmp_path, autoencoder_fingerprint="f")
        assert torch.equal(found.take(rows)["latent"], expected) and expected.dtype == torch.float32
        assert found.fields == {} and found.json(7) == {"n": 7}
    assert found.keys == whole.keys and len(found) == len(whole) and found.meta == whole.meta
    assert whole.fields["latent"].dtype == getattr(torch, dtype)
    with pytest.raises(UserError, match="encoded by autoencoder f, this run has autoencoder g"):
        LatentSet.open(tmp_path, autoencoder_fingerprint="g")


def test_codes_and_damaged_rows_on_disk(tmp_path, monkeypatch):
    with LatentWriter(tmp_path / "c", kind="codes", autoencoder_fingerprint="f", codebook_size=300) as writer:
        for number in range(5):
            writer.write(f"k{number}", {"top": torch.full((2, 2), number), "bottom": torch.full((4, 4), 290 + number)})

    def npy(count):
        np.save(tmp_path / "x.npy", np.zeros(count))
        return (tmp_path / "x.npy").read_bytes()

    with ShardWriter(tmp_path / "d", kind="latents") as writer:
        for name, count in (("a", 2), ("b", 3)):
            writer.write(name, {"latent.npy": npy(count)})
    whole = LatentSet.open(tmp_path / "c").take([4, 0])
    monkeypatch.setattr("letit_dist.data.latents.SHARE", 0)
    codes = LatentSet.open(tmp_path / "c")
    assert codes.fields == {}
    for name, values in codes.take([4, 0]).items():
        assert values.dtype == torch.int64 and torch.equal(values, whole[name])
    damaged = LatentSet.open(tmp_path / "d")
    with pytest.raises(UserError, match=r"b\.latent\.npy: torch.float64 \(3,\), the others are torch.float64 \(2,\)"):
        damaged.take([1])


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    alone = available_bytes()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_SIZE", "8")  # as DeepSpeed's launcher says it
    assert 0 < available_bytes() < alone / 4
