"""Every layout that shards/pack.py recognises, on a small tree of it."""

import csv
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pack import noise, program, save

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import LAYOUTS, Request, find, open_source
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def images(folder, names, first=0):
    """Different pictures of 12 by 10 pixels."""
    for number, name in enumerate(names, first):
        save(noise(number, 10, 12), folder / name)


def encoded(number, format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(noise(number, 10, 12)).save(stream, format)
    return stream.getvalue()


def opened(folder, **request):
    """{subfolder: (domain, split, [names])}"""
    return {
        part.subfolder: (part.domain, part.split, [part.source.name(n) for n in range(len(part.source))])
        for part in open_source(str(folder), Request(**request))
    }


def counts(folder, **request):
    return {name: len(names) for name, (_, _, names) in opened(folder, **request).items()}


def notes(folder, **request):
    return [note for part in open_source(str(folder), Request(**request)) for note in part.notes]


def taken(spec):
    return find(str(spec)).layout.name


def add_to_tar(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# -- faces


@pytest.fixture
def ffhq(tmp_path):
    """Four official files around the border of the split, and the official list, with one image more."""
    root = tmp_path / "ffhq-dataset"
    listed = {}
    for number in (0, 59_999, 60_000, 69_999):
        path = f"images1024x1024/{number // 1000 * 1000:05d}/{number:05d}.png"
        images(root, [path], number)
        listed[str(number)] = {
            "category": "training" if number < 60_000 else "validation",
            "image": {"file_path": path, "file_md5": hashlib.md5((root / path).read_bytes()).hexdigest()},
        }
    listed["5"] = {"category": "training", "image": {"file_path": "images1024x1024/00000/00005.png", "file_md5": "0"}}
    (root / "ffhq-dataset-v2.json").write_text(json.dumps(listed))
    return root


def test_ffhq_has_the_official_split_and_its_md5_is_checked(ffhq, tmp_path):
    assert taken(ffhq) == taken(ffhq / "images1024x1024") == "ffhq"
    for folder, prefix in ((ffhq, "images1024x1024/"), (ffhq / "images1024x1024", "")):
        assert opened(folder) == {
            "train": (None, "train", [f"{prefix}00000/00000.png", f"{prefix}59000/59999.png"]),
            "test": (None, "test", [f"{prefix}60000/60000.png", f"{prefix}69000/69999.png"]),
        }
        assert notes(folder) == ["1 of 5 images in ffhq-dataset-v2.json are not there: 00005, ..."]
    images(ffhq, ["images1024x1024/59000/59999.png"], first=3)  # readable, but another picture
    [train] = open_source(str(ffhq), Request(split="train"))
    result = pack(train, tmp_path / "out", PackOptions(resolution=8, max_bad_fraction=0.5))
    assert (result.samples, result.unreadable) == (1, 1)
    assert "the official list says" in (tmp_path / "out/train/unreadable.txt").read_text()
    assert "md5" in ShardDataset([tmp_path / "out/train"]).json(0)


def test_ffhq_without_the_list_and_as_a_flat_dump(ffhq, tmp_path):
    (ffhq / "ffhq-dataset-v2.json").unlink()
    assert counts(ffhq) == {"train": 2, "test": 2}
    assert notes(ffhq) == ["MD5 not checked: ffhq-dataset-v2.json is not there"]
    flat = tmp_path / "FFHQ_256"
    images(flat, ["00000.png", "59999.png", "60000.png", "cover.png"])
    assert taken(flat) == "ffhq" and counts(flat) == {"train": 2, "test": 1}
    assert notes(flat)[0] == "1 images without an FFHQ number are left out, the first: cover.png"
    # There is no domain to choose, so the name is for all.
    assert {part.domain for part in open_source(str(flat), Request(domain="face"))} == {"face"}
    assert set(opened(flat, domain="face")) == {"train", "test"}
    other = tmp_path / "faces"
    images(other, ["00000.png", "60000.png"])
    assert taken(other) == "folder"
    assert counts(other, layout="ffhq") == {"train": 1, "test": 1}


def test_a_damaged_ffhq_list_is_named(ffhq):
    (ffhq / "ffhq-dataset-v2.json").write_text('{"0": {"category": "training"}}')
    with pytest.raises(UserError, match=r"ffhq-dataset-v2\.json: not FFHQ's list: KeyError: 'image'"):
        open_source(str(ffhq), Request())


ATTRIBUTES = "6\nSmiling Male Young\n" + "".join(
    f"{n:06d}.jpg {1 if n == 6 else -1}  {1 if n % 3 == 0 else -1} 1\n" for n in range(1, 7)
)


@pytest.fixture
def celeba(tmp_path):
    root = tmp_path / "celeba"
    images(root / "img_align_celeba", [f"{n:06d}.jpg" for n in range(1, 7)])
    (root / "Anno").mkdir()
    (root / "Anno/list_attr_celeba.txt").write_text(ATTRIBUTES)
    (root / "Eval").mkdir()
    (root / "Eval/list_eval_partition.txt").write_text("".join(f"{n:06d}.jpg {(n - 1) // 2}\n" for n in range(1, 7)))
    return root


def test_celeba_is_divided_by_an_attribute_and_the_official_partition(celeba):
    assert taken(celeba) == taken(celeba / "img_align_celeba") == "celeba"
    found = opened(celeba, attribute="Male")
    assert {name: [Path(p).stem for p in paths] for name, (_, _, paths) in found.items()} == {
        "female/train": ["000001", "000002"],
        "female/val": ["000004"],
        "female/test": ["000005"],
        "male/val": ["000003"],
        "male/test": ["000006"],
    }
    assert found["male/test"][:2] == ("male", "test")
    assert set(opened(celeba, attribute="Smiling", split="test")) == {"smiling/test", "not_smiling/test"}
    assert counts(celeba) == {"train": 2, "val": 2, "test": 2}
    assert "--attribute Male" in notes(celeba)[0]
    assert counts(celeba, attribute="Male", domain="female", split="train") == {"female/train": 2}


def test_celeba_from_kaggle_is_csv_and_nested(tmp_path):
    root = tmp_path / "archive"
    images(root / "img_align_celeba/img_align_celeba", ["000001.jpg", "000002.jpg", "000009.jpg"])
    (root / "list_attr_celeba.csv").write_text("image_id,Bald,Male\n000001.jpg,-1,1\n000002.jpg,1,-1\n")
    assert taken(root) == "celeba"
    assert counts(root, attribute="Male") == {"male": 1, "female": 1}
    assert notes(root, attribute="Male") == [
        "1 images without a row in the tables are left out, the first: 000009.jpg",
        "no split: list_eval_partition.txt is not there",
    ]


def test_bad_attributes_are_named(celeba):
    with pytest.raises(UserError, match=r"--attribute male: .*list_attr_celeba\.txt has .*did you mean Male\?"):
        open_source(str(celeba), Request(attribute="male"))
    with pytest.raises(UserError, match="one domain where two are needed: --attribute Young gives only young"):
        open_source(str(celeba), Request(attribute="Young"))
    table = celeba / "Anno/list_attr_celeba.txt"
    table.write_text(ATTRIBUTES.replace("000004.jpg -1  -1 1", "000004.jpg -1"))
    with pytest.raises(UserError, match=r"list_attr_celeba\.txt, line 6: a name and 3 values"):
        open_source(str(celeba), Request(attribute="Male"))


def test_celebamask_hq_with_the_official_mapping(tmp_path, celeba):
    root = tmp_path / "CelebAMask-HQ"
    images(root / "CelebA-HQ-img", [f"{n}.jpg" for n in range(3)])
    images(root / "CelebAMask-HQ-mask-anno", ["0/00000_hair.png"])
    (root / "CelebAMask-HQ-attribute-anno.txt").write_text(
        "3\nMale Young\n" + "".join(f"{n}.jpg  {1 if n == 1 else -1} -1\n" for n in range(3))
    )
    assert taken(root) == "celebamask-hq"
    assert counts(root, attribute="Male") == {"female": 2, "male": 1}
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx orig_idx orig_file\n0 4 000005.jpg\n1 0 000001.jpg\n2 3 000004.jpg\n"
    )
    (root / "list_eval_partition.txt").write_text((celeba / "Eval/list_eval_partition.txt").read_text())
    assert counts(root, attribute="Male") == {"female/val": 1, "female/test": 1, "male/train": 1}


def test_celeba_hq_in_one_folder(tmp_path):
    root = tmp_path / "celeba_hq_1024"
    images(root, ["00000.jpg", "00001.jpg"])
    assert taken(root) == "celeba-hq-flat" and "CelebAMask-HQ" in find(str(root)).saw
    assert counts(root) == {"": 2}


# -- sets whose folders say it


def test_afhq_calls_the_held_out_images_test(tmp_path):
    for version, held_out in (("v1", "val"), ("v2", "test")):
        root = tmp_path / version
        for domain in ("cat", "dog", "wild"):
            images(root, [f"train/{domain}/a.png", f"train/{domain}/b.png", f"{held_out}/{domain}/c.png"])
        assert taken(root) == "splits" and "AFHQ" in find(str(root)).saw
        expected = {f"{d}/{s}": n for d in ("cat", "dog", "wild") for s, n in (("train", 2), ("test", 1))}
        assert counts(root) == expected
        assert opened(root)["dog/test"] == ("dog", "test", [f"{held_out}/dog/c.png"])
        assert set(opened(root, domain="dog")) == {"dog/train", "dog/test"}
    with pytest.raises(UserError, match=r"--domain dogs: .* has cat, dog, wild, did you mean dog"):
        open_source(str(root), Request(domain="dogs"))


def test_celeba_hq_of_stargan(tmp_path):
    images(tmp_path, [f"{split}/{side}/0.jpg" for split in ("train", "val") for side in ("female", "male")])
    assert "StarGAN v2" in find(str(tmp_path)).saw
    assert set(opened(tmp_path)) == {"female/train", "female/test", "male/train", "male/test"}


def test_splits_are_never_mixed(tmp_path):
    images(tmp_path / "plain", ["train/a.png", "train/b.png", "test/c.png"])
    assert taken(tmp_path / "plain") == "splits" and "folders of splits" in find(str(tmp_path / "plain")).saw
    assert opened(tmp_path / "plain") == {
        "train": (None, "train", ["train/a.png", "train/b.png"]),
        "test": (None, "test", ["test/c.png"]),
    }
    names = [f"class{n:02d}" for n in range(21)]
    images(tmp_path / "many", [f"{split}/{name}/0.png" for split in ("train", "val", "test") for name in names])
    assert "with 21 classes" in find(str(tmp_path / "many")).saw
    parts = open_source(str(tmp_path / "many"), Request())
    assert [(part.subfolder, part.domain, len(part.source)) for part in parts] == [
        ("train", None, 21),
        ("val", None, 21),
        ("test", None, 21),
    ]
    assert parts[1].source.item(4).metadata == {"file": "val/class04/0.png", "class": "class04"}
    # Domains that differ between splits are no such layout.
    images(tmp_path / "odd", ["train/a/0.png", "test/b/0.png"])
    assert taken(tmp_path / "odd") == "folder"


@pytest.mark.parametrize(
    ("name", "domains"),
    [
        ("apple2orange", ("apple", "orange")),
        ("vangogh2photo", ("vangogh", "photo")),
        ("ukiyoe2photo", ("ukiyo", "photo")),
        ("ukiyo2photo", ("ukiyo", "photo")),
        ("horse2zebra", ("horse", "zebra")),
        ("summer2winter_yosemite", ("summer", "winter_yosemite")),
        ("facades", ("A", "B")),
    ],
)
def test_cyclegan_names_its_domains_by_the_folder(tmp_path, name, domains):
    root = tmp_path / name
    images(root, ["trainA/a.jpg", "trainA/b.jpg", "trainB/c.jpg", "testA/d.jpg", "testB/e.jpg"])
    assert taken(root) == "cyclegan"
    a, b = domains
    assert counts(root) == {f"{a}/train": 2, f"{a}/test": 1, f"{b}/train": 1, f"{b}/test": 1}
    assert opened(root)[f"{b}/test"][2] == ["testB/e.jpg"]


def test_cyclegan_with_one_side_is_refused(tmp_path):
    root = tmp_path / "apple2orange"
    images(root, ["trainA/a.jpg", "testA/d.jpg"])
    with pytest.raises(
        UserError, match=r"one domain where two are needed: images of A \(apple\) and none of B \(orang"
    ):
        open_source(str(root), Request())
    with pytest.raises(UserError, match="no images in trainA, trainB, testA or testB here"):
        open_source(str(root / "trainA"), Request(layout="cyclegan"))
    assert counts(root, layout="folder") == {"": 2}


def test_imagenet_folders_with_a_flat_val(tmp_path):
    images(tmp_path / "train", ["n01440764/n01440764_10026.JPEG", "n01443537/n01443537_2.JPEG"])
    images(tmp_path / "val", ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"])
    assert taken(tmp_path) == "imagenet"
    assert counts(tmp_path) == {"train": 2, "val": 2}
    assert "2 images of val without a class" in notes(tmp_path)[0]
    devkit = tmp_path / "ILSVRC2012_devkit_t12/data"
    devkit.mkdir(parents=True)
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n361\n")
    assert notes(tmp_path) == []
    train, val = open_source(str(tmp_path), Request())
    assert train.source.item(1).metadata == {"file": "train/n01443537/n01443537_2.JPEG", "synset": "n01443537"}
    assert val.source.item(1).metadata["ilsvrc_id"] == 361
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n")
    with pytest.raises(UserError, match="has 1 lines, none for this image"):
        open_source(str(tmp_path), Request())


def test_imagenet_as_kaggle_unpacks_it(tmp_path):
    root = tmp_path / "ILSVRC"
    images(root / "Data/CLS-LOC", ["train/n01440764/a.JPEG", "val/n01440764/b.JPEG"])
    assert taken(root) == "imagenet" and counts(root) == {"train": 1, "val": 1}
    assert counts(root, split="val") == {"val": 1}


# -- archives


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


# -- lists and tables


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


# -- folders, and what is said


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
