"""Images inside archives: ImageNet's tar of tars, StyleGAN's zip, img2dataset's shards."""

import io
import json
import tarfile
import zipfile

import pytest
from source_trees import encoded, opened, taken

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, find, open_source
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def add_to_tar(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_imagenet_as_downloaded_is_a_tar_of_tars(tmp_path):
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, synset in enumerate(("n02000000", "n01000000")):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for image in range(2):
                    add_to_tar(tar, f"{synset}_{image}.JPEG", encoded(2 * number + image))
            add_to_tar(outer, f"{synset}.tar", inner.getvalue())
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        add_to_tar(tar, "ILSVRC2012_val_00000001.JPEG", encoded(9))
    assert taken(tmp_path) == taken(tmp_path / "ILSVRC2012_img_val.tar") == "imagenet-tars"
    train, val = open_source(str(tmp_path), Request())
    assert [train.source.item(n).key for n in range(4)] == [
        f"{synset}/{synset}_{n}" for synset in ("n01000000", "n02000000") for n in range(2)
    ]
    item = train.source.item(3)
    assert item.content == encoded(1) and item.metadata["synset"] == "n02000000"
    assert (val.split, val.source.item(0).content) == ("val", encoded(9))
    assert train.source.bytes() == sum(len(encoded(n)) for n in range(4))
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "a") as outer:
        add_to_tar(outer, "n03000000.tar", inner.getvalue()[:700])  # a download that broke off, packed all the same
        add_to_tar(outer, "readme.txt", b"x" * 5000)
    with pytest.raises(
        UserError, match=r"ILSVRC2012_img_train\.tar: .*n02000000_0\.JPEG is cut off|n01000000_0\.JPEG is"
    ):
        open_source(str(tmp_path), Request())
    data = (tmp_path / "ILSVRC2012_img_train.tar").read_bytes()
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar: not a readable, uncompressed tar"):
        open_source(str(tmp_path), Request())


@pytest.fixture
def stylegan(tmp_path):
    path = tmp_path / "afhq-32x32.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            archive.writestr(f"00000/img0000000{number}.png", encoded(number))
        labels = [[f"00000/img0000000{number}.png", number % 2] for number in range(4)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_a_stylegan_zip_keeps_its_labels(stylegan, tmp_path):
    assert taken(stylegan) == "zip" and "StyleGAN" in find(str(stylegan)).saw
    [part] = open_source(str(stylegan), Request(domain="animal", split="train"))
    assert (part.subfolder, part.domain, part.split) == ("", "animal", "train")
    pack(part, tmp_path / "out", PackOptions(resolution=8, workers=2))
    dataset = ShardDataset([tmp_path / "out"])
    assert [dataset.json(n)["label"] for n in range(4)] == [0, 1, 0, 1]
    assert dataset.key(3) == "00000/img00000003"
    assert opened(stylegan, column="label")["1"][2] == ["00000/img00000001.png", "00000/img00000003.png"]
    with pytest.raises(
        UserError, match=r"--column class has no effect on .*: its dataset.json has labels: --column la"
    ):
        open_source(str(stylegan), Request(column="class"))
    stylegan.write_bytes(stylegan.read_bytes()[:300])
    with pytest.raises(UserError, match="not a readable zip"):
        find(str(stylegan))


def test_each_process_has_its_own_handle_of_a_zip(stylegan, monkeypatch):
    """Forked workers that shared one would read from each other's position."""
    [part] = open_source(str(stylegan), Request())
    assert part.source.item(0).content == encoded(0)
    ours = part.source._zip[1]
    assert part.source.item(1).content == encoded(1) and part.source._zip[1] is ours
    monkeypatch.setattr("letit_dist.data.source_archives.os.getpid", lambda: -1)
    assert part.source.item(2).content == encoded(2) and part.source._zip[1] is not ours


def test_a_damaged_member_of_a_zip_is_left_out(stylegan, tmp_path):
    data = bytearray(stylegan.read_bytes())
    at = data.index(encoded(1))
    data[at + 200] ^= 1
    stylegan.write_bytes(data)
    [part] = open_source(str(stylegan), Request())
    result = pack(part, tmp_path / "out", PackOptions(resolution=8, max_bad_fraction=0.3))
    assert (result.samples, result.unreadable) == (3, 1)
    assert "BadZipFile" in (tmp_path / "out/unreadable.txt").read_text()


def test_img2dataset_tars_keep_their_captions(tmp_path):
    root = tmp_path / "laion"
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for number in range(2):
                key = f"{shard:05d}{number:04d}"
                add_to_tar(tar, f"{key}.jpg", encoded(2 * shard + number, "JPEG"))
                add_to_tar(tar, f"{key}.txt", f"caption {key}".encode())
                add_to_tar(tar, f"{key}.json", b'{"url": "x"}')
        (root / f"{shard:05d}.parquet").write_bytes(b"x")
        (root / f"{shard:05d}_stats.json").write_text("{}")
    assert taken(root) == "tars"
    [part] = open_source(str(root), Request())
    item = part.source.item(2)
    assert item.content == encoded(2, "JPEG") and item.key == "000010000"
    assert item.metadata == {"file": "00001.tar/000010000.jpg", "caption": "caption 000010000"}
    # What we packed ourselves can be packed anew, from its largest size.
    pack(part, tmp_path / "a", PackOptions(resolution=10, smaller=(5,)))
    assert taken(tmp_path / "a") == "tars"
    [again] = open_source(str(tmp_path / "a"), Request())
    pack(again, tmp_path / "b", PackOptions(resolution=10))
    one, other = ShardDataset([tmp_path / "a"]), ShardDataset([tmp_path / "b"])
    assert [(one.pixels(n) == other.pixels(n)).all().item() for n in range(4)] == [True] * 4
    assert [one.key(n) for n in range(4)] == [other.key(n) for n in range(4)]
