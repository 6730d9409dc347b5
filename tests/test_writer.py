import contextlib
import hashlib
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import webdataset

from letit_dist.data.index import JOURNAL_NAME, Index
from letit_dist.data.reader import ShardDataset
from letit_dist.data.writer import ShardWriter, clean_key
from letit_dist.errors import UserError


def sample(number):
    return {"png": hashlib.sha256(bytes([number])).digest() * (1 + number), "json": json.dumps({"n": number}).encode()}


def fill(writer, stop=10):
    for number in range(writer.resume_at, stop):
        writer.write(f"k{number}", sample(number), position=number)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_plain_webdataset_reads_what_was_written(tmp_path):
    long = "deep/" * 30 + "é name"
    with ShardWriter(tmp_path) as writer:
        writer.write(long, {"top.npy": b"top", "bottom.npy": b"bottom"})
        writer.write("b", sample(3))
    first, second = webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False)
    assert first["__key__"] == long and first["top.npy"] == b"top" and first["bottom.npy"] == b"bottom"
    assert second["__key__"] == "b" and second["png"] == sample(3)["png"]
    assert second["json"] == sample(3)["json"]


def test_same_input_same_bytes(tmp_path):
    for name in "ab":
        with ShardWriter(tmp_path / name, meta={"x": 1}, shard_samples=4) as writer:
            fill(writer)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == ["index.json", *(f"shard-0000{i}.tar" for i in range(3))]


def test_hashes_and_sizes_are_those_of_the_files(tmp_path):
    with ShardWriter(tmp_path, shard_samples=4) as writer:
        fill(writer)
    for shard, problem in Index.read(tmp_path).hash_problems():
        assert problem is None
        assert (tmp_path / shard.name).stat().st_size == shard.bytes


def test_shards_stay_below_their_size_unless_one_sample_is_larger(tmp_path):
    with ShardWriter(tmp_path, shard_bytes=40_960) as writer:
        for number in range(12):
            writer.write(str(number), {"bin": bytes(7000)})
        writer.write("large", {"bin": bytes(100_000)})
    sizes = [shard.bytes for shard in Index.read(tmp_path).shards]
    assert sizes == [40_960, 40_960, 20_480, 102_400]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("img.v1.0001", "img_v1_0001"),
        ("a.b/c.d", "a_b/c_d"),
        ("__MACOSX__/x", "MACOSX__/x"),
        ("\\win\\x", "win_x"),
        ("...", "sample"),
        ("line\nbreak", "line_break"),
        ("bad\udcff", "bad_"),
    ],
)
def test_keys_are_cleaned(name, key):
    assert clean_key(name) == key


def test_colliding_keys_are_numbered_and_counted(tmp_path):
    with ShardWriter(tmp_path) as writer:
        keys = [writer.write(name, {"txt": name.encode()}) for name in ("a.b", "a_b", "a_b-2", "a b", "a.b")]
    assert keys == ["a_b", "a_b-2", "a_b-2-2", "a b", "a_b-3"]
    assert writer.renamed == 3
    dataset = ShardDataset([tmp_path])
    assert dataset.read(1)["txt"] == b"a_b" and dataset.read(4)["txt"] == b"a.b"


@pytest.mark.parametrize("names", [[], ["PNG"], [".png"], ["_x"], ["a/b"]])
def test_odd_extensions_are_refused(tmp_path, names):
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="lower case"):
            writer.write("k", dict.fromkeys(names, b""))
        writer.write("k", {"txt": b""})


def begin_and_die(folder, settings):
    with ShardWriter(folder, settings=settings, meta={"m": 1}, shard_samples=3) as writer:
        writer.skip("unreadable", "why", position=1)
        fill(writer, 8)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def killed(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=begin_and_die, args=(tmp_path / "killed", {"s": 1}))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    return tmp_path / "killed"


def test_a_killed_pack_has_no_index_and_continues_to_the_same_bytes(killed, tmp_path):
    assert not (killed / "index.json").exists()
    with pytest.raises(UserError, match="interrupted here"):
        Index.read(killed)
    stamp = (killed / "shard-00001.tar").stat().st_mtime_ns
    with ShardWriter(killed, settings={"s": 1}, meta={"m": 1}, shard_samples=3) as writer:
        assert writer.resume_at == 6
        assert writer.all_skipped() == [("unreadable", "why")]
        fill(writer)
    assert (killed / "shard-00001.tar").stat().st_mtime_ns == stamp
    with ShardWriter(tmp_path / "whole", meta={"m": 1}, shard_samples=3) as writer:
        fill(writer)
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_shard_lost_after_the_kill_is_written_again(killed):
    (killed / "shard-00001.tar").write_bytes(b"half")
    with (killed / "unfinished.jsonl").open("ab") as stream:
        stream.write(b'{"shard": {"na')
    with ShardWriter(killed, settings={"s": 1}, meta={"m": 1}, shard_samples=3) as writer:
        assert writer.resume_at == 3
        fill(writer)
    assert [problem for _, problem in Index.read(killed).hash_problems()] == [None] * 4


def test_other_settings_cannot_continue(killed):
    with pytest.raises(UserError, match="begun with other settings") as caught:
        ShardWriter(killed, settings={"s": 2})
    assert "s: 1 -> 2" in str(caught.value)


def test_an_exception_keeps_whole_shards(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, shard_samples=3) as writer:
        fill(writer, 5)
        raise RuntimeError
    assert sorted(contents(tmp_path)) == ["shard-00000.tar", "unfinished.jsonl"]
    with ShardWriter(tmp_path, shard_samples=3) as writer:
        assert writer.resume_at == 3


def test_folders_in_use_are_refused(tmp_path):
    with ShardWriter(tmp_path / "a") as writer:
        with pytest.raises(UserError, match="another process is writing here"):
            ShardWriter(tmp_path / "a")
        fill(writer)
    with pytest.raises(UserError, match="already holds finished shards"):
        ShardWriter(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "theirs.tar").touch()
    with pytest.raises(UserError, match=r"holds other tars \(theirs\.tar"):
        ShardWriter(tmp_path / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        ShardWriter(tmp_path / "file")


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no sample was written"), ShardWriter(tmp_path):
        pass


def test_arrays_survive(tmp_path):
    codes = np.arange(12, dtype=np.int16).reshape(3, 4)
    with ShardWriter(tmp_path, kind="codes") as writer:
        writer.write("k", {"top.npy": codes.tobytes()})
    assert ShardDataset([tmp_path]).read(0)["top.npy"] == codes.tobytes()


def test_an_attempt_without_a_whole_shard_binds_nobody(tmp_path):
    """Its settings protect shards; where there is none, other settings simply begin."""
    with contextlib.suppress(KeyError), ShardWriter(tmp_path, meta={"side": 32}) as writer:
        writer.write("a", {"txt": b"a"})
        raise KeyError
    assert (tmp_path / JOURNAL_NAME).exists() and not list(tmp_path.glob("*.tar"))
    with ShardWriter(tmp_path, meta={"side": 64}) as writer:
        writer.write("b", {"txt": b"b"})
    assert Index.read(tmp_path).meta == {"side": 64} and not (tmp_path / JOURNAL_NAME).exists()
