"""Hugging Face's parquet: rows without file names, several columns of images, and the Hub's own conversion."""

import io

import pytest
from PIL import Image
from test_pack import noise, program

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, find, open_source
from letit_dist.errors import UserError

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


def test_two_columns_of_images_are_two_domains(tmp_path):
    root = tmp_path / "apple2orange"
    write(root / "data/train-00000-of-00001.parquet", {"imageA": [0, 1, 2], "imageB": [3, 4, 5]})
    write(root / "data/test-00000-of-00001.parquet", {"imageA": [6], "imageB": [7]})
    assert counts(root) == {"apple/test": 1, "apple/train": 3, "orange/test": 1, "orange/train": 3}
    parts = {part.subfolder: part for part in open_source(str(root), Request())}
    assert [part.domain for part in parts.values()] == ["apple", "apple", "orange", "orange"]
    for name, first in (("apple", 0), ("orange", 3)):
        source = parts[f"{name}/train"].source
        assert [source.item(n).content for n in range(3)] == [encoded(first + n) for n in range(3)]
    apple, orange = (parts[f"{name}/train"].source.settings() for name in ("apple", "orange"))
    assert apple != orange
    assert counts(root, image_column="imageB") == {"test": 1, "train": 3}
    assert counts(root, domain="orange", split="test") == {"orange/test": 1}
    (root / "data").rename(tmp_path / "elsewhere")
    assert set(counts(tmp_path / "elsewhere")) == {f"{side}/{split}" for side in "AB" for split in ("train", "test")}


def test_of_several_columns_of_images_one_is_named(tmp_path, capsys):
    two, one = tmp_path / "two", tmp_path / "one"
    write(two / "train.parquet", {"photo": [0, 1], "mask": [2, 3], "side": ["a", "b"]})
    out = tmp_path / "out"
    assert program("pack", two, "--out", out) == 2
    assert "2 columns of images (photo, mask): name one by --image-column" in capsys.readouterr().err
    assert program("pack", two, "--out", out, "--image-column", "side") == 2
    assert "--image-column side" in (error := capsys.readouterr().err) and "has photo, mask" in error
    assert program("pack", two, "--out", out, "--image-column", "mask", "--resolution", 8) == 0
    assert ShardDataset([out / "train"]).json(0)["file"] == "2.png"
    # Into the same folder, the other column is another set.
    capsys.readouterr()
    assert program("pack", two, "--out", out, "--image-column", "photo", "--resolution", 8) == 2
    assert "already packed with other settings" in (error := capsys.readouterr().err) and "image_column" in error
    write(one / "train.parquet", {"mask": [2, 3], "image": [0, 1]})
    [part] = open_source(str(one), Request())
    assert part.source.item(0).content == encoded(0)
    with pytest.raises(UserError, match="--image-column has no effect on"):
        open_source(str(out / "train"), Request(image_column="mask"))
    pair = tmp_path / "pair"
    write(pair / "x.parquet", {"imageA": [0], "imageB": [1], "side": ["a"]})
    with pytest.raises(UserError, match="--column side: imageA and imageB are the domains already"):
        open_source(str(pair), Request(column="side"))


def test_the_conversion_of_the_hub_keeps_its_splits(tmp_path):
    root = tmp_path / "set"
    write(root / "default/partial-train/0000.parquet", {"image": [0, 1]})
    write(root / "default/partial-train/0001.parquet", {"image": [2]})
    write(root / "default/test/0000.parquet", {"image": [3]})
    assert counts(root) == counts(root / "default") == {"test": 1, "train": 3}
    write(root / "other/test/0000.parquet", {"image": [3]})
    with pytest.raises(UserError, match=r"2 sets in parquet, name one: .*default, .*other"):
        open_source(str(root), Request())
    # Tables beside images are not them.
    photos = tmp_path / "photos"
    write(photos / "test/boxes.parquet", {"image": [4]})
    (photos / "test/0.png").write_bytes(encoded(5))
    assert find(str(photos)).layout.name == "folder"
