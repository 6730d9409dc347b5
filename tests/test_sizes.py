"""Several resolutions in one sample: packing, plain webdataset, and reading no more than a size needs."""

import json

import pytest
import torch
import webdataset
from test_pack import contents, noise, packed, program, save

from letit_dist.data import transforms
from letit_dist.data.inputs import open_images
from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ImageStream, ShardDataset, batches, open_stream
from letit_dist.data.sizes import choose, images_of, sized
from letit_dist.data.sources import Request, open_source
from letit_dist.data.transforms import decode, encode, resize_crop
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture
def photos(tmp_path):
    for number in range(6):
        save(noise(number, 96, 110), tmp_path / f"photos/p.{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def several(photos, tmp_path):
    packed(photos, tmp_path / "several", resolution=64, smaller=(32, 8))
    return tmp_path / "several"


@pytest.fixture
def single(photos, tmp_path):
    packed(photos, tmp_path / "single", resolution=64)
    return tmp_path / "single"


def close(found, expected, exact):
    """Equal; or off by one where a size that is not stored is rounded twice."""
    far = (found.int() - expected.int()).abs().max()
    return far == 0 if exact else far <= 1


class Reads(ShardDataset):
    """Counts the bytes that are read."""

    total = 0

    def _pread(self, path, offset, size):
        self.total += size
        return super()._pread(path, offset, size)


def test_names_and_choice():
    images = images_of(["json", "64.png", "32.png", "8.png"])
    assert images == {64: "64.png", 32: "32.png", 8: "8.png"} and sized(8, "png") == "8.png"
    assert [choose(images, r) for r in (None, 4, 8, 9, 32, 33, 64, 100)] == [64, 8, 8, 32, 32, 64, 64, 64]
    assert images_of(["jpg", "json"]) == images_of(["jpg"]) == {None: "jpg"} and choose({None: "jpg"}, 32) is None
    # Two images without a size, or of one size, are not one image.
    assert images_of(["png", "jpg"]) is images_of(["json"]) is images_of(["8.png", "8.jpg"]) is None
    assert images_of(["top.png", "8.png"]) is None and images_of(["left.png"]) == {None: "left.png"}


def test_plain_webdataset_reads_one_sample_with_all_sizes(several, photos):
    samples = list(webdataset.WebDataset(str(several / "shard-00000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"p_{number}" for number in range(6)]
    for number, sample in enumerate(samples):
        assert {name for name in sample if not name.startswith("__")} == {"64.png", "32.png", "8.png", "json"}
        square = resize_crop(decode((photos / f"p.{number}.png").read_bytes()), 64)
        assert (sample["64.png"] == square.permute(1, 2, 0).numpy()).all()
        assert (sample["8.png"] == resize_crop(square, 8).permute(1, 2, 0).numpy()).all()
        assert sample["json"] == {"file": f"p.{number}.png"}


def test_the_index_states_sizes_and_filter(several, single):
    meta = ShardDataset([several]).indexes[0].meta
    assert (meta["resolution"], meta["resolutions"], meta["filter"]) == (64, [64, 32, 8], "box")
    assert meta["resize"].startswith("rounded average at whole factors, area average at others")
    assert meta["pack"]["smaller"] == [32, 8]
    assert not {"resolutions", "smaller"} & {*ShardDataset([single]).indexes[0].meta["pack"]}


@pytest.mark.parametrize("resolution", [None, 64, 32, 16, 8, 4])
def test_each_size_equals_the_largest_reduced(several, single, resolution):
    options = {"seed": 2, "batch": 4, "flip": True, "grayscale": 0.3, "resolution": resolution}
    for workers in (0, 1):
        expected = next(iter(ImageStream(ShardDataset([single]), workers=workers, **options))).pixels
        found = next(iter(ImageStream(ShardDataset([several]), workers=workers, **options))).pixels
        assert found.shape[-1] == (resolution or 64)
        assert close(found, expected, exact=resolution in (None, 64, 32, 8))


def test_no_more_is_read_than_a_size_needs(several):
    dataset = Reads([several])
    for resolution, side in ((None, 64), (64, 64), (33, 64), (32, 32), (9, 32), (8, 8), (4, 8)):
        dataset.total = 0
        dataset.pixels(2, resolution)
        assert dataset.total == dataset.indexes[0].files(2)[f"{side}.png"][1]


def test_a_data_set_opened_at_a_resolution(several, single, tmp_path):
    expected = ShardDataset([single])
    for resolution in (32, 16):
        dataset = Reads([several, single], resolution)
        assert dataset.image_size() == (resolution, resolution) and dataset.stored_size() == (64, 64)
        for sample in range(12):
            reduced = resize_crop(expected.pixels(sample % 6), resolution)
            assert close(dataset.pixels(sample), reduced, exact=resolution == 32 or sample > 5)
        pixels, samples = next(iter(batches(dataset, 12)))
        assert pixels.shape == (12, 3, resolution, resolution) and samples.tolist() == list(range(12))
        assert ImageStream(dataset, seed=0, batch=2).size == (resolution, resolution)
        # Levels of growing below it.
        assert next(iter(ImageStream(dataset, seed=0, batch=2, resolution=8))).pixels.shape == (2, 3, 8, 8)
    assert ShardDataset([several]).stores(32) and not ShardDataset([several, single]).stores(32)
    assert ShardDataset([several]).at(32).image_size() == (32, 32)
    with pytest.raises(UserError, match=r"several holds images of 64, not 128: pack it again"):
        ShardDataset([several], 128)


def test_folders_of_other_largest_sizes_are_read_at_a_common_one(photos, several, tmp_path):
    packed(photos, tmp_path / "small", resolution=32)
    with pytest.raises(UserError, match="different resolution in one data set"):
        ShardDataset([several, tmp_path / "small"])
    dataset = ShardDataset([several, tmp_path / "small"], 32)
    pixels, _ = next(iter(batches(dataset, 12)))
    assert torch.equal(pixels[0], dataset.pixels(0))
    stream = next(iter(ImageStream(dataset, seed=0, batch=12)))
    assert stream.pixels.shape == (12, 3, 32, 32) and not stream.bad


def test_a_file_that_is_not_the_size_its_name_says_is_named(tmp_path):
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    with ShardWriter(tmp_path / "x", meta={"resolution": 16}) as writer:
        writer.write("k", {"16.png": encode(picture), "8.png": encode(picture)})
    with pytest.raises(UserError, match=r"shard-00000\.tar: k: the image is 16x16, the others are 8x8"):
        next(iter(ImageStream(ShardDataset([tmp_path / "x"]), seed=0, batch=2, resolution=8)))
    assert next(iter(ImageStream(ShardDataset([tmp_path / "x"]), seed=0, batch=2))).pixels.shape[-1] == 16


@pytest.fixture
def told_apart(tmp_path):
    """Samples whose stored sizes show which was read: each is plain, as bright as its side."""
    with ShardWriter(tmp_path / "plain", meta={"resolution": 64, "resolutions": [64, 32, 8]}) as writer:
        for number in range(6):
            sides = {sized(s, "png"): encode(torch.full((3, s, s), s, dtype=torch.uint8)) for s in (64, 32, 8)}
            writer.write(f"k{number}", sides)
    return tmp_path / "plain"


def test_every_reader_takes_the_smallest_that_is_large_enough(told_apart):
    for resolution, side in ((8, 8), (16, 32), (32, 32), (33, 64), (64, 64)):
        stream = ImageStream(ShardDataset([told_apart]), seed=1, batch=6, resolution=resolution)
        assert (next(iter(stream)).pixels == side).all()
        assert all((pixels == side).all() for _, pixels in open_images(told_apart, resolution))
        tars = open_stream([str(told_apart / "*.tar")], seed=1, batch=6, resolution=resolution)
        assert (next(iter(tars)).pixels == side).all()


def test_without_an_index_the_largest_is_read_if_nothing_is_asked(several, single):
    (several / "index.json").unlink()
    for resolution, side in ((8, 8), (16, 16), (None, 64)):
        stream = open_stream([str(several / "*.tar")], seed=1, batch=6, resolution=resolution)
        batch = next(iter(stream))
        assert batch.pixels.shape == (6, 3, side, side) and not batch.bad


def test_images_to_translate_are_read_at_the_size_that_is_needed(several, single):
    for (name, found), (other, expected) in zip(open_images(several, 32), open_images(single, 32), strict=True):
        assert name == other and torch.equal(found, expected)


def test_an_autoencoder_gets_its_size_from_shards_that_store_it(several, tmp_path):
    from conftest import tiny_autoencoder

    from letit_dist.data.encoding import EncodeOptions, encode_domain

    encode_domain(tiny_autoencoder(), ShardDataset([several]), tmp_path / "latents", EncodeOptions())
    latents = ShardDataset([tmp_path / "latents"])
    assert len(latents) == 6 and latents.indexes[0].meta["resolution"] == 32
    with pytest.raises(UserError, match="holds images of 64x64, the autoencoder takes 16x16"):
        encode_domain(tiny_autoencoder(resolution=16), ShardDataset([several]), tmp_path / "no", EncodeOptions())


def test_interrupted_and_with_workers_the_bytes_are_the_same(photos, tmp_path):
    options = {"resolution": 64, "smaller": (32, 8), "shard_bytes": 40_000}
    save(noise(9, 20, 20), photos / "p.3x.png")
    with pytest.raises(UserError, match=r"p\.3x\.png is 20x20"):
        packed(photos, tmp_path / "a", **options)
    assert (tmp_path / "a/shard-00000.tar").exists()
    assert packed(photos, tmp_path / "a", workers=2, enlarge=True, **options).resumed_at > 0
    packed(photos, tmp_path / "b", enlarge=True, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(UserError, match=r"smaller: \[32, 8\] -> \[32\]"):
        packed(photos, tmp_path / "b", resolution=64, smaller=(32,), shard_bytes=40_000)


def test_jpeg_quality_follows_the_size(photos, tmp_path):
    packed(photos, tmp_path / "j", resolution=64, smaller=(16,), format="jpeg")
    files = ShardDataset([tmp_path / "j"]).read(0)
    assert set(files) == {"64.jpg", "16.jpg", "json"}
    square = resize_crop(decode((photos / "p.0.png").read_bytes()), 64)
    assert files["16.jpg"] == encode(resize_crop(square, 16), "jpeg", 98)


def test_drawn_fruit_in_several_sizes(tmp_path):
    arguments = ("builtin:fruit", "--out", tmp_path / "f", "--count", 2, "--test", 0, "--resolution", 64, 32)
    assert program("pack", *arguments) == 0
    dataset = ShardDataset([tmp_path / "f/apple/train"])
    assert dataset.indexes[0].meta["resolutions"] == [64, 32] and dataset.indexes[0].meta["filter"] == "box"
    assert torch.equal(dataset.pixels(1, 32), resize_crop(dataset.pixels(1), 32))


def test_original_bytes_are_untouched(tmp_path, capsys):
    source = tmp_path / "in"
    for number in range(3):
        save(noise(number), source / f"{number}.{'png' if number else 'webp'}")
    (source / "2.png").rename(source / "2.jpg")
    (source / "3.png").write_bytes(b"\x89PNG broken")
    arguments = (source, "--out", tmp_path / "out", "--format", "original", "--max-bad-fraction", 0.5)
    assert program("pack", *arguments) == 0
    assert "1 x PNG named .jpg" in capsys.readouterr().out
    dataset = ShardDataset([tmp_path / "out"])
    assert [set(dataset.read(n)) - {"json"} for n in range(3)] == [{"webp"}, {"png"}, {"png"}]
    for n, name in enumerate(("0.webp", "1.png", "2.jpg")):
        assert dataset.read(n)[("webp", "png", "png")[n]] == (source / name).read_bytes()
    assert next(iter(batches(dataset, 3)))[0].shape == (3, 3, 24, 32)
    assert "filter" not in dataset.indexes[0].meta
    assert json.loads(dataset.read(2)["json"]) == {"file": "2.jpg", "notes": ["PNG named .jpg"]}


def test_only_what_we_encoded_is_trusted(tmp_path, photos, several, monkeypatch):
    """The fast decoder of PNG ends the process where libpng complains, so other people's bytes must not reach it."""
    packed(photos, tmp_path / "original", format="original")
    seen = []
    plain = transforms.decode
    monkeypatch.setattr(transforms, "decode", lambda data, **options: seen.append(options) or plain(data, **options))
    for folder in (several, tmp_path / "original"):
        ShardDataset([folder]).pixels(0)
    assert seen == [{"trusted": True}, {"trusted": False}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resolution", 32, 64), "resolutions 32 64: the largest first, each smaller than the one before"),
        (("--resolution", 64, 64), "resolutions 64 64: the largest first"),
        (
            ("--resolution", 64, "--format", "original"),
            "--format original keeps the bytes as they are: leave out --res",
        ),
        (("--quality", 90, "--format", "original"), "a quality has no effect on original"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(photos, tmp_path, capsys, arguments, message):
    assert program("pack", photos, "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_drawn_pictures_have_no_original_bytes(tmp_path):
    part, *_ = open_source("builtin:fruit", Request(resolution=32, count=1))
    with pytest.raises(UserError, match="drawn pictures have no bytes to keep"):
        pack(part, tmp_path / "out", PackOptions(format="original"))
