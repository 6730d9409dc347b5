import io
import multiprocessing
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from letit_dist import rng
from letit_dist.data import transforms
from letit_dist.data.batch import BadSamples, stack
from letit_dist.data.order import sample_at
from letit_dist.data.reader import ImageStream, ShardDataset, batches, open_stream
from letit_dist.data.transforms import encode
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def picture(number, size=(8, 8)):
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def write(folder, numbers, *, bad=(), size=(8, 8), meta=None, shard_samples=5):
    with ShardWriter(folder, meta=meta, shard_samples=shard_samples) as writer:
        for number in numbers:
            data = b"not an image" if number in bad else encode(picture(number, size))
            writer.write(f"k{number:02d}", {"png": data, "json": b'{"n": %d}' % number})
    return folder


@pytest.fixture
def folders(tmp_path):
    return [write(tmp_path / "a", range(13)), write(tmp_path / "b", range(13, 23), shard_samples=4)]


def collect(stream, count):
    iterator = iter(stream)
    return [next(iterator) for _ in range(count)]


def global_batches(dataset, world, workers, start, steps, **options):
    """{position: (pixels, replaced)} over all ranks."""
    found = {}
    for rank in range(world):
        stream = ImageStream(
            dataset, batch=8, rank=rank, world=world, workers=workers, start=start, **{"seed": 3, **options}
        )
        for batch in collect(stream, steps):
            assert len(batch.pixels) == 8 // world
            for position, pixels in zip(batch.positions.tolist(), batch.pixels, strict=True):
                assert position not in found
                found[position] = pixels
    assert sorted(found) == list(range(start, start + steps * 8))
    return torch.stack([found[position] for position in sorted(found)])


def test_folders_follow_each_other(folders):
    dataset = ShardDataset(folders)
    assert len(dataset) == 23
    for number in range(23):
        assert dataset.key(number) == f"k{number:02d}"
        assert dataset.json(number) == {"n": number}
        assert set(dataset.read(number)) == {"json", "png"} and set(dataset.read(number, ["png"])) == {"png"}
        assert torch.equal(dataset.pixels(number), picture(number))
    with pytest.raises(IndexError):
        dataset.key(23)


def test_the_stream_is_what_the_order_says(folders):
    dataset = ShardDataset(folders)
    pixels = global_batches(dataset, 1, 0, 0, 9, flip=True, grayscale=0.3)
    samples = sample_at(np.arange(72), 3, 23)
    flips = rng.uniform(3, "flip", range(72)) < 0.5
    greys = rng.uniform(3, "grayscale", range(72)) < 0.3
    assert 20 < flips.sum() < 52 and 8 < greys.sum() < 36
    for position in range(72):
        expected = picture(int(samples[position]))
        expected = expected.flip(-1) if flips[position] else expected
        if greys[position]:
            assert (pixels[position] == pixels[position, :1]).all()
        else:
            assert torch.equal(pixels[position], expected)
    assert sorted(samples[:23]) == list(range(23))


def test_ranks_and_workers_change_nothing(tmp_path, folders):
    write(tmp_path / "c", range(30, 37), bad=(33,))
    dataset = ShardDataset([*folders, tmp_path / "c"])
    options = {"flip": True, "grayscale": 0.2}
    one = global_batches(dataset, 1, 0, 0, 6, **options)
    assert torch.equal(global_batches(dataset, 2, 2, 0, 6, **options), one)
    assert torch.equal(global_batches(dataset, 4, 1, 0, 6, **options), one)
    # A run of two ranks stops after two steps, within an epoch, and continues on four.
    first = global_batches(dataset, 2, 1, 0, 2, **options)
    rest = global_batches(dataset, 4, 0, 16, 4, **options)
    assert torch.equal(torch.cat([first, rest]), one)
    assert not torch.equal(global_batches(dataset, 1, 0, 0, 6, seed=4, **options), one)


def test_a_bad_sample_is_replaced_and_named(tmp_path):
    dataset = ShardDataset([write(tmp_path / "a", range(10), bad=(2, 7))])
    batch = collect(ImageStream(dataset, seed=0, batch=10), 1)[0]
    named = dict(batch.bad)
    assert set(named) == {"k02", "k07"} and "not an image" in named["k02"]
    assert batch.pixels.shape == (10, 3, 8, 8)
    good = {picture(number).numpy().tobytes() for number in range(10)}
    assert all(pixels.numpy().tobytes() in good for pixels in batch.pixels)
    split = [collect(ImageStream(dataset, seed=0, batch=10, rank=r, world=2), 1)[0] for r in range(2)]
    assert torch.equal(torch.cat([part.pixels for part in split]), batch.pixels)
    assert sorted(split[0].bad + split[1].bad) == sorted(batch.bad)


def test_nothing_but_bad_samples_is_an_error(tmp_path):
    dataset = ShardDataset([write(tmp_path / "a", range(4), bad=range(4))])
    with pytest.raises(UserError, match=r"k00 and the samples after it cannot be decoded"):
        ImageStream(dataset, seed=0, batch=4)
    dataset = ShardDataset([write(tmp_path / "b", range(4), bad=range(4), meta={"resolution": 8})])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"32 samples in a row.*shard-00000\.tar: k0\d \(not an image") as caught:
            collect(ImageStream(dataset, seed=0, batch=4, workers=workers), 1)
        assert "Traceback" not in str(caught.value)


def test_the_share_of_bad_samples_is_enforced_with_numbers_and_names():
    bad = BadSamples(0.01)
    bad.add(0, 64)
    bad.add(9, 64, [(f"k{i}", "empty file") for i in range(9)])  # the share is taken of at least 1000
    with pytest.raises(UserError) as caught:
        bad.add(2, 64)
    assert str(caught.value) == (
        "11 of 192 samples could not be read, more than data.max_bad_fraction = 0.01 allows; the first: "
        "k0 (empty file), k1 (empty file), k2 (empty file), k3 (empty file), k4 (empty file)"
    )
    bad = BadSamples(0.01)
    for _ in range(100):
        bad.add(1, 100)
    with pytest.raises(UserError):
        bad.add(2, 100)
    with pytest.raises(UserError):
        BadSamples(0).add(1, 10)


def test_mixed_sizes_name_the_key_and_both_sizes(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("first", {"png": encode(picture(0))})
        writer.write("odd", {"png": encode(picture(1, (8, 6)))})
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"shard-00000\.tar: odd: the image is 6x8, the others are 8x8: pack with"):
            collect(ImageStream(ShardDataset([tmp_path]), seed=0, batch=4, workers=workers), 1)


def test_folders_of_different_resolution_are_refused_before_reading(tmp_path):
    write(tmp_path / "a", range(2), meta={"resolution": 8})
    write(tmp_path / "b", range(2), meta={"resolution": 16})
    with pytest.raises(UserError, match=r"different resolution.*a has 8, .*b has 16"):
        ShardDataset([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_in_mid_run(tmp_path, workers):
    dataset = ShardDataset([write(tmp_path / "a", range(40), shard_samples=20)])
    iterator = iter(ImageStream(dataset, seed=0, batch=4, workers=workers))
    next(iterator)
    for path in (tmp_path / "a").glob("*.tar"):
        with path.open("r+b") as stream:
            stream.truncate(600)
    with pytest.raises(UserError, match=r"shard-0000\d\.tar: expected \d+ bytes at offset \d+, got \d+"):
        for _ in range(12):
            next(iterator)


def test_a_vanished_shard(tmp_path):
    dataset = ShardDataset([write(tmp_path / "a", range(4))])
    (tmp_path / "a" / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.tar: cannot read \d+ bytes at offset \d+: No such file"):
        dataset.read(0)


def test_samples_need_exactly_one_image(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("k", {"a.png": b"", "b.jpg": b"", "txt": b""})
    with pytest.raises(UserError, match=r"k: one image a sample was expected, its files are: a\.png, b\.jpg, txt"):
        ShardDataset([tmp_path]).pixels(0)


def read_in_child(dataset, queue):
    queue.put([dataset.read(number)["json"] for number in range(len(dataset))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_handles_survive_fork_and_spawn(folders, method):
    dataset = ShardDataset(folders)
    expected = [dataset.read(number)["json"] for number in range(23)]
    assert pickle.loads(pickle.dumps(dataset)).read(22)["json"] == expected[22]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(dataset, queue))
    child.start()
    assert dataset.read(5)["json"] == expected[5]
    assert queue.get(timeout=120) == expected
    child.join()
    assert dataset.read(0)["json"] == expected[0]


def test_one_pass_in_order_over_ranks_and_workers(folders):
    dataset = ShardDataset(folders)
    for world, workers in ((1, 0), (3, 1)):
        parts = [part for rank in range(world) for part in batches(dataset, 4, rank=rank, world=world, workers=workers)]
        assert torch.cat([samples for _, samples in parts]).tolist() == list(range(23))
        assert torch.equal(torch.cat([pixels for pixels, _ in parts]), torch.stack([picture(n) for n in range(23)]))
    assert list(batches(dataset, 4, rank=0, world=30)) == []


def test_one_pass_replaces_nothing(tmp_path):
    dataset = ShardDataset([write(tmp_path / "a", range(4), bad=(2,))])
    with pytest.raises(UserError, match=r"shard-00000\.tar: k02: not an image"):
        list(batches(dataset, 4))


def foreign(folder, shards=4, each=6, suffix="jpg", same=False):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"their-{shard:03d}.tar", "w") as tar:
            for number in range(each):
                stream = io.BytesIO()
                Image.fromarray(np.full((8, 8, 3), shard if same else shard * each + number, np.uint8)).save(
                    stream, "PNG"
                )
                info = tarfile.TarInfo(f"s{shard}_{number}.{suffix}")
                info.size = len(stream.getvalue())
                tar.addfile(info, io.BytesIO(stream.getvalue()))
    return folder


def values(batch):
    return batch.pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("form", ["{}", "{}/*.tar", "{}/their-{{000..003}}.tar"])
def test_tars_without_an_index_are_streamed(tmp_path, form):
    path = form.format(foreign(tmp_path / "x"))
    stream = open_stream([path], seed=1, batch=8, workers=2)
    assert "a resumed run does not continue exactly" in stream.notice
    found = collect(stream, 6)
    assert torch.cat([batch.positions for batch in found]).tolist() == list(range(48))
    assert {value for batch in found for value in values(batch)} <= set(range(24))
    again = collect(open_stream([path], seed=1, batch=8, workers=2), 6)
    assert [values(batch) for batch in again] == [values(batch) for batch in found]
    later = collect(open_stream([path], seed=1, batch=8, start=48, workers=2), 6)
    assert later[0].positions.tolist() == list(range(48, 56))
    assert [values(batch) for batch in later] != [values(batch) for batch in found]


def test_ranks_of_a_foreign_stream_share_the_shards(tmp_path):
    path = foreign(tmp_path / "x")
    ranks = [collect(open_stream([path], seed=1, batch=8, rank=r, world=2), 40) for r in range(2)]
    seen = [{value for batch in found for value in values(batch)} for found in ranks]
    # An epoch's shards are dealt out anew, so in the end each rank meets everything.
    assert seen[0] == seen[1] == set(range(24))


def test_ranks_and_workers_of_a_foreign_stream_read_different_shards(tmp_path):
    path = foreign(tmp_path / "x", each=200, same=True)
    ranks = [collect(open_stream([path], seed=1, batch=8, rank=r, world=2, workers=2), 10) for r in range(2)]
    # The loader asks its workers in turn, and within its first 200 samples each has one shard.
    parts = [{value for batch in found[worker::2] for value in values(batch)} for found in ranks for worker in (0, 1)]
    assert sorted(parts, key=min) == [{0}, {1}, {2}, {3}]
    assert ranks[1][0].positions.tolist() == [4, 5, 6, 7]


def test_foreign_shards_must_be_enough(tmp_path):
    path = foreign(tmp_path / "x", shards=3)
    with pytest.raises(UserError, match="3 shards without an index cannot feed 2 ranks x 2 workers: use 1 workers"):
        open_stream([path], seed=0, batch=8, rank=0, world=2, workers=2)
    with pytest.raises(UserError, match="3 shards without an index cannot feed 4 ranks: index them"):
        open_stream([path], seed=0, batch=8, rank=0, world=4)
    with pytest.raises(UserError, match="no such tar"):
        open_stream([str(tmp_path / "y" / "*.tar")], seed=0, batch=8)


def test_damaged_foreign_shards_are_counted_or_refused(tmp_path):
    path = foreign(tmp_path / "x", shards=2, each=20)
    cut = path / "their-000.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    found = collect(open_stream([path], seed=1, batch=8), 5)
    reasons = [reason for batch in found for _, reason in batch.bad]
    assert reasons and "ReadError" in reasons[0]
    for tar in path.glob("*.tar"):
        tar.write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match="1000 samples in a row cannot be read"):
        collect(open_stream([path], seed=1, batch=8), 1)
    path = foreign(tmp_path / "z", suffix="txt")
    with pytest.raises(UserError, match="0 images in one sample"):
        collect(open_stream([path], seed=1, batch=8, workers=1), 1)


def test_indexed_and_foreign_shards_do_not_mix(tmp_path, folders):
    assert open_stream(folders, seed=0, batch=4).notice is None
    with pytest.raises(UserError, match="cannot be mixed in one stream"):
        open_stream([folders[0], foreign(tmp_path / "x")], seed=0, batch=4)


# Decoding at a fraction of the size


def photo(number, side=64):
    coarse = Image.fromarray(picture(number).permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(coarse)).permute(2, 0, 1)


def test_scaled_decoding_is_asked_for(tmp_path):
    with ShardWriter(tmp_path, meta={"resolution": 64}) as writer:
        for number in range(8):
            writer.write(f"{number}", {"jpg": encode(photo(number), "jpeg")})
    exact, scaled = ShardDataset([tmp_path], 16), ShardDataset([tmp_path], 16, scaled_decode=True)
    for number in range(8):
        whole = transforms.decode(exact.read(number)["jpg"])
        assert torch.equal(exact.pixels(number), transforms.resize_crop(whole, 16))
        assert torch.equal(scaled.pixels(number), transforms.decode_reduced(scaled.read(number)["jpg"], 64, 16))
        assert not torch.equal(scaled.pixels(number), exact.pixels(number))
        assert torch.equal(scaled.pixels(number, 64), whole)
    plain, other = (
        next(iter(open_stream([tmp_path], seed=3, batch=8, resolution=16, scaled_decode=scaled_decode))).pixels
        for scaled_decode in (False, True)
    )
    assert 0 < (plain.float() - other.float()).abs().mean() < 2


def test_scaled_decoding_hides_no_wrong_size(tmp_path):
    with ShardWriter(tmp_path, meta={"resolution": 64}) as writer:
        writer.write("a", {"jpg": encode(photo(0), "jpeg")})
        writer.write("b", {"jpg": encode(photo(1, 32), "jpeg")})
    stream = ImageStream(ShardDataset([tmp_path], scaled_decode=True), seed=0, batch=2, resolution=16)
    with pytest.raises(UserError, match="b: the image is 32x32, the others are 64x64"):
        next(iter(stream))


def test_scaled_decoding_is_refused_where_it_does_nothing(tmp_path):
    write(tmp_path, range(5))
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match=r"scaled_decode has no effect on .*no index.json"):
        open_stream([tmp_path], seed=0, batch=1, scaled_decode=True)


def test_a_batch_lies_as_its_images_lie(tmp_path):
    """Interleaved colours are copied, not reordered; a mixture is row-major. The pixels are the same."""
    interleaved = [picture(n).permute(1, 2, 0).contiguous().permute(2, 0, 1) for n in range(3)]
    batch = stack(interleaved)
    assert batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()
    assert torch.equal(batch, torch.stack([picture(n) for n in range(3)]))
    mixed = stack([interleaved[0], picture(1)])
    assert mixed.is_contiguous() and torch.equal(mixed, batch[:2])
    images = transforms.to_images(batch)
    assert images.is_contiguous() and torch.equal(images, transforms.to_images(batch.contiguous()))
