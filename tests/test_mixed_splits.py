"""No set's splits become one without a word: known sets from every folder people name, unknown ones refused."""

import pytest
from test_pack import noise, program, save

from letit_dist.data.folders import open_images_of
from letit_dist.data.sources import Request, find, open_source
from letit_dist.errors import UserError


def images(folder, *names):
    for number, name in enumerate(names):
        save(noise(number, 10, 12), folder / name)


def counts(spec, **request):
    return {part.subfolder: len(part.source) for part in open_source(str(spec), Request(**request))}


def test_imagenet_as_kaggle_delivers_it(tmp_path):
    inside = tmp_path / "ILSVRC/Data/CLS-LOC"
    images(
        inside, "train/n01440764/a.JPEG", "train/n01440764/b.JPEG", "val/ILSVRC2012_val_00000001.JPEG", "test/c.JPEG"
    )
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4 \n"
    )
    for spec in (tmp_path, tmp_path / "ILSVRC", inside):
        assert find(str(spec)).layout.name == "imagenet"
        assert counts(spec) == {"train": 2, "val": 1}


@pytest.mark.parametrize("names", [("training", "testing"), ("Train", "TEST"), ("train", "valid", "test")])
def test_other_names_of_splits(tmp_path, names):
    for name in names:
        images(tmp_path / "plain", f"{name}/0.png")
        images(tmp_path / "domains", f"{name}/cat/0.png", f"{name}/dog/0.png")
    splits = ["train", "val", "test"] if len(names) == 3 else ["train", "test"]
    assert counts(tmp_path / "plain") == {split: 1 for split in splits}
    assert list(counts(tmp_path / "domains")) == [f"{domain}/{split}" for domain in ("cat", "dog") for split in splits]
    [part] = open_source(str(tmp_path / "plain"), Request(split="test"))
    assert part.source.name(0) == f"{names[-1]}/0.png"


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (("train/a/0.png", "test/b/0.png"), "test, train"),
        (("train/0.png", "training/0.png", "test/0.png"), "test, train"),
        (("x/y/Validation/0.png", "x/y/z/0.png"), "x/y/Validation, other folders"),
        (("a/train/0.png", "b/train/0.png", "0.png"), "a/train, other folders"),
    ],
)
def test_splits_in_no_known_layout_are_refused(tmp_path, capsys, names, listed):
    root = tmp_path / "set"
    images(root, *names)
    out = tmp_path / "out"
    assert program("pack", root, "--out", out) == 2
    error = capsys.readouterr().err
    assert f"the splits in it would be mixed: images in {listed};" in error and "--layout folder" in error
    assert len(error.strip().splitlines()) == 1 and not out.exists()
    with pytest.raises(UserError, match="would be mixed"):
        open_images_of([str(root)])
    assert counts(root, layout="folder") == {"": len(names)}


def test_nothing_is_mixed_where_all_is_one_split(tmp_path):
    images(tmp_path / "set", "a/train/0.png", "b/training/1.png")
    images(tmp_path / "far", "1/2/3/4/train/0.png", "1/2/3/4/test/0.png", "contest/0.png")
    assert counts(tmp_path / "set") == {"": 2}
    assert counts(tmp_path / "far") == {"": 3}
    images(tmp_path / "two", "training/0.png", "training/1.png", "other/0.png")
    assert "as domains" not in find(str(tmp_path / "two")).saw


@pytest.mark.parametrize("form", ["kaggle", "official"])
def test_celeba_by_any_of_its_folders(tmp_path, form, monkeypatch):
    root = tmp_path / "celeba"
    values = "".join(f"{n:06d}.jpg{{0}}{1 if n < 2 else -1}\n" for n in range(4))
    splits = "".join(f"{n:06d}.jpg{{0}}{n % 3}\n" for n in range(4))
    if form == "kaggle":
        folder = root / "img_align_celeba/img_align_celeba"
        named = [root, root / "img_align_celeba", folder]
        (root / "img_align_celeba").mkdir(parents=True)
        (root / "list_attr_celeba.csv").write_text("image_id,Male\n" + values.format(","))
        (root / "list_eval_partition.csv").write_text("image_id,partition\n" + splits.format(","))
    else:
        folder = root / "Img/img_align_celeba"
        named = [root, root / "Img", folder]
        for place, name, text in (("Anno", "attr_celeba", "4\nMale\n" + values), ("Eval", "eval_partition", splits)):
            (root / place).mkdir(parents=True)
            (root / place / f"list_{name}.txt").write_text(text.format(" "))
    images(folder, *(f"{n:06d}.jpg" for n in range(4)))
    expected = {"female/test": 1, "female/train": 1, "male/train": 1, "male/val": 1}
    for spec in named:
        assert find(str(spec)).layout.name == "celeba"
        assert dict(sorted(counts(spec, attribute="Male").items())) == expected
    monkeypatch.chdir(folder)
    assert dict(sorted(counts(".", attribute="Male").items())) == expected
    # A folder beside them is not CelebA.
    images(root / "mine", "0.jpg")
    assert find(str(root / "mine")).layout.name == "folder"
