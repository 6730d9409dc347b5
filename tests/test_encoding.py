"""Encoding a domain: the same as image by image, every view, every dtype, and interruptions."""

import hashlib
import re
from dataclasses import replace

import pytest
import torch
from plain_autoencoders import Flat

from letit_dist import memory
from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.autoencoders.vqvae2 import VQVAE2
from letit_dist.data.encoding import EncodeOptions, encode_domain, random_crop
from letit_dist.data.index import JOURNAL_NAME, Index
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import to_images
from letit_dist.errors import UserError
from letit_dist.memory import GIB, peak_bytes


@pytest.fixture(scope="module")
def vqvae2(fruit_shards):
    """Its codebooks are made of what its encoder says of some oranges, so that images get different codes."""
    torch.manual_seed(0)
    model = build_autoencoder(VQVAE2.tiny.model_copy(update={"resolution": 32})).eval().requires_grad_(False)
    oranges = ShardDataset([fruit_shards / "orange/test"])
    images = torch.cat([image(oranges, i) for i in range(8)])

    def fill(quantizer, projection, features):
        z = projection(features)
        scale = 1 / z.std()
        # Centred and of unit size: rounding, which depends on the batch, never decides which code is nearest.
        projection.bias.sub_(z.mean((0, 2, 3))).mul_(scale)
        projection.weight.mul_(scale)
        z = projection(features)
        rows = z.movedim(1, -1).flatten(0, -2)
        quantizer.embed.copy_(rows[torch.randperm(len(rows))[: len(quantizer.embed)]])
        return quantizer.embed_codes(quantizer.lookup(z))

    bottom = model.bottom_encoder(images)
    top = fill(model.top_quantizer, model.top_projection, model.top_encoder(bottom))
    fill(model.bottom_quantizer, model.bottom_projection, torch.cat([model.top_decoder(top), bottom], 1))
    return model


@pytest.fixture(scope="module")
def flat():
    torch.manual_seed(0)
    return Flat(32)


@pytest.fixture(scope="module")
def apples(fruit_shards):
    return ShardDataset([fruit_shards / "apple/test"])


def options(**changed):
    return EncodeOptions(**{"batch": 3, **changed})


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def image(dataset, sample):
    return to_images(dataset.pixels(sample)[None])


def test_the_codebooks_of_this_test_are_used(vqvae2, apples):
    codes = vqvae2.encode_codes(torch.cat([image(apples, i) for i in range(len(apples))]))
    assert all(len(values.unique()) > 8 for values in codes.values())
    assert all(len(values.flatten(1).unique(dim=0)) == 8 for values in codes.values())


def test_codes_are_those_of_each_image(vqvae2, apples, tmp_path):
    line = encode_domain(vqvae2, apples, tmp_path / "out", options())
    assert line == f"{tmp_path / 'out'}: 8 images of apple x 1 view as codes, autoencoder {vqvae2.fingerprint()}"
    latents = LatentSet.open(tmp_path / "out", autoencoder_fingerprint=vqvae2.fingerprint())
    assert latents.kind == "codes" and {field.dtype for field in latents.fields.values()} == {torch.uint8}
    assert latents.keys == [apples.key(i) for i in range(8)]
    for sample in range(8):
        assert latents.json(sample) == apples.json(sample)
        expected = vqvae2.encode_codes(image(apples, sample))
        for name, values in latents.take([sample]).items():
            assert torch.equal(values, expected[name])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_latents_are_those_of_each_image(flat, apples, tmp_path, dtype, tolerance):
    encode_domain(flat, apples, tmp_path / "out", options(dtype=dtype, flip=True))
    latents = LatentSet.open(tmp_path / "out", autoencoder_fingerprint=flat.fingerprint())
    assert latents.kind == "latents" and latents.fields["latent"].dtype == getattr(torch, dtype)
    assert latents.meta["dtype"] == dtype
    for sample in range(8):
        plain = image(apples, sample)
        rows = latents.take([2 * sample, 2 * sample + 1])["latent"]
        expected = flat.encode(torch.cat([plain, plain.flip(-1)]))
        torch.testing.assert_close(rows, expected, rtol=tolerance, atol=tolerance)


def test_views(vqvae2, apples, tmp_path):
    encode_domain(vqvae2, apples, tmp_path / "out", options(flip=True, crops=2, seed=5), domain="fruit")
    latents = LatentSet.open(tmp_path / "out")
    assert latents.meta["views"] == ["", "flip", "crop0", "crop1"] and latents.meta["crop_seed"] == 5
    assert (latents.meta["domain"], latents.meta["split"], latents.meta["images"]) == ("fruit", "test", 8)
    assert len(latents) == 32
    for sample in range(8):
        key, pixels = apples.key(sample), apples.pixels(sample)
        assert latents.keys[4 * sample : 4 * sample + 4] == [key, f"{key}-flip", f"{key}-crop0", f"{key}-crop1"]
        crops = [random_crop(pixels, 5, f"crop{i}", sample) for i in range(2)]
        expected = vqvae2.encode_codes(to_images(torch.stack([pixels, pixels.flip(-1), *crops])))
        for name, values in latents.take(range(4 * sample, 4 * sample + 4)).items():
            assert torch.equal(values, expected[name])
        assert latents.json(4 * sample + 3) == apples.json(sample)


def test_random_crops():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(3, 64, 64).contiguous()  # grows to the right
    widths, heights, mirrored = [], [], 0
    for sample in range(60):
        crop = random_crop(ramp, 0, "crop0", sample)
        assert crop.shape == ramp.shape and crop.dtype == torch.uint8
        assert torch.equal(crop, random_crop(ramp, 0, "crop0", sample))
        row = crop[0, 32].float()
        mirrored += bool(row[0] > row[-1])
        widths.append(float((row[-8] - row[8]).abs() / 4 / 48))  # source pixels a pixel
        column = random_crop(ramp.mT.contiguous(), 0, "crop0", sample)[0, :, 32].float()
        heights.append(float((column[-8] - column[8]) / 4 / 48))
    assert 15 < mirrored < 45
    # Sides are the root of the area, times or over the root of the aspect ratio.
    assert 0.8**0.5 * 0.9**0.5 - 0.03 < min(widths) < 0.9 and 0.97 < max(widths) < 1.03
    ratios = [w / h for w, h in zip(widths, heights, strict=True)]
    assert 0.85 < min(ratios) < 0.95 and 1.05 < max(ratios) < 1.15
    assert not torch.equal(random_crop(ramp, 0, "crop0", 1), random_crop(ramp, 0, "crop1", 1))
    assert not torch.equal(random_crop(ramp, 0, "crop0", 1), random_crop(ramp, 1, "crop0", 1))


def test_crops_are_the_same_whatever_the_batch(vqvae2, apples, tmp_path):
    for name, batch, workers in (("a", 1, 0), ("b", 5, 0), ("c", 8, 1)):
        encode_domain(vqvae2, apples, tmp_path / name, options(crops=2, batch=batch, workers=workers))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    encode_domain(vqvae2, apples, tmp_path / "d", options(crops=2, seed=1))
    plain, seeded = (LatentSet.open(tmp_path / name).take(range(24)) for name in "ad")
    same = (plain["bottom"] == seeded["bottom"]).flatten(1).all(1).view(8, 3)
    assert same[:, 0].all() and not same[:, 1:].all()


class Interrupted(VQVAE2):
    """Stops as Ctrl-C would, in the batch after the next `left`."""

    left = 0

    def encode_codes(self, images):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().encode_codes(images)


@pytest.mark.parametrize("left", [1, 5, 7])
def test_an_interrupted_encoding_continues(vqvae2, apples, tmp_path, left):
    small = options(flip=True, crops=1, shard_bytes=24_000, batch=3)
    encode_domain(vqvae2, apples, tmp_path / "whole", small)
    assert len(list((tmp_path / "whole").glob("*.tar"))) > 4
    broken = Interrupted(vqvae2.config)
    broken.load_state_dict(vqvae2.state_dict())
    broken.eval().left = left  # of the nine calls, three a batch
    with pytest.raises(KeyboardInterrupt):
        encode_domain(broken, apples, tmp_path / "out", small)
    assert (tmp_path / "out" / JOURNAL_NAME).exists()
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert (len(shards) > 0) == (left > 3)
    encode_domain(vqvae2, apples, tmp_path / "out", small)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in shards.items())


def test_what_was_begun_by_another_autoencoder_is_not_continued(vqvae2, apples, tmp_path):
    small = options(shard_bytes=10_240)
    broken = Interrupted(vqvae2.config)  # with other weights
    broken.eval().left = 2
    with pytest.raises(KeyboardInterrupt):
        encode_domain(broken, apples, tmp_path / "out", small)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"begun with other settings[^\n]*\nautoencoder_fingerprint: "):
        encode_domain(vqvae2, apples, tmp_path / "out", small)
    assert contents(tmp_path / "out") == before


def test_finished_is_recognised_by_all_that_decides_the_result(flat, apples, fruit_shards, tmp_path):
    encode_domain(flat, apples, tmp_path / "out", options(crops=1))
    before = contents(tmp_path / "out")
    assert "already encoded" in encode_domain(flat, apples, tmp_path / "out", options(crops=1, batch=7))

    def differing(autoencoder=flat, dataset=apples, domain=None, **changed):
        with pytest.raises(UserError, match="holds other latents than asked for") as error:
            encode_domain(autoencoder, dataset, tmp_path / "out", options(**{"crops": 1, **changed}), domain=domain)
        return [line.partition(":")[0] for line in str(error.value).splitlines()[1:]]

    other = Flat(32)
    assert differing(other) == ["autoencoder_fingerprint"]
    assert differing(dtype="float16") == ["dtype"]
    assert differing(seed=1) == ["crop_seed"]
    assert differing(crops=2) == ["views"]
    assert differing(domain="fruit") == ["domain"]
    assert differing(dataset=ShardDataset([fruit_shards / "orange/test"])) == ["domain", "image_shards"]
    assert contents(tmp_path / "out") == before


def test_several_folders_are_one_domain(flat, fruit_shards, tmp_path):
    both = ShardDataset([fruit_shards / "apple/test", fruit_shards / "apple/train"])
    encode_domain(flat, both, tmp_path / "out", options(flip=True))
    latents = LatentSet.open(tmp_path / "out")
    assert len(latents) == 64 and latents.keys[62] == both.key(31)
    torch.testing.assert_close(latents.take([62])["latent"], flat.encode(image(both, 31)))
    assert Index.read(tmp_path / "out").meta["images"] == 32


# Memory


def test_another_number_at_once_continues_an_interrupted_encoding(vqvae2, apples, tmp_path):
    small = options(flip=True, shard_bytes=24_000)
    encode_domain(vqvae2, apples, tmp_path / "whole", small)
    broken = Interrupted(vqvae2.config)
    broken.load_state_dict(vqvae2.state_dict())
    broken.eval().left = 4
    with pytest.raises(KeyboardInterrupt):
        encode_domain(broken, apples, tmp_path / "out", small)
    lines = []
    encode_domain(vqvae2, apples, tmp_path / "out", replace(small, batch=5), budget=64 * GIB, say=lines.append)
    assert "5 images at once" in lines[0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_budget_decides_how_many_at_once(flat, apples, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "cost_of", lambda work, _: peak_bytes(work))
    monkeypatch.setattr(memory, "_status", lambda _: 0)
    calls, encode = [], Flat.encode

    def counted(self, images):
        calls.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Flat, "encode", counted)
    lines = []
    encode_domain(flat, apples, tmp_path / "few", options(batch=8), budget=150_000, say=lines.append)
    (line,) = lines
    at_once = int(re.search(r"(\d+) images at once", line).group(1))
    assert 1 < at_once < 8 and calls[-2:] == [at_once, 8 % at_once or at_once]
    encode_domain(flat, apples, tmp_path / "all", options(batch=8))
    few, whole = (LatentSet.open(tmp_path / name).take(range(8))["latent"] for name in ("few", "all"))
    torch.testing.assert_close(few, whole)
    with pytest.raises(UserError, match="one image at a time takes about"):
        encode_domain(flat, apples, tmp_path / "none", options(), budget=20_000)
    assert not (tmp_path / "none").exists()
    lines.clear()
    assert "nothing to do" in encode_domain(flat, apples, tmp_path / "all", options(), budget=1, say=lines.append)
    assert not lines


def test_precision_is_part_of_what_was_encoded(flat, apples, tmp_path):
    encode_domain(flat, apples, tmp_path / "fp32", options())
    encode_domain(flat, apples, tmp_path / "bf16", options(precision="bf16"))
    low, full = (LatentSet.open(tmp_path / name).take(range(8))["latent"] for name in ("bf16", "fp32"))
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)
    assert "precision" not in Index.read(tmp_path / "fp32").meta
    assert "already encoded" in encode_domain(flat, apples, tmp_path / "bf16", options(precision="bf16"))
    for folder, other in (("fp32", "bf16"), ("bf16", "fp32")):
        with pytest.raises(UserError, match=r"holds other latents than asked for[^\n]*\nprecision: "):
            encode_domain(flat, apples, tmp_path / folder, options(precision=other))
