"""Hugging Face's parquet: rows without file names, several columns of images, and the Hub's own conversion."""

import io

import pytest
from PIL import Image
from test_pack import noise

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, open_source

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(number):
    stream = io.BytesIO()
    Image.fromarray(noise(number, 10, 12)).save(stream, "PNG")
    return stream.getvalue()


def counts(spec, **request):
    return {part.subfolder: len(part.source) for part in open_source(str(spec), Request(**request))}


def write(path, columns, paths="{}.png", group=2):
    """Columns of images, given as numbers of pictures; other values as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {name: IMAGE if isinstance(values[0], int) else pa.string() for name, values in columns.items()}
    rows = {
        name: [{"bytes": encoded(v), "path": paths and paths.format(v)} for v in values]
        if kinds[name] is IMAGE
        else values
        for name, values in columns.items()
    }
    parquet.write_table(pa.table(rows, schema=pa.schema(list(kinds.items()))), path, row_group_size=group)


@pytest.mark.parametrize(("paths", "told"), [(None, {}), ("{}", {}), ("{}.jpg", {"PNG named .jpg": 3})])
def test_only_a_name_that_says_a_format_can_be_wrong(tmp_path, paths, told, capsys):
    write(tmp_path / "in/train-00000-of-00001.parquet", {"image": [0, 1, 2]}, paths)
    [part] = open_source(str(tmp_path / "in"), Request())
    assert pack(part, tmp_path / "out", PackOptions(resolution=8)).notes == told
    assert ("notes" in ShardDataset([tmp_path / "out/train"]).json(2)) == bool(told)
