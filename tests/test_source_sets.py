"""Sets whose folders say what they hold: AFHQ, StarGAN's CelebA-HQ, CycleGAN's pairs, ImageNet."""

import pytest
from source_trees import counts, images, notes, opened, taken

from letit_dist.data.sources import Request, find, open_source
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


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
