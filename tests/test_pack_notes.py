"""What packing changed and what it did not look at are said."""

import pytest
from PIL import Image
from test_pack import noise, program, save

from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, open_source
from letit_dist.data.transforms import decode

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
TURNED = "turned upright, as EXIF says"


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_a_picture_turned_by_exif_is_said(tmp_path, ending):
    for name, orientation in (("turned", 6), ("upright", 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif[0x010F] = "maker"
        save(noise(0, 10, 12), tmp_path / f"in/{name}.{ending}", exif=exif)
    save(noise(0, 10, 12), tmp_path / f"in/without.{ending}")
    [part] = open_source(str(tmp_path / "in"), Request())
    assert pack(part, tmp_path / "out", PackOptions(resolution=8)).notes == {TURNED: 1}
    dataset = ShardDataset([tmp_path / "out"])
    assert {dataset.key(n): dataset.json(n).get("notes") for n in range(3)} == {
        "turned": [TURNED],
        "upright": None,
        "without": None,
    }
    assert decode((tmp_path / f"in/turned.{ending}").read_bytes()).shape == (3, 12, 10)


def test_other_files_are_counted_by_ending(tmp_path, capsys):
    def fill(folder):
        save(noise(len(str(folder))), folder / "0.png")
        for name in ("a.heic", "b.HEIC", "noext", "Thumbs.db", ".DS_Store"):
            (folder / name).touch()

    fill(tmp_path / "plain")
    assert program("pack", tmp_path / "plain", "--out", tmp_path / "out", "--resolution", 8) == 0
    assert "note: 4 other files not looked at: 2 .heic, " in (out := capsys.readouterr().out)
    assert "1 without ending" in out and "1 .db" in out
    for name in ("trainA", "trainB"):
        fill(tmp_path / "cat2dog" / name)
    for name in ("train/a", "test/a"):
        fill(tmp_path / "splits" / name)
    for spec, layout in (("cat2dog", None), ("cat2dog", "domains"), ("splits", None)):
        parts = open_source(str(tmp_path / spec), Request(layout=layout))
        [note] = [note for part in parts for note in part.notes]
        assert note.startswith("8 other files not looked at: 4 .heic")
