"""FFHQ, CelebA and CelebA-HQ in every form they are handed out in, on small trees of them."""

import hashlib
import json
from pathlib import Path

import pytest
from source_trees import CELEBA_ATTRIBUTES, celeba_tree, counts, images, notes, opened, taken

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, find, open_source
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


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


@pytest.fixture
def celeba(tmp_path):
    return celeba_tree(tmp_path / "celeba")


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
    table.write_text(CELEBA_ATTRIBUTES.replace("000004.jpg -1  -1 1", "000004.jpg -1"))
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
