"""Parquet files of Hugging Face."""

import json
import sys

import pytest
from source_trees import counts, encoded, taken

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.sources import Request, open_source
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert taken(tmp_path) == "parquet"
    with pytest.raises(UserError, match=r"^parquet files need pyarrow, which is not installed: pip install pyarrow$"):
        open_source(str(tmp_path), Request())


def test_parquet_of_hugging_face(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    def write(name, numbers):
        rows = [{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers]
        features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
        schema = pa.schema(
            [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
            metadata={"huggingface": json.dumps(features)},
        )
        table = pa.table({"image": rows, "label": [n % 2 for n in numbers]}, schema=schema)
        (tmp_path / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "data" / name, row_group_size=2)

    write("train-00000-of-00001.parquet", range(5))
    write("validation-00000-of-00001.parquet", range(5, 7))
    assert taken(tmp_path) == "parquet" and counts(tmp_path) == {"train": 5, "val": 2}
    parts = {part.subfolder: part for part in open_source(str(tmp_path), Request(column="label"))}
    assert {name: len(part.source) for name, part in parts.items()} == {
        "cat/train": 3,
        "cat/val": 1,
        "dog/train": 2,
        "dog/val": 1,
    }
    item = parts["cat/train"].source.item(2)
    assert item.content == encoded(4) and item.metadata == {"file": "4.png", "label": "cat"}
    result = pack(parts["dog/train"], tmp_path / "out", PackOptions(resolution=8, workers=1))
    assert result.samples == 2
