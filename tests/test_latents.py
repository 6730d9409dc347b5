import numpy as np
import pytest
import torch
import webdataset

from letit_dist.data import latents
from letit_dist.data.latents import LatentPairs, LatentSet, LatentWriter, code_dtype
from letit_dist.data.order import permutation
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError


def latent(number):
    return torch.randn(6, generator=torch.Generator().manual_seed(number))


def codes(number, size=512):
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randint(0, size, (n, n), generator=generator) for name, n in (("top", 2), ("bottom", 4))}


def write_latents(folder, count=5, **options):
    with LatentWriter(folder, kind="latents", autoencoder_fingerprint="aaa", **options) as writer:
        for number in range(count):
            for view in ("", "flip"):
                value = latent(number) if not view else -latent(number)
                writer.write(f"k{number}", {"latent": value}, json_data={"n": number} if number else None, view=view)
    return folder


def write_codes(folder, size=512, count=5):
    with LatentWriter(folder, kind="codes", autoencoder_fingerprint="aaa", codebook_size=size) as writer:
        for number in range(count):
            writer.write(f"k{number}", codes(number, size))
    return folder


def test_latents_come_back_with_views_and_json(tmp_path):
    found = LatentSet.open(write_latents(tmp_path / "a", meta={"source": "s"}), autoencoder_fingerprint="aaa")
    assert len(found) == 10 and found.keys[:3] == ["k0", "k0-flip", "k1"]
    assert found.kind == "latents" and found.meta["source"] == "s" and found.meta["dtype"] == "float32"
    assert torch.equal(found.fields["latent"][::2], torch.stack([latent(n) for n in range(5)]))
    assert found.json(0) == {} and found.json(3) == {"n": 1}
    taken = found.take(torch.tensor([3, 0, 3]))
    assert torch.equal(taken["latent"], torch.stack([-latent(1), latent(0), -latent(1)]))


@pytest.mark.parametrize(("dtype", "taken"), [("float16", torch.float32), ("float64", torch.float64)])
def test_other_precisions(tmp_path, dtype, taken):
    found = LatentSet.open(write_latents(tmp_path / "a", dtype=dtype))
    assert found.fields["latent"].dtype == getattr(torch, dtype)
    assert found.take([1])["latent"].dtype == taken
    torch.testing.assert_close(found.take([0])["latent"][0].float(), latent(0), atol=2e-3, rtol=0)
    with pytest.raises(UserError, match="cannot be stored as bfloat16"):
        LatentWriter(tmp_path / "b", kind="latents", autoencoder_fingerprint="", dtype="bfloat16")


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "int16"), (512, "int16"), (40_000, "int32")])
def test_codes_are_exact_in_the_smallest_integers(tmp_path, size, dtype):
    assert code_dtype(size) == dtype
    found = LatentSet.open(write_codes(tmp_path / "a", size), autoencoder_fingerprint="aaa")
    assert {str(field.dtype) for field in found.fields.values()} == {f"torch.{dtype}"}
    taken = found.take(range(5))
    for number in range(5):
        for name, value in codes(number, size).items():
            assert taken[name].dtype == torch.int64 and torch.equal(taken[name][number], value)
    with LatentWriter(tmp_path / "b", kind="codes", autoencoder_fingerprint="", codebook_size=size) as writer:
        writer.write("k", {"top": np.zeros((1, 1)), "bottom": np.full((1, 1), size - 1)})
        with pytest.raises(ValueError, match=f"{size} of {size}"):
            writer.write("k", {"top": np.zeros((1, 1)), "bottom": np.full((1, 1), size)})


def test_plain_webdataset_decodes_them(tmp_path):
    write_codes(tmp_path)
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False).decode()))
    assert sample["__key__"] == "k0"
    assert (sample["top.npy"] == codes(0)["top"].numpy()).all() and sample["bottom.npy"].shape == (4, 4)


def test_written_twice_is_the_same_bytes(tmp_path):
    for name in "ab":
        write_latents(tmp_path / name)
    for name in ("index.json", "shard-00000.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_autoencoder_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        LatentSet.open(write_latents(tmp_path), autoencoder_fingerprint="bbb")
    message = str(caught.value)
    assert "autoencoder aaa" in message and "autoencoder bbb" in message and "launch/encode_latents.py" in message


def test_images_are_not_latents(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("k", {"png": b""})
    with pytest.raises(UserError, match="holds images, not latents: encode them first"):
        LatentSet.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"txt": b""}, r"b: no latent\.npy, its files are: txt"),
        ({"latent.npy": b"xx"}, r"b\.latent\.npy cannot be read"),
        ({"latent.npy": None}, r"b\.latent\.npy: torch.float64 \(3,\), the others are torch.float64 \(2,\)"),
    ],
)
def test_damaged_samples_are_named(tmp_path, files, message):
    def npy(count):
        np.save(tmp_path / "x.npy", np.zeros(count))
        return (tmp_path / "x.npy").read_bytes()

    with ShardWriter(tmp_path / "a", kind="latents") as writer:
        writer.write("a", {"latent.npy": npy(2)})
        writer.write("b", {name: npy(3) if data is None else data for name, data in files.items()})
    with pytest.raises(UserError, match=message):
        LatentSet.open(tmp_path / "a")


def test_misuse_is_caught(tmp_path):
    with pytest.raises(ValueError, match="kind 'images', known: latents, codes"):
        LatentWriter(tmp_path, kind="images", autoencoder_fingerprint="")
    with pytest.raises(ValueError, match="codebook_size belongs to"):
        LatentWriter(tmp_path, kind="codes", autoencoder_fingerprint="")
    with LatentWriter(tmp_path, kind="latents", autoencoder_fingerprint="") as writer:
        with pytest.raises(ValueError, match=r"fields \['top'\]"):
            writer.write("k", {"top": torch.zeros(2)})
        writer.write("k", {"latent": torch.zeros(2)})


def test_pairs_have_an_order_a_side():
    pairs = LatentPairs((7, 5), seed=2, batch=4)
    stream = pairs.stream(0)
    drawn = [next(stream) for _ in range(9)]
    assert torch.cat([batch.positions for batch in drawn]).tolist() == list(range(36))
    source = torch.cat([batch.source for batch in drawn]).tolist()
    target = torch.cat([batch.target for batch in drawn]).tolist()
    assert source[7:14] == permutation(2, 1, 7, "source").tolist()
    assert target[5:10] == permutation(2, 1, 5, "target").tolist()
    # The same length must not mean the same partners.
    same = LatentPairs((100, 100), seed=2, batch=100).at(0)
    assert (same.source == same.target).sum() < 10


@pytest.mark.parametrize("pairs", [[(0, 1)], [(0, 1), (1, 0), (0, 2)]])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("ahead", [1, 30, 4096])
def test_the_stream_is_batch_after_batch(monkeypatch, ahead, world, pairs):
    monkeypatch.setattr(latents, "AHEAD", ahead)
    for rank in range(world):
        dealt = LatentPairs((7, 5, 11), seed=2, batch=8, rank=rank, world=world, pairs=pairs)
        for number, found in zip(range(9), dealt.stream(24), strict=False):
            for name, expected in vars(dealt.at(24 + 8 * number)).items():
                assert torch.equal(getattr(found, name), expected), name


@pytest.mark.parametrize("world", [2, 4])
def test_pairs_do_not_know_ranks(tmp_path, world):
    source, target = (LatentSet.open(write_latents(tmp_path / name, count)) for name, count in (("s", 5), ("t", 3)))
    sizes = (len(source), len(target))
    one = LatentPairs(sizes, seed=2, batch=8).at(24)
    ranks = [LatentPairs(sizes, seed=2, batch=8, rank=rank, world=world).at(24) for rank in range(world)]
    for name in ("positions", "source", "target"):
        assert torch.equal(torch.cat([getattr(part, name) for part in ranks]), getattr(one, name))
    assert one.source.max() < 10 and one.target.max() < 6
    with pytest.raises(UserError, match="cannot be dealt"):
        LatentPairs((5, 5), seed=0, batch=9, world=world)
