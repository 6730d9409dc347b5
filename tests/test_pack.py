import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from letit_dist.data.index import Index
from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, open_source
from letit_dist.data.synthetic import fruit
from letit_dist.data.transforms import decode, resize_crop
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
PROGRAMS = Path(__file__).parent.parent / "shards"


def program(name, *arguments):
    """Run a program's main() in this process: its exit code."""
    spec = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
    try:
        return module.main()
    finally:
        sys.argv = before


def noise(number, height=24, width=32):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number in range(12):
        save(noise(number), folder / ("a.b" if number % 2 else "c") / f"img.v1.{number:03d}.png")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def spoilt(photos):
    """Two of every kind of trouble; six files are unreadable."""
    good = next(photos.rglob("*.png")).read_bytes()
    (photos / "cut.png").write_bytes(good[: len(good) // 2])
    save(noise(1), photos / "whole.jpg")
    (photos / "cut.jpg").write_bytes((photos / "whole.jpg").read_bytes()[:300])
    (photos / "page.jpg").write_text("<html>not found</html>")
    (photos / "empty.webp").touch()
    frames = [Image.fromarray(noise(n)) for n in range(3)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    (photos / "dangling.png").symlink_to(photos / "nowhere.png")
    Image.fromarray(noise(2)).convert("CMYK").save(photos / "ink.jpg")
    Image.fromarray(noise(3)[:, :, 0].astype(np.uint16) * 257).save(photos / "deep.png")
    Image.fromarray(np.dstack([noise(4), noise(5)[:, :, :1]])).save(photos / "glass.png")
    return photos


def packed(spec, out, *, request=None, **options):
    [part] = open_source(str(spec), request or Request())
    return pack(part, out, PackOptions(**options))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_is_packed_sorted_cropped_and_resized(photos, tmp_path):
    result = packed(photos, tmp_path / "out", resolution=12, request=Request(domain="noise", split="train"))
    assert (result.samples, result.unreadable, result.already_done) == (12, 0, False)
    dataset = ShardDataset([tmp_path / "out"])
    assert dataset.resolution == 12
    meta = dataset.indexes[0].meta
    assert (meta["domain"], meta["split"], meta["filter"], meta["source"]) == ("noise", "train", "box", "photos")
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    for number, name in enumerate(files):
        assert dataset.key(number) == name.removesuffix(".png").replace(".", "_")
        assert dataset.json(number) == {"file": name}
        expected = resize_crop(decode((photos / name).read_bytes()), 12)
        assert torch.equal(dataset.pixels(number), expected)
    [sample] = [s for s in webdataset.WebDataset(str(tmp_path / "out/shard-00000.tar"), shardshuffle=False)][:1]
    assert sample["__key__"] == dataset.key(0) and sample["png"] == dataset.read(0)["png"]


def test_same_bytes_whatever_the_workers(spoilt, tmp_path):
    options = {"resolution": 16, "shard_bytes": 20_000, "max_bad_fraction": 0.4}
    packed(spoilt, tmp_path / "a", **options)
    packed(spoilt, tmp_path / "b", workers=2, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.tar"))) > 1


def test_trouble_is_left_out_listed_or_converted(spoilt, tmp_path):
    result = packed(spoilt, tmp_path / "out", resolution=16, max_bad_fraction=0.4)
    listed = dict(line.split("\t") for line in (tmp_path / "out/unreadable.txt").read_text().splitlines())
    assert sorted(listed) == ["cut.jpg", "cut.png", "dangling.png", "empty.webp", "moving.gif", "page.jpg"]
    assert "frames" in listed["moving.gif"] and listed["empty.webp"] == "empty file"
    assert "No such file" in listed["dangling.png"] and "not an image" in listed["page.jpg"]
    assert (result.samples, result.unreadable) == (16, 6)
    assert result.notes == {
        "CMYK converted to RGB": 1,
        "16 bits reduced to 8": 1,
        "transparency laid over white": 1,
    }
    dataset = ShardDataset([tmp_path / "out"])
    assert len(dataset) == 16 and dataset.indexes[0].meta["unreadable"] == 6
    keys = [dataset.key(number) for number in range(16)]
    assert dataset.json(keys.index("ink")) == {"file": "ink.jpg", "notes": ["CMYK converted to RGB"]}
    assert "\n".join(result.lines()).count("6 left out, see") == 1


def test_past_the_share_packing_stops_and_can_go_on(spoilt, tmp_path, capsys):
    arguments = (spoilt, "--out", tmp_path / "out", "--resolution", 16, "--shard-size", 0.02)
    assert program("pack", *arguments, "--max-bad-fraction", 0.2) == 2
    error = capsys.readouterr().err
    assert "5 images are unreadable, more than --max-bad-fraction 0.2 of 22 allows; the first: cut.jpg" in error
    assert not (tmp_path / "out/index.json").exists()
    assert len((tmp_path / "out/unreadable.txt").read_text().splitlines()) == 5
    assert (tmp_path / "out/shard-00000.tar").exists()
    assert program("pack", *arguments, "--max-bad-fraction", 0.3) == 0
    assert "16 samples" in (out := capsys.readouterr().out) and "continued after" in out
    packed(spoilt, tmp_path / "whole", resolution=16, shard_bytes=20_000, max_bad_fraction=0.3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_pack_continues_to_the_same_bytes(tmp_path):
    for number in range(300):
        save(noise(number, 96, 96), tmp_path / f"in/{number:03d}.png")
    arguments = ["--resolution", "96", "--shard-size", "0.5"]
    command = [sys.executable, PROGRAMS / "pack.py", tmp_path / "in", "--out", tmp_path / "out", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path / "out/shard-00002.tar").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out/index.json").exists() and (tmp_path / "out/unfinished.jsonl").exists()
    stamp = (tmp_path / "out/shard-00000.tar").stat().st_mtime_ns
    result = packed(tmp_path / "in", tmp_path / "out", resolution=96, shard_bytes=500_000)
    assert result.resumed_at > 0 and (tmp_path / "out/shard-00000.tar").stat().st_mtime_ns == stamp
    packed(tmp_path / "in", tmp_path / "whole", resolution=96, shard_bytes=500_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_again_says_done_and_other_settings_are_refused(photos, tmp_path, capsys):
    arguments = (photos, "--out", tmp_path / "out", "--resolution", 16)
    assert program("pack", *arguments) == 0
    before = contents(tmp_path / "out")
    assert program("pack", *arguments, "--workers", 1) == 0
    assert "already packed with these settings (12 samples), nothing to do" in capsys.readouterr().out
    assert program("pack", *arguments, "--format", "jpeg") == 2
    error = capsys.readouterr().err
    assert "already packed with other settings" in error and "format: 'png' -> 'jpeg'" in error
    save(noise(99), photos / "new.png")
    assert program("pack", *arguments) == 2
    assert "files: 12 -> 13" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_without_a_resolution_sizes_must_agree(photos, tmp_path):
    packed(photos, tmp_path / "a")
    assert ShardDataset([tmp_path / "a"]).image_size() == (24, 32)
    save(noise(0, 30, 30), photos / "z.png")
    with pytest.raises(UserError, match=r"z\.png is 30x30, the images before it are 32x24: give --resolution"):
        packed(photos, tmp_path / "b")
    # Also when the first image lies in a shard that an earlier attempt finished.
    with pytest.raises(UserError, match=r"z\.png is 30x30"):
        packed(photos, tmp_path / "c", shard_bytes=20_000)
    with pytest.raises(UserError, match=r"z\.png is 30x30"):
        packed(photos, tmp_path / "c", shard_bytes=20_000)


@pytest.mark.parametrize(
    ("format", "extension", "quality"), [("jpeg", "jpg", 90), ("webp", "webp", None), ("webp", "webp", 80)]
)
def test_other_formats(photos, tmp_path, format, extension, quality):
    result = packed(photos, tmp_path / "out", resolution=24, format=format, quality=quality)
    dataset = ShardDataset([tmp_path / "out"])
    assert set(dataset.read(0)) == {extension, "json"} and result.samples == 12
    exact = resize_crop(decode((photos / dataset.json(0)["file"]).read_bytes()), 24)
    assert torch.equal(dataset.pixels(0), exact) == (format == "webp" and quality is None)


def test_enlarging_is_refused_unless_asked_and_then_said_so(photos, tmp_path, capsys):
    save(noise(50, 48, 48), photos / "0.png")
    arguments = (photos, "--out", tmp_path / "out", "--resolution", 48, "--shard-size", 0.02)
    for workers in (0, 1):
        assert program("pack", *arguments, "--workers", workers) == 2
        error = capsys.readouterr().err
        assert "a.b/img.v1.001.png is 32x24, smaller than --resolution 48" in error and "--enlarge" in error
    # What was begun without it goes on with it: the shards are the same as far as they go.
    assert program("pack", *arguments, "--enlarge") == 0
    assert "12 x smaller than 48, enlarged" in capsys.readouterr().out
    result = packed(photos, tmp_path / "whole", resolution=48, enlarge=True, shard_bytes=20_000)
    assert result.notes == {"smaller than 48, enlarged": 12}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_colliding_names_are_numbered_and_counted(tmp_path):
    for name in ("x.y.png", "x_y.png", "x.y.jpg"):
        save(noise(0), tmp_path / "in" / name)
    result = packed(tmp_path / "in", tmp_path / "out", resolution=8)
    dataset = ShardDataset([tmp_path / "out"])
    assert [(dataset.key(n), dataset.json(n)["file"]) for n in range(3)] == [
        ("x_y", "x.y.jpg"),
        ("x_y-2", "x.y.png"),
        ("x_y-3", "x_y.png"),
    ]
    assert [count for note, count in result.notes.items() if "key taken" in note] == [2]


def test_the_built_in_fruit(tmp_path, capsys):
    arguments = ("builtin:fruit", "--out", tmp_path / "f", "--resolution", 32, "--test", 3, "--seed", 5)
    assert program("pack", *arguments, "--count", 6, "--workers", 1) == 0
    folders = [tmp_path / "f" / style / split for style in ("apple", "orange") for split in ("train", "test")]
    assert [len(ShardDataset([folder])) for folder in folders] == [6, 3, 6, 3]
    dataset = ShardDataset([tmp_path / "f/orange/train"])
    pixels, factors = fruit("orange", 5, 2, 32)
    assert torch.equal(dataset.pixels(2), torch.from_numpy(pixels).permute(2, 0, 1))
    assert dataset.json(2) == {"index": 2, "seed": 5, "factors": json.loads(json.dumps(factors.as_json()))}
    capsys.readouterr()
    assert program("check", *folders, "--sheet", tmp_path / "sheet.png") == 0
    assert capsys.readouterr().out.count(": good: ") == 4
    assert Image.open(tmp_path / "sheet.png").size == (16 * 96, 4 * 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "no images below this folder (1 other files; looked for png, jpg"),
        (["photo"], "cannot pack photo: no such folder, did you mean photos?"),
        (["photos", "--count", 3, "--seed", 1], "--count, --seed has no effect on the folder photos"),
        (["photos", "--quality", 200, "--format", "jpeg"], "quality 200: 1 to 100"),
        (["photos", "--quality", 50, "--resolution", 0], "a quality has no effect on png"),
        (["builtin:fruit", "--count", 3], "needs --resolution and --count"),
        (["builtin:fruit", "--count", 3, "--resolution", 8], "draws at 32 to 1024, got --resolution 8"),
        (
            ["builtin:fruit", "--count", 3, "--resolution", 32, "--domain", "x"],
            "--domain has no effect on builtin:fruit",
        ),
    ],
)
def test_bad_requests_exit_with_two(photos, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    Path("empty/readme.md").touch()
    assert program("pack", *arguments, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_check_names_the_file_at_fault(photos, tmp_path, capsys):
    packed(photos, tmp_path / "out", resolution=16, shard_bytes=20_000)
    assert program("check", tmp_path / "out", "--workers", 1) == 0
    assert "good: 12 images in 4 shards" in capsys.readouterr().out
    index = Index.read(tmp_path / "out")
    offset, size = index.files(3)["png"]
    path = index.path_of(3)
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 4
    path.write_bytes(data)
    assert program("check", tmp_path / "out") == 2
    out, error = capsys.readouterr()
    assert "2 FAULTS" in out
    assert f"{path}: sha256" in error and f"{path}: {index.key(3)}: " in error
    path.write_bytes(data[:5000])
    assert program("check", tmp_path / "out", tmp_path / "nowhere") == 2
    error = capsys.readouterr().err
    assert f"{path}: 5000 bytes, index.json says" in error and "no such shard folder" in error


def test_check_indexes_other_peoples_tars(photos, tmp_path, capsys):
    packed(photos, tmp_path / "out", resolution=16)
    (tmp_path / "out/index.json").unlink()
    assert program("check", tmp_path / "out") == 2
    assert "--write-index makes one" in capsys.readouterr().err
    assert program("check", tmp_path / "out", "--write-index") == 0
    assert len(ShardDataset([tmp_path / "out"])) == 12


@pytest.mark.parametrize("name", ["pack", "check"])
def test_help_answers_at_once_with_an_example(name):
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, PROGRAMS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - begun < 1.5
    assert done.returncode == 0 and f"python shards/{name}.py" in done.stdout and "Exit codes" in done.stdout
