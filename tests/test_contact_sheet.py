"""What stands where on the sheet of shards/check.py."""

import numpy as np
import pytest
from PIL import Image
from test_pack import noise, save

from letit_dist.data.checking import contact_sheet
from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ShardDataset
from letit_dist.data.sources import Request, open_source

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_every_folder_has_its_samples_in_its_rows_in_order(tmp_path):
    counts = {"cats": 18, "dogs": 3}
    for seed, (name, count) in enumerate(counts.items()):
        for number in range(count):
            save(noise(100 * seed + number, 16, 16), tmp_path / "in" / name / f"{number:02d}.png")
        [part] = open_source(str(tmp_path / "in" / name), Request())
        pack(part, tmp_path / name, PackOptions(resolution=16))
    contact_sheet([tmp_path / name for name in counts], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 96, 16 * 96, 3)  # two rows of cats, one of dogs

    def cell(row, column):
        return sheet[96 * row : 96 * row + 96, 96 * column : 96 * column + 96]

    for name, first in (("cats", 0), ("dogs", 2)):
        dataset = ShardDataset([tmp_path / name])
        for number in range(counts[name]):
            image = Image.fromarray(dataset.pixels(number).permute(1, 2, 0).numpy())
            expected = np.asarray(image.resize((96, 96), Image.Resampling.LANCZOS))
            assert np.array_equal(cell(first + number // 16, number % 16), expected), (name, number)
    for row, column in ((1, 2), (1, 15), (2, 3), (2, 15)):
        assert (cell(row, column) == 255).all()


def test_a_large_folder_is_sampled_evenly(tmp_path):
    for number in range(10):
        save(noise(number, 8, 8), tmp_path / f"in/{number}.png")
    [part] = open_source(str(tmp_path / "in"), Request())
    pack(part, tmp_path / "out", PackOptions(resolution=8))
    contact_sheet([tmp_path / "out"], tmp_path / "sheet.png", columns=2, rows=2, cell=8)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    cells = [sheet[y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
    assert all(np.array_equal(cell, noise(number, 8, 8)) for cell, number in zip(cells, (0, 3, 6, 9), strict=True))
