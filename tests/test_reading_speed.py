"""eval/throughput.py data: its pictures, its checks before the clock, its table; what makes reading cheap, counted."""

import gc
import re
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from programs import ROOT, run

from letit_dist.data import packing as packing_module
from letit_dist.data import transforms
from letit_dist.data.index import INDEX_NAME, Index
from letit_dist.data.reader import ImageStream, ShardDataset
from letit_dist.data.transforms import decode, encode, resize_crop
from letit_dist.errors import UserError
from letit_dist.evaluation.benchmark import Side, resident_peak

sys.path.insert(0, str(ROOT / "eval"))  # as Python does for a program there

from speed.data_sides import DataSides, PackingSides, box, large_index, picture, psnr, resident_over

DATA = ("eval/throughput.py", "data", "--side", 128, "--images", 4, "--batch", 2, "--repeats", 2)
DATA += ("--entries", 100, "--samples", 1000)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    return DataSides(tmp_path_factory.mktemp("sides") / "data", 4, 2, 128)


def test_pictures_store_like_photographs():
    """Of real 1024-pixel faces, shards/README.md has 49.8 dB at JPEG q95, and 51 % more bytes for the smaller sizes."""
    pixels = picture(3)
    assert torch.equal(pixels, picture(3)) and not torch.equal(pixels, picture(4))
    stored = [encode(pixels if side == 1024 else box(pixels, side), "jpeg", 95) for side in (1024, 512, 256, 128)]
    assert 48 < psnr(decode(stored[0]), pixels) < 51
    assert 0.4 < sum(map(len, stored[1:])) / len(stored[0]) < 0.65
    assert 150_000 < len(stored[0]) < 400_000


def test_both_sides_read_the_same_images(sides):
    seen = []
    sides.usual(32).run()
    for resolution in (32, 128):
        assert sides.equal("only", resolution)() == "equal pixels"
        stream = iter(ImageStream(sides.dataset("only"), seed=0, batch=4, resolution=resolution))
        seen.append(next(stream).pixels)
    truth = sides._truth()
    assert sorted(p.sum().item() for p in seen[1]) == sorted(p.sum().item() for p in truth)
    # An independent averaging, in whole numbers: at most half a step away.
    exact = seen[1].view(4, 3, 32, 4, 32, 4).double().mean((3, 5))
    assert (seen[0].double() - exact).abs().max() <= 0.5
    assert re.fullmatch(r"\d\d\.\d dB from the box filter", sides.close("both", 32, 35)())
    assert re.fullmatch(r"\d\d\.\d dB from the box filter", sides.close("only", 32, 40, scaled_decode=True)())


def test_other_pixels_are_seen_before_anything_is_timed(sides, monkeypatch):
    monkeypatch.setattr(transforms, "_box", lambda pixels, factor: pixels[:, ::factor, ::factor])
    with pytest.raises(UserError, match=r"shard-00000.tar: 00000: other pixels at 32 than Pillow's"):
        sides.equal("only", 32)()
    monkeypatch.setattr(transforms, "decode_reduced", lambda data, side, resolution: torch.zeros(3, 32, 32).byte())
    with pytest.raises(UserError, match="dB from the box filter, expected 40"):
        sides.close("only", 32, 40, scaled_decode=True)()


def test_packing_does_the_work_on_pixels_that_it_is_measured_against(sides, tmp_path, monkeypatch):
    packing = PackingSides(sides.folder / "files/all", tmp_path / "packed", 128, 32)
    packing.require_equal()
    real = packing_module.encode
    monkeypatch.setattr(packing_module, "encode", lambda pixels, *how: real(pixels.clamp(min=9), *how))
    with pytest.raises(UserError, match=r"packing wrote other bytes: sample 0, 128\.jpg"):
        packing.require_equal()


def test_memory_of_a_process_is_seen_whoever_holds_it():
    found = resident_peak(Side(lambda: np.ones(32 << 20, np.uint8).sum()))
    if found is None:
        pytest.skip("this system does not tell the peak")
    assert 32 << 20 <= found < 48 << 20
    assert resident_peak(Side(int)) < 8 << 20


def test_the_program(tmp_path):
    done = run(*DATA, "--out", tmp_path)
    assert done.code == 0, done.err
    text = next(tmp_path.glob("*-data.md")).read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert table[0][1:5] == ["naive, images/s", "ours, images/s", "naive / ours", "target"]
    assert [(row[0], row[4]) for row in table[2:]] == [
        ("32 beside 128", "at least 20"),
        ("32 from 128, exact", "-"),
        ("32 from 128, scaled_decode", "at least 3"),
        ("128", "at least 2.5"),
        ("128, floats on the CPU too", "-"),
    ]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in table[2:])
    assert re.search(
        r"^- packing 32 beside 128, .* images/s: \d+% .* of its time works on pixels; one process writes for \d+ cores",
        text,
        re.MULTILINE,
    )
    assert re.search(r"^- index of 100 samples of five files: loaded in \d", text, re.MULTILINE)
    assert re.search(r"^- resident memory, .*: \d+\.\d after 1000, ", text, re.MULTILINE)
    assert "Images a second of one core" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", 5), "--images 5: must be a multiple of --batch 2"),
        (("--side", 100), "--side 100: must be a power of two from 64 on"),
        (("--samples", 0), "--samples 0: must be at least 1"),
        (("--bf16", "--compile"), "--bf16 and --compile has no effect on data: leave it out"),
    ],
)
def test_bad_options(options, message):
    done = run(*DATA, *options)
    assert done.code == 2 and done.errors == [f"error: {message}"]


# What the targets rest on, counted instead of timed


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 8, 16, 32])
@pytest.mark.parametrize("planar", [True, False])
def test_box_is_what_torch_pools_and_rounds(factor, planar):
    pixels = torch.randint(0, 256, (3, 3 * factor, 3 * factor), dtype=torch.uint8)
    pixels[:, :factor] = 255  # the largest sum
    pixels[:, factor : 2 * factor] = torch.arange(factor, dtype=torch.uint8)[:, None] % 2  # halves
    given = pixels if planar else pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(resize_crop(given, 3), box(pixels, 3))


def test_memory_of_an_index_has_few_objects_whatever_its_length(tmp_path):
    """A million samples as objects would be copied, page by page, into every worker as references are counted."""

    def objects(folder):
        gc.collect()
        before = len(gc.get_objects())
        index = Index.read(folder)
        gc.collect()
        return index, len(gc.get_objects()) - before

    few, fewer_objects = objects(large_index(tmp_path / "few", 50))
    many, more_objects = objects(large_index(tmp_path / "many", 3000))
    assert len(few) == 50 and len(many) == 3000 and more_objects - fewer_objects < 50
    assert many.files(2999)["256.jpg"] != many.files(2998)["256.jpg"]
    assert (tmp_path / "many" / INDEX_NAME).stat().st_size < 130 * 3000


def test_reading_keeps_nothing(tmp_path):
    """Less than a reference a sample: of Python's own bytes, after 2,000 and after 6,000 samples."""
    points = resident_over(tmp_path / "warm", 1000, 1)
    assert [read for read, _ in points] == [1000, 1000] and all(size > 10 << 20 for _, size in points)
    stream = iter(ImageStream(ShardDataset([tmp_path / "warm"]), seed=0, batch=50, flip=True, grayscale=0.5))
    held = []
    tracemalloc.start()
    try:
        for _ in range(3):
            for _ in range(40):
                next(stream)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[2] - held[0] < 8 * 4000, held
