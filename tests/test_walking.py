"""Which files below a folder are looked at: linked folders are, hidden ones are not, and a loop of links ends."""

import pytest
from test_pack import noise, program, save

from letit_dist.data.folders import open_images_of
from letit_dist.data.inputs import open_images
from letit_dist.data.reader import ShardDataset
from letit_dist.data.source_base import walk
from letit_dist.data.sources import Request, open_source

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture
def linked(tmp_path):
    """Two folders of images elsewhere, linked into one that has its own, hidden ones, and links to what is above."""
    for number in range(2):
        save(noise(number), tmp_path / f"elsewhere/{number}/{number}.png")
    folder = tmp_path / "photos"
    save(noise(2), folder / "own/2.png")
    save(noise(2), folder / ".ipynb_checkpoints/2-checkpoint.png")
    save(noise(3), folder / "own/.thumbnails/3.png")
    for number in range(2):
        (folder / f"l{number}").symlink_to(tmp_path / f"elsewhere/{number}", target_is_directory=True)
    (folder / "own/up").symlink_to(folder, target_is_directory=True)
    (folder / "own/here").symlink_to(".", target_is_directory=True)
    (folder / "out").symlink_to(tmp_path, target_is_directory=True)
    # Above l0 by the real path alone.
    (tmp_path / "elsewhere/0/over").symlink_to("..", target_is_directory=True)
    return folder


FILES = ["l0/0.png", "l1/1.png", "own/2.png"]


def test_links_are_followed_once_and_hidden_folders_left_out(linked, monkeypatch):
    assert walk(linked) == (FILES, {})
    monkeypatch.chdir(linked.parent)
    assert walk("photos") == (FILES, {})
    monkeypatch.chdir(linked)
    assert walk(".") == (FILES, {})


def test_two_folders_that_link_to_each_other_end(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        save(noise(0), tmp_path / name / f"{name}.png")
        (tmp_path / name / "other").symlink_to(tmp_path / other, target_is_directory=True)
    assert walk(tmp_path)[0] == ["a/a.png", "a/other/b.png", "b/b.png", "b/other/a.png"]


def test_what_was_named_is_packed_encoded_and_translated(linked, tmp_path, capsys):
    assert program("pack", linked, "--out", tmp_path / "out", "--resolution", 16) == 0
    assert "3 samples" in capsys.readouterr().out
    dataset = ShardDataset([tmp_path / "out"])
    assert [dataset.json(number)["file"] for number in range(3)] == FILES
    assert len(open_images_of([str(linked)])) == 3
    assert open_images(linked, 16).names == ["l0-0", "l1-1", "own-2"]


def test_an_imagenet_of_linked_synsets(tmp_path):
    for number, synset in enumerate(("n01440764", "n01443537")):
        save(noise(number), tmp_path / "whole" / synset / f"{synset}_1.JPEG")
        (tmp_path / "some/train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "some/train" / synset).symlink_to(tmp_path / "whole" / synset, target_is_directory=True)
    [train] = open_source(str(tmp_path / "some"), Request())
    assert [train.source.name(number) for number in range(2)] == [
        f"train/{synset}/{synset}_1.JPEG" for synset in ("n01440764", "n01443537")
    ]
