"""Lists of paths, tables, and image folders with a table beside them."""

import csv
import json

import pytest
from source_trees import counts, images, notes, opened, taken
from test_pack import noise, save

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, open_source
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_a_list_of_paths(tmp_path):
    images(tmp_path / "in", ["b.png", "x/a.v1.png"])
    save(noise(5), tmp_path / "elsewhere/c.png")
    lines = ["in/x/a.v1.png", "", str(tmp_path / "elsewhere/c.png"), "in/b.png", "in/gone.png"]
    (tmp_path / "some.txt").write_text("\n".join(lines) + "\n")
    assert taken(tmp_path / "some.txt") == "list"
    assert opened(tmp_path / "some.txt")[""][2] == [line for line in lines if line]
    assert notes(tmp_path / "some.txt") == ["1 of 4 files are not there, the first: in/gone.png"]
    [part] = open_source(str(tmp_path / "some.txt"), Request(domain="x"))
    result = pack(part, tmp_path / "out", PackOptions(resolution=8, max_bad_fraction=0.5))
    assert (result.samples, result.unreadable) == (3, 1)
    dataset = ShardDataset([tmp_path / "out"])
    assert [dataset.key(0), dataset.key(2)] == ["in/x/a_v1", "in/b"]
    (tmp_path / "odd.txt").write_text("in/b.png\nhello\n")
    with pytest.raises(UserError, match=r"odd\.txt, line 2: 'hello' is no path of an image"):
        open_source(str(tmp_path / "odd.txt"), Request())


def test_a_table_with_a_column_as_domain(tmp_path):
    images(tmp_path, [f"{n}.png" for n in range(4)])
    with (tmp_path / "all.csv").open("w", newline="") as stream:
        rows = [["path", "kind", "split", "note"]]
        rows += [[f"{n}.png", "Big cat" if n < 3 else "dog", "train" if n else "validation", "a\nb"] for n in range(4)]
        csv.writer(stream).writerows(rows)
    table = tmp_path / "all.csv"
    assert taken(table) == "csv"
    assert counts(table) == {"train": 3, "val": 1}
    assert counts(table, column="kind") == {"big_cat/train": 2, "big_cat/val": 1, "dog/train": 1}
    assert counts(table, column="kind", domain="dog") == {"dog/train": 1}
    [part] = open_source(str(table), Request(column="kind", domain="dog"))
    assert part.source.item(0).metadata == {"file": "3.png", "kind": "dog", "note": "a\nb"}
    with pytest.raises(UserError, match=r"all\.csv: no column 'sort'; it has path, kind, split, note"):
        open_source(str(table), Request(column="sort"))
    with pytest.raises(UserError, match="one domain where two are needed: column 'note' holds 'a_b' alone"):
        open_source(str(table), Request(column="note"))
    table.write_text("name,kind\n0.png,x\n")
    with pytest.raises(UserError, match="no column of paths"):
        open_source(str(table), Request())


def test_image_folders_of_hugging_face(tmp_path):
    root = tmp_path / "hf"
    images(root, ["train/a.png", "train/b.png", "test/c.png"])
    rows = [{"file_name": "a.png", "label": "x"}, {"file_name": "b.png", "label": "y"}]
    (root / "train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "test/metadata.csv").write_text("file_name,label\nc.png,x\n")
    assert taken(root) == "imagefolder"
    assert counts(root) == {"train": 2, "test": 1}
    found = opened(root, column="label")
    assert {name: paths for name, (_, _, paths) in found.items()} == {
        "x/train": ["train/a.png"],
        "x/test": ["test/c.png"],
        "y/train": ["train/b.png"],
    }
