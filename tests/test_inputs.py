"""Images from a file, a folder and shards: names, order, limits, and what cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from letit_dist.data.inputs import open_images
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import decode, resize_crop
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError


def photograph(path, number=0, size=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


def names(images):
    return [name for name, _ in images]


def test_one_file(tmp_path):
    path = photograph(tmp_path / "a photo.v1.png")
    images = open_images(path, 10)
    assert len(images) == 1
    [(name, pixels)] = images
    assert name == "a photo.v1"
    assert torch.equal(pixels, resize_crop(decode(path.read_bytes()), 10))
    assert pixels.shape == (3, 10, 10) and pixels.dtype == torch.uint8


def test_a_folder_in_order_with_its_subfolders(tmp_path):
    paths = [photograph(tmp_path / name, i) for i, name in enumerate(("b.png", "a/z.JPG", "a/deep/y.png", "c.bmp"))]
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.png").mkdir()
    photograph(tmp_path / "._b.png")  # as some systems leave beside each file
    images = open_images(tmp_path, 8)
    assert len(images) == 4
    found = dict(images)
    assert list(found) == ["a-deep-y", "a-z", "b", "c"]
    assert torch.equal(found["b"], resize_crop(decode(paths[0].read_bytes()), 8))
    assert names(open_images(tmp_path, 8, limit=2)) == ["a-deep-y", "a-z"]
    assert names(open_images(tmp_path, 8, limit=99)) == list(found)


def test_no_two_names_are_equal(tmp_path):
    files = ["a.png", "a.bmp", "a-png.png", "d/e.png", "d-e.png", "f.png"]
    pixels = {name: decode(photograph(tmp_path / name, i).read_bytes()) for i, name in enumerate(files)}
    found = dict(open_images(tmp_path, 20))
    assert len(found) == len(files)
    assert {"a-bmp", "f"} <= set(found)
    expected = {resize_crop(p, 20).numpy().tobytes() for p in pixels.values()}
    assert {p.numpy().tobytes() for p in found.values()} == expected
    assert not any("/" in name for name in found)


def test_shards(fruit_shards):
    folder = fruit_shards / "orange/test"
    dataset = ShardDataset([folder])
    images = list(open_images(folder, 32, limit=5))
    assert [name for name, _ in images] == [dataset.key(i) for i in range(5)]
    assert all(torch.equal(pixels, dataset.pixels(i)) for i, (_, pixels) in enumerate(images))
    assert len(open_images(folder, 16)) == 8
    assert next(iter(open_images(folder, 16)))[1].shape == (3, 16, 16)


def test_keys_of_shards_may_have_slashes(tmp_path):
    data = photograph(tmp_path / "a.png").read_bytes()
    with ShardWriter(tmp_path / "shards") as writer:
        for key in ("x/y", "x-y", "z"):
            writer.write(key, {"png": data})
    assert names(open_images(tmp_path / "shards", 8)) == ["x-y", "x-y-2", "z"]


def test_what_cannot_be_read_is_left_out(tmp_path):
    for number in range(18):
        photograph(tmp_path / f"in/{number:02d}.png", number)
    (tmp_path / "in/sub").mkdir()
    (tmp_path / "in/sub/bad.png").write_text("no image")
    (tmp_path / "in/03.png").write_bytes(b"")
    (tmp_path / "in/dangling.png").symlink_to(tmp_path / "nowhere")
    images = open_images(tmp_path / "in", 8, max_bad_fraction=0.15)
    assert len(images) == 20
    assert names(images) == [f"{number:02d}" for number in range(18) if number != 3]
    listed = dict(images.bad)
    assert list(listed) == [str(tmp_path / "in" / name) for name in ("03.png", "dangling.png", "sub/bad.png")]
    assert "No such file" in listed[str(tmp_path / "in/dangling.png")]
    images = open_images(tmp_path / "in", 8, max_bad_fraction=0.1)
    with pytest.raises(UserError, match=r"^3 of 20 images cannot be read, more than --max-bad-fraction 0\.1 allows"):
        list(images)
    with pytest.raises(UserError, match=r"^1 of 20 images.*03\.png \(empty file\)$"):
        list(open_images(tmp_path / "in", 8, max_bad_fraction=0))


def test_one_bad_image_in_a_small_folder_proves_nothing(tmp_path):
    photograph(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    assert names(open_images(tmp_path, 8)) == ["a"]
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match="2 of 2 images cannot be read"):
        list(open_images(tmp_path, 8))
    with pytest.raises(UserError, match=r"cannot be read: .*b\.png \(empty file\)"):
        list(open_images(tmp_path / "b.png", 8, max_bad_fraction=1))


def test_a_bad_sample_in_shards_is_named_with_its_shard(tmp_path):
    good = photograph(tmp_path / "a.png").read_bytes()
    with ShardWriter(tmp_path / "shards") as writer:
        for key, data in (("a", good), ("b", good[:200]), ("c", good)):
            writer.write(key, {"png": data})
    images = open_images(tmp_path / "shards", 8)
    assert names(images) == ["a", "c"]
    assert [place for place, _ in images.bad] == [f"{tmp_path / 'shards/shard-00000.tar'}: b"]


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no such image or folder: .*nowhere$"):
        open_images(tmp_path / "nowhere", 8)
    photograph(tmp_path / ".a.png")
    with pytest.raises(UserError, match=r"holds no images \(bmp, gif, .*\) and is no shard folder"):
        open_images(tmp_path, 8)
