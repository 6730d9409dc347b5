import json
import tarfile
import time

import pytest

from letit_dist.data.index import Index, Shard, build_index, split_name
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "set", meta={"resolution": 8}, shard_samples=3) as writer:
        for number in range(7):
            files = {"png": bytes([number]) * (number + 1)}
            if number % 2:
                files["json"] = b"{}"
            writer.write(f"a/{number}é", files)
    return tmp_path / "set"


def test_every_offset_points_at_its_bytes(folder):
    index = Index.read(folder)
    assert [shard.samples for shard in index.shards] == [3, 3, 1]
    assert index.meta == {"resolution": 8} and index.kind == "images" and len(index) == 7
    for number in range(7):
        assert index.key(number) == f"a/{number}é"
        files = index.files(number)
        assert set(files) == ({"json", "png"} if number % 2 else {"png"})
        offset, size = files["png"]
        data = index.path_of(number).read_bytes()[offset : offset + size]
        assert data == bytes([number]) * (number + 1)
        assert number in index.samples_of(index.shard_of(number))


def test_written_read_and_written_again_is_the_same(folder):
    before = (folder / "index.json").read_bytes()
    Index.read(folder).write()
    assert (folder / "index.json").read_bytes() == before


def test_hashes_find_a_flipped_bit(folder):
    path = folder / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    problems = [problem for _, problem in Index.read(folder).hash_problems()]
    assert [bool(problem) for problem in problems] == [False, True, False]
    assert "shard-00001.tar: sha256" in problems[1]


def test_all_mismatched_tars_are_named_at_once(folder):
    (folder / "shard-00000.tar").unlink()
    with (folder / "shard-00002.tar").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError) as caught:
        Index.read(folder)
    first, second = str(caught.value).splitlines()
    assert "shard-00000.tar: listed in index.json and not there" in first
    assert "shard-00002.tar: 10241 bytes, index.json says 10240" in second


def edit(folder, **changes):
    tree = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**tree, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, this version reads up to 1: upgrade"),
        ({"format": None}, "no format number"),
        ({"kind": "videos"}, "damaged.*kind 'videos', known: images"),
        ({"shards": [{"name": "../x.tar", "bytes": 1, "sha256": "", "samples": 7}]}, "'../x.tar' leaves the folder"),
        ({"samples": {"keys": ["a"], "layouts": [[]], "layout": [0], "offsets": [], "sizes": []}}, "same length"),
        ({"samples": {}}, "damaged: KeyError"),
    ],
)
def test_a_wrong_index_is_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        Index.read(folder)


def test_text_that_is_not_json(folder):
    (folder / "index.json").write_text('{"format": 1, "shards"')
    with pytest.raises(UserError, match=r"index\.json: not readable"):
        Index.read(folder)


def test_missing_folders_are_told_apart(folder):
    with pytest.raises(UserError, match=r"no such shard folder: .*/sett, did you mean .*/set"):
        Index.read(folder.parent / "sett")
    with pytest.raises(UserError, match=r"there is one in .*/set"):
        Index.read(folder.parent)
    with pytest.raises(UserError, match="this is a file"):
        Index.read(folder / "index.json")
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"tars without index\.json: python shards/check\.py"):
        Index.read(folder)
    (folder / "unfinished.jsonl").touch()
    with pytest.raises(UserError, match="interrupted here"):
        Index.read(folder)


def test_an_index_can_be_made_for_other_tars(folder):
    ours = Index.read(folder)
    (folder / "index.json").unlink()
    made = build_index(folder)
    assert [made.files(i) for i in range(7)] == [ours.files(i) for i in range(7)]
    assert made.shards == ours.shards


def test_a_cut_or_compressed_tar_cannot_be_indexed(folder, tmp_path):
    path = folder / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:1100])
    with pytest.raises(UserError, match=r"shard-00000\.tar: not a readable"):
        build_index(folder)
    (tmp_path / "gz").mkdir()
    with tarfile.open(tmp_path / "gz" / "a.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="uncompressed"):
        build_index(tmp_path / "gz")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no \*\.tar"):
        build_index(tmp_path / "none")


def test_keys_end_at_the_first_dot():
    assert split_name("a.b/c.r256.JPG") == ("a.b/c", "r256.jpg")
    assert split_name("no_dot") is None


def test_a_large_index_loads_in_under_a_second(tmp_path):
    samples = [(f"{i:08d}", {"png": (i * 2000, 900), "json": (i * 2000 + 1024, 60)}) for i in range(70_000)]
    (tmp_path / "s.tar").touch()
    Index(tmp_path, "images", [Shard("s.tar", 0, "", 70_000)], samples, {}).write()
    assert (tmp_path / "index.json").stat().st_size < 4e6
    begun = time.perf_counter()
    index = Index.read(tmp_path)
    assert time.perf_counter() - begun < 1
    assert index.files(69_999) == samples[-1][1] and index.key(69_999) == samples[-1][0]
