"""The classes of ImageNet's validation images, from folders and from the tar, by either list of them."""

import io
import tarfile

import pytest
from PIL import Image
from test_pack import noise

from letit_dist.data.sources import Request, open_source
from letit_dist.errors import UserError

NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2)]


@pytest.fixture(params=["tar", "the tar itself", "folders"])
def imagenet(tmp_path, request):
    """(what is named, where the lists of classes belong)"""
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, name in enumerate(NAMES):
            Image.fromarray(noise(number)).save(tmp_path / "val" / name)
            content = (tmp_path / "val" / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if request.param == "folders":
        (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    return tmp_path / "ILSVRC2012_img_val.tar" if request.param == "the tar itself" else tmp_path, tmp_path


def opened(spec):
    [part] = open_source(str(spec), Request(split="val"))
    return [{**part.source.item(n).metadata, "file": None} for n in range(len(part.source))], part.notes


def test_the_devkit_and_kaggle_tell_the_class(imagenet):
    spec, folder = imagenet
    found, [note] = opened(spec)
    assert found == [{"file": None}] * 2 and note.startswith("2 images of val without a class (no synset folder, no IL")
    before = open_source(str(spec), Request(split="val"))[0].source.settings()
    devkit = folder / "ILSVRC2012_devkit_t12/data"
    devkit.mkdir(parents=True)
    truth = devkit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("490\n361\n")
    assert opened(spec) == ([{"file": None, "ilsvrc_id": 490}, {"file": None, "ilsvrc_id": 361}], ())
    assert open_source(str(spec), Request(split="val"))[0].source.settings() != before
    truth.write_text("490\n")
    with pytest.raises(UserError, match=r"00000002.JPEG: ILSVRC2012_validation_ground_truth.txt has 1 lines, none for"):
        opened(spec)
    rows = (
        "ImageId,PredictionString\nILSVRC2012_val_00000002,n03995372 85 1 499 272 \nILSVRC2012_val_00000001,n01440764 1"
    )
    (folder / "LOC_val_solution.csv").write_text(rows + " 2 3 4 \n")
    assert opened(spec) == ([{"file": None, "synset": "n01440764"}, {"file": None, "synset": "n03995372"}], ())
    (folder / "LOC_val_solution.csv").unlink()
    truth.write_text("a\nb\n")
    with pytest.raises(UserError, match="a number a line was expected"):
        opened(spec)
