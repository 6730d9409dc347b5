"""Which layout is taken, what is said of it, and what packing makes of quirks and of equal files."""

import numpy as np
import pytest
from PIL import Image
from source_trees import celeba_tree, counts, encoded, images, taken
from test_pack import noise, program, save

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import LAYOUTS, Request, find, open_source
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture
def celeba(tmp_path):
    return celeba_tree(tmp_path / "celeba")


def test_folders_as_domains_only_on_request(tmp_path):
    images(tmp_path, ["cat/a.png", "cat/b.png", "dog/c.png"])
    assert taken(tmp_path) == "folder" and "--layout domains" in find(str(tmp_path)).saw
    assert counts(tmp_path) == {"": 3}
    assert counts(tmp_path, layout="domains") == {"cat": 2, "dog": 1}
    with pytest.raises(UserError, match="two domains are needed, one folder of images each; found none"):
        open_source(str(tmp_path / "cat"), Request(layout="domains"))


def test_what_was_seen_is_said_with_the_other_ways(tmp_path):
    root = tmp_path / "apple2orange"
    images(root, ["trainA/a.jpg", "trainB/b.jpg"])
    line = find(str(root)).line("apple2orange")
    assert line == (
        "apple2orange: taken for cyclegan: CycleGAN's folders (trainA, trainB); could also be folder (--layout NAME)"
    )
    with pytest.raises(UserError, match=r"--layout cycle: known are fruit, list, csv, .*, did you mean cyclegan"):
        find(str(root), "cycle")
    with pytest.raises(UserError, match=r"--attribute, --column has no effect on the folder .* \(taken for cyclegan\)"):
        open_source(str(root), Request(attribute="Male", column="x"))


def test_every_layout_has_its_own_name():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert all(layout.__doc__ and layout.recognise("nowhere") is None for layout in LAYOUTS)


def test_a_dry_run_prints_the_plan_and_writes_nothing(celeba, tmp_path, capsys):
    arguments = (celeba, "--out", tmp_path / "out", "--attribute", "Male", "--resolution", 8, 4, "--format", "jpeg")
    assert program("pack", *arguments, "--dry-run") == 0
    out = capsys.readouterr().out.splitlines()
    assert "taken for celeba" in out[0]
    assert [line.split() for line in out if line.startswith("  f")] == [
        ["folder", "domain", "split", "images", "MB"],
        ["female/train", "female", "train", "2", "0.0"],
        ["female/val", "female", "val", "1", "0.0"],
        ["female/test", "female", "test", "1", "0.0"],
    ]
    assert out[-2].split() == ["all", "6", "0.0"]
    assert f"would write to {tmp_path / 'out'}: jpeg, quality by size, squares of 8, 4 pixels, box filter" in out[-1]
    assert not (tmp_path / "out").exists()
    assert program("pack", *arguments) == 0
    packed = sorted(path.parent.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("index.json"))
    assert packed == ["female/test", "female/train", "female/val", "male/test", "male/val"]
    dataset = ShardDataset([tmp_path / "out/male/test"])
    assert (dataset.indexes[0].meta["domain"], dataset.indexes[0].meta["split"]) == ("male", "test")
    capsys.readouterr()
    assert program("pack", *arguments) == 0
    assert capsys.readouterr().out.count("already packed with these settings") == 5


def test_equal_files_are_counted_within_and_between_splits(tmp_path, capsys):
    root = tmp_path / "a2b"
    images(root, ["trainA/a.png", "trainB/b.png", "testA/c.png", "testB/d.png"])
    (root / "trainA/again.png").write_bytes((root / "trainA/a.png").read_bytes())
    (root / "testB/leak.png").write_bytes((root / "trainA/a.png").read_bytes())
    assert program("pack", root, "--out", tmp_path / "out", "--resolution", 8) == 0
    out = capsys.readouterr().out
    assert "1 x same bytes as an earlier file, kept" in out
    [warning] = [line for line in out.splitlines() if line.startswith("warning")]
    assert warning.startswith(f"warning: 1 equal files in {tmp_path}/out/a/train and {tmp_path}/out/b/test: ")
    assert ShardDataset([tmp_path / "out/a/train"]).indexes[0].meta["duplicates"] == 1
    (tmp_path / "out/b/test/index.json").unlink()
    (tmp_path / "out/b/test/shard-00000.tar").unlink()
    assert program("pack", root, "--out", tmp_path / "out", "--resolution", 8) == 0
    assert "equal files not looked for in what was packed before" in capsys.readouterr().out
    assert "duplicates" not in ShardDataset([tmp_path / "out/b/test"]).indexes[0].meta


def test_duplicates_are_counted_over_an_interruption(tmp_path):
    for number in range(40):
        save(noise(number % 20, 40, 40), tmp_path / f"in/{number:02d}.png")
    (tmp_path / "in/30.png").write_bytes(b"x")
    options = {"resolution": 40, "shard_bytes": 60_000}
    [part] = open_source(str(tmp_path / "in"), Request())
    with pytest.raises(UserError, match="unreadable"):
        pack(part, tmp_path / "out", PackOptions(max_bad_fraction=0, **options))
    result = pack(part, tmp_path / "out", PackOptions(max_bad_fraction=0.1, **options))
    assert result.resumed_at > 20
    assert result.notes["same bytes as an earlier file, kept"] == 19


def test_quirks_of_real_files(tmp_path, capsys):
    """A PNG called JPEG, a turned photograph, ink, glass and depth, dots in names: each in its place, and said."""
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.b.jpg").write_bytes(encoded(1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    turned = np.zeros((16, 16, 3), np.uint8)
    turned[:8] = 255
    Image.fromarray(turned).save(root / "turned.jpg", exif=exif, quality=100)
    Image.fromarray(noise(2, 10, 12)).convert("CMYK").save(root / "ink.jpg")
    Image.fromarray(np.dstack([noise(3, 10, 12), np.zeros((10, 12), np.uint8)])).save(root / "glass.png")
    Image.fromarray(np.full((10, 12), 257 * 100, np.uint16)).save(root / "deep.png")
    assert program("pack", root, "--out", tmp_path / "out", "--resolution", 10) == 0
    out = capsys.readouterr().out
    said = ("PNG named .jpg", "CMYK converted to RGB", "16 bits reduced to 8", "transparency laid over white")
    for note in said:
        assert f"1 x {note}" in out
    dataset = ShardDataset([tmp_path / "out"])
    found = {dataset.key(n): dataset.pixels(n) for n in range(5)}
    assert set(found) == {"a_b", "deep", "glass", "ink", "turned"}
    assert (found["glass"] == 255).all() and (found["deep"] == 100).all()
    assert found["turned"][:, :, 6:].min() > 200 and found["turned"][:, :, :4].max() < 50  # the top is now at the right
