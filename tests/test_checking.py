"""Checking shards: what the index says against the tars, and pictures that stand in two splits."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_pack import noise, packed, program, save

from letit_dist.data.checking import check, compare, table
from letit_dist.data.index import Index
from letit_dist.data.similarity import Pictures, bit_counts, difference_hash, near_pairs, pixel_digest, shared
from letit_dist.data.sources import Request
from letit_dist.data.transforms import decode, encode
from letit_dist.data.writer import ShardWriter
from letit_dist.files import hash_file

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def smooth(number, side=64):
    """A picture of large soft shapes, uint8 (side, side, 3), as photographs are; unlike noise it survives JPEG."""
    coarse = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def tensor(array):
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)


def test_the_difference_hash_knows_a_picture_again():
    hashes = [difference_hash(tensor(smooth(number))) for number in range(40)]
    apart = bit_counts(np.array(hashes, np.uint64)[:, None] ^ np.array(hashes, np.uint64)[None])
    assert apart[~np.eye(40, dtype=bool)].min() > 10
    for number, known in enumerate(hashes):
        picture = Image.fromarray(smooth(number))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=60)
        brighter = np.clip(smooth(number).astype(int) * 0.9 + 20, 0, 255).astype(np.uint8)
        for other in (decode(stream.getvalue()), tensor(np.asarray(picture.resize((48, 48)))), tensor(brighter)):
            assert bin(known ^ difference_hash(other)).count("1") <= 4
    # By hand: the left half dark, the right half bright: the fifth of nine columns is between, so two of eight rise.
    step = torch.zeros(3, 72, 72, dtype=torch.uint8)
    step[:, :, 36:] = 255
    assert difference_hash(step) == int.from_bytes(bytes([0b00011000] * 8), "little")
    assert difference_hash(step.flip(-1)) == difference_hash(torch.full((3, 50, 30), 200, dtype=torch.uint8)) == 0
    assert difference_hash(torch.zeros(3, 4, 4, dtype=torch.uint8)) == 0


def test_digests_are_of_pixels_not_of_files():
    picture = tensor(smooth(1))
    assert pixel_digest(picture) == pixel_digest(decode(encode(picture, "webp")))
    assert pixel_digest(picture) != pixel_digest(picture ^ 1)
    flat = torch.zeros(3, 4, 9, dtype=torch.uint8)
    assert pixel_digest(flat) != pixel_digest(flat.reshape(3, 9, 4))


def test_near_pairs_are_all_pairs_within_four_bits(monkeypatch):
    draw = np.random.default_rng(0)
    first = draw.integers(0, 1 << 64, 700, np.uint64, endpoint=False)
    second = draw.integers(0, 1 << 64, 300, np.uint64, endpoint=False)
    for row, (i, bits) in enumerate([(3, 0), (699, 4), (650, 5), (10, 3), (3, 1)]):
        flipped = sum(1 << int(b) for b in draw.permutation(64)[:bits])
        second[60 * row] = first[i] ^ np.uint64(flipped)
    expected = [(3, 0), (699, 60), (10, 180), (3, 240)]
    assert list(near_pairs(first, second)) == expected
    monkeypatch.setattr("letit_dist.data.similarity._ROWS", 7)
    monkeypatch.setattr("letit_dist.data.similarity._COLUMNS", 64)
    assert list(near_pairs(first, second)) == expected
    assert list(near_pairs(first, second, most=5)) == sorted([*expected, (650, 120)], key=lambda pair: pair[1])
    # What stands in for NumPy 2's own count.
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert list(near_pairs(first, second)) == expected
    assert bit_counts(np.array([0, 1, 2**64 - 1, 0x8001], np.uint64)).tolist() == [0, 1, 64, 2]


def test_shared_names_one_counterpart_each():
    def pictures(samples, digests, hashes):
        return Pictures(np.array(samples), np.array(digests, np.uint64), np.array(hashes, np.uint64))

    first = pictures([0, 2, 3], [7, 7, 8], [0, 0, 1 << 40])
    second = pictures([5, 6, 9], [8, 9, 10], [1 << 40, 3, (1 << 64) - 1])
    assert shared(first, second) == ([(3, 5)], [(0, 6)])
    assert first.duplicates == 1 and second.duplicates == 0


@pytest.fixture
def splits(tmp_path):
    """Shards of 12 training and 6 test images: one equal in both, one stored anew."""
    for number in range(12):
        save(smooth(number), tmp_path / f"in/train/t{number:02d}.png")
    for number in range(4):
        save(smooth(100 + number), tmp_path / f"in/test/u{number}.png")
    save(smooth(3), tmp_path / "in/test/equal.png")
    save(smooth(5), tmp_path / "in/test/stored-anew.jpg", quality=70)
    folders = [tmp_path / "out" / split for split in ("train", "test")]
    for folder in folders:
        request = Request(domain="x", split=folder.name)
        packed(tmp_path / "in" / folder.name, folder, request=request, resolution=64, shard_bytes=60_000)
    return folders


def test_leaks_are_found_and_named(splits, capsys):
    assert program("check", *splits) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("leak: ")] == [
        f"leak: {splits[0]} (train) and {splits[1]} (test): 1 of 6 images of the second are equal: t03 = equal"
    ]
    assert [line for line in out if line.startswith("look: ")] == [
        f"look: {splits[0]} (train) and {splits[1]} (test): 1 of 6 images of the second are similar: t05 ~ stored-anew"
    ]
    rows = [line.split() for line in out]
    assert ["x", "train", "12", f"{sum(s.bytes for s in Index.read(splits[0]).shards) / 1e6:.1f}"] in rows
    assert compare([check(splits[1]), check(splits[0])]) == compare([check(folder, 1) for folder in splits])
    # Within a split there is nothing to leak.
    assert program("check", splits[0], splits[0]) == 0


def test_similar_alone_is_no_fault_and_unknown_splits_are_said(splits, tmp_path, capsys):
    (tmp_path / "in/test/equal.png").unlink()
    request = Request(split="test")
    packed(tmp_path / "in/test", tmp_path / "other", request=request, resolution=64)
    packed(tmp_path / "in/test", tmp_path / "nameless", resolution=64)
    assert program("check", splits[0], tmp_path / "other", tmp_path / "nameless") == 0
    out = capsys.readouterr().out
    assert "look: " in out and "leak: " not in out
    assert f"not compared, because no split is stated: {tmp_path / 'nameless'}" in out


def test_duplicates_and_uneven_shards_are_said(tmp_path):
    with ShardWriter(tmp_path / "x", shard_samples=9) as writer:
        for number in range(20):
            writer.write(f"k{number:02d}", {"png": encode(tensor(noise(number % 15, 8, 8)))})
    result = check(tmp_path / "x")
    assert result.problems == []
    assert result.notes == ["5 images equal an earlier one in this folder", "shards of 9 to 9 samples, the last 2"]
    with ShardWriter(tmp_path / "y", shard_bytes=20_480) as writer:
        for number in range(24):
            side = 8 if number < 12 else 40
            writer.write(f"k{number:02d}", {"png": encode(tensor(noise(number, side, side)))})
    assert any("uneven" in note for note in check(tmp_path / "y").notes)


def rewritten(folder, change):
    """Change index.json, keeping what it says about the tars' bytes."""
    path = folder / "index.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["samples"]["sizes"].__setitem__(0, 3), "index.json says another place or size for t00"),
        (lambda tree: tree["samples"]["offsets"].__setitem__(3, 512), "says another place or size for t01"),
        (lambda tree: tree["samples"]["keys"].reverse(), "says t11 where the tar has t00"),
    ],
)
def test_an_index_of_other_places_is_named(splits, capsys, change, message):
    rewritten(splits[0], change)
    assert program("check", splits[0]) == 2
    error = capsys.readouterr().err
    assert message in error and "shard-00000.tar" in error and "--write-index" in error


def test_a_tar_that_was_replaced_is_named(splits, capsys):
    index = Index.read(splits[0])
    first, second = (splits[0] / shard.name for shard in index.shards[:2])
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    assert program("check", splits[0]) == 2
    assert f"{first}: sha256 {hash_file(second)[:12]}" in capsys.readouterr().err


def test_every_stored_size_is_checked(tmp_path, capsys):
    for number in range(3):
        save(smooth(number), tmp_path / f"in/{number}.png")
    packed(tmp_path / "in", tmp_path / "good", resolution=64, smaller=(16,))
    assert program("check", tmp_path / "good", "--sheet", tmp_path / "sheet.png") == 0
    assert "3 of 64x64 + 16x16" in capsys.readouterr().out and (tmp_path / "sheet.png").exists()
    with ShardWriter(tmp_path / "bad", meta={"resolution": 64, "resolutions": [64, 16]}) as writer:
        big, small = (encode(tensor(smooth(0, side))) for side in (64, 16))
        writer.write("a", {"64.png": big, "16.png": small})
        writer.write("b", {"64.png": big, "16.png": big})
        writer.write("c", {"64.png": big, "16.png": small[:100]})
    assert program("check", tmp_path / "bad") == 2
    error = capsys.readouterr().err
    assert ": b.16.png is 64x64, its name says 16" in error and "shard-00000.tar: c: " in error
    with ShardWriter(tmp_path / "one", meta={"resolution": 64, "resolutions": [64, 16]}) as writer:
        writer.write("a", {"64.png": big})
    assert "says resolution 64 16, found 64x64" in check(tmp_path / "one").problems[0]


def test_the_table_sums_over_folders(splits):
    results = [check(folder) for folder in (*splits, splits[1])]
    rows = [line.split() for line in table(results)]
    assert [row[:3] for row in rows] == [["domain", "split", "samples"], ["x", "train", "12"], ["x", "test", "12"]]
