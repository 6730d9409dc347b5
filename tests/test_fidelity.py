"""FID, KID and their like against closed forms and torch-fidelity itself; ranks, batches, resuming, bad input."""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, files, run, shared_chain

from letit_dist.energy.translate import open_translator
from letit_dist.errors import UserError
from letit_dist.evaluation import extractors, features
from letit_dist.evaluation.extractors import open_extractor
from letit_dist.evaluation.features import (
    SLICE,
    Features,
    assemble,
    extract_share,
    gather_features,
    reuse,
    stamp_of,
    store,
)
from letit_dist.evaluation.fidelity import FidelityOptions, draw_equal, fid, kid, measure
from letit_dist.evaluation.frechet import frechet_distance
from letit_dist.evaluation.image_distances import faithfulness
from letit_dist.evaluation.image_sets import TranslatedImages, open_image_set
from letit_dist.evaluation.protocols import load_protocol
from letit_dist.evaluation.weights import FILES

pytest.importorskip("torch_fidelity")
STAMP = {"extractor": "x", "layer": "3", "resize": "none", "weights": "w", "valid": True, "kind": "features"}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_with(mean, covariance, count, seed=0):
    """(count, D) float64 with exactly this mean and unbiased covariance."""
    x = draw(count, len(mean), seed=seed).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.t() @ x / (count - 1))).t()
    return x @ torch.linalg.cholesky(covariance).t() + mean


# The Frechet distance


def test_gaussians_that_commute():
    """With covariances of the same axes it is |m|^2 + |sqrt(C_a) - sqrt(C_b)|^2."""
    turn = torch.linalg.qr(draw(5, 5).double()).Q
    first, second = torch.tensor([1.0, 4.0, 9.0, 0.25, 2.0]).double(), torch.tensor([4.0, 1.0, 1.0, 1.0, 3.0]).double()
    means = draw(2, 5, seed=1).double()
    sides = [
        rows_with(mean, turn @ torch.diag(scale) @ turn.t(), count, seed)
        for seed, (mean, scale, count) in enumerate(zip(means, (first, second), (9, 20), strict=True))
    ]
    expected = (means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(*sides) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(*sides[::-1]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [(20, 15), (20, 90), (90, 20), (90, 80)])
def test_few_and_many_rows_equal_torch_fidelity(a, b):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    mix = draw(40, 40, seed=9)
    x, y = (draw(a, 40, seed=1) @ mix).relu(), (draw(b, 40, seed=2) @ mix * 1.2).relu()
    statistics = [fid_features_to_statistics(side) for side in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert fid(x, y) == pytest.approx(expected, rel=1e-6)


def test_few_rows_are_fast():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = draw(60, 700), draw(50, 700, seed=1) + 0.1

    def slow():
        return fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)

    def seconds(run):
        begun = time.process_time()
        run()
        return time.process_time() - begun

    frechet_distance(x, y)
    ratio = seconds(slow) / max(min(seconds(lambda: frechet_distance(x, y)) for _ in range(3)), 1e-9)
    assert ratio > 10
    assert frechet_distance(x, y) == pytest.approx(slow()["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("count", [30, 200])
def test_a_set_is_at_no_distance_from_itself(count):
    x = draw(count, 64).relu()
    assert abs(fid(x, x)) < 1e-3 and abs(frechet_distance(x, x)) < 1e-9
    assert abs(fid(x, x.flip(0))) < 1e-3


def test_frechet_refuses():
    with pytest.raises(UserError, match="3 dimensions on one side, 4 on the other"):
        frechet_distance(draw(5, 3), draw(5, 4))
    with pytest.raises(UserError, match="2 samples a side, got 1 and 5"):
        frechet_distance(draw(1, 3), draw(5, 3))


# Rows


def features_of(values, data="d", **stamp):
    return Features({"features": values}, {**STAMP, "data": data, "count": len(values), **stamp})


def by_metric(rows):
    return {row["metric"]: row for row in rows}


OPTIONS = FidelityOptions(metrics=("fid", "kid", "prc"), kid_subset_size=10, kid_subsets=5)


def test_rows_say_what_they_are():
    a, b = draw(40, 3), draw(25, 3, seed=1) + 1
    found = by_metric(measure(features_of(a, "a"), features_of(b, "b", valid=False), OPTIONS, snapshot={"images": 5}))
    assert list(found) == ["fid", "fid_equal_n", "kid", "kid_equal_n", "precision", "recall"]
    for row in found.values():
        assert row["snapshot"] == {"images": 5} and row["valid"] is False and row["data"] == ["a", "b"]
        assert row["weights"] == "w" and row["resize"] == "none" and row["seconds"] >= 0
    assert found["fid"]["value"] == fid(a, b) and found["fid"]["counts"] == [40, 25]
    assert found["kid"]["value"] == kid(a, b, subsets=5, subset_size=10, seed=2020)[0]
    assert found["fid_equal_n"]["counts"] == [25, 25] and found["fid_equal_n"]["seeds"] == [0, 1, 2, 3, 4]


def test_equal_counts_give_mean_and_spread_and_never_the_best():
    a, b = draw(60, 3), draw(25, 3, seed=1) + 1
    row = by_metric(measure(features_of(a), features_of(b, "b"), OPTIONS))["fid_equal_n"]
    values = torch.tensor([fid(draw_equal(a, 25, seed, "a"), b) for seed in range(5)], dtype=torch.float64)
    assert row["value"] == pytest.approx(float(values.mean()), rel=1e-9)
    assert row["spread"] == pytest.approx(float(values.std()), rel=1e-9) and row["spread"] > 0
    assert row["value"] > values.min()
    drawn = draw_equal(a, 25, 0, "a")
    assert len({tuple(r.tolist()) for r in drawn}) == 25 and torch.equal(draw_equal(b, 25, 3, "b"), b)
    # Of all images on both sides there is one draw, and no spread.
    row = by_metric(measure(features_of(a[:25]), features_of(b, "b"), OPTIONS))["fid_equal_n"]
    assert row["seeds"] == [0] and row["spread"] == 0 and row["value"] == fid(a[:25], b)


def test_fid_of_more_images_is_smaller_and_equal_counts_say_so():
    """Why both are given: the bias of the FID falls with the count."""
    a, b = draw(400, 20), draw(30, 20, seed=1)
    found = by_metric(measure(features_of(a), features_of(b, "b"), OPTIONS))
    assert found["fid"]["value"] < found["fid_equal_n"]["value"]


def test_numbers_beside_the_source_become_rows():
    values = draw(30, 3)
    tensors = {"features": values, "column l2_to_source": torch.arange(30.0), "column ssim_to_source": torch.ones(30)}
    a = Features(tensors, {**STAMP, "data": "a", "count": 30, "valid": False})
    rows = by_metric(measure(a, features_of(draw(30, 3, seed=1), valid=False), replace(OPTIONS, metrics=("fid",))))
    assert rows["l2_to_source"]["value"] == 14.5 and rows["ssim_to_source"]["value"] == 1
    # No network took part in these.
    assert rows["l2_to_source"]["valid"] is True and rows["fid"]["valid"] is False and "psnr_to_source" not in rows


def test_counts_that_are_too_small_are_named_before_the_work():
    with pytest.raises(UserError) as error:
        FidelityOptions(metrics=("fid", "kid", "prc", "isc"), neighbours=9).check(9, 7)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("found 9 and 7 images: KID needs --kid-subset-size <= 7, got 1000")
    assert "precision and recall need more than 9" in lines[1] and "the first needs 10" in lines[2]
    for given in ({"equal_n": 8}, {"equal_n": 1}):
        with pytest.raises(UserError, match=r"--equal-n must lie in 2 \.\. 7, got"):
            FidelityOptions(metrics=("fid",), **given).check(9, 7)
    with pytest.raises(UserError, match="got 1"):
        FidelityOptions(metrics=("fid",)).check(1, 9)


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(UserError, match="cannot be compared, weights: w and v"):
        list(measure(features_of(draw(30, 3)), features_of(draw(30, 3), weights="v"), OPTIONS))


# Extractors


@pytest.fixture(scope="session")
def small():
    """The first layers of the Inception with random weights."""
    return open_extractor("compat", folder=Path("/nowhere"), layer="64", random_weights=True)


@pytest.fixture(scope="session")
def inception_file(small, tmp_path_factory):
    """A file in the published one's format, random inside."""
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    state = small.network.state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches_tracked" not in name}, path)
    return path


@pytest.fixture
def known(inception_file, tmp_path, monkeypatch):
    """A weights folder in which that file is the right one."""
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    file = replace(FILES["inception"], sha256=digest[:8], address=f"https://example.org/net-{digest[:8]}.pth")
    monkeypatch.setitem(FILES, "inception", file)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / file.name).symlink_to(inception_file)
    return tmp_path / "weights"


def noise(count, side=32, seed=0):
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_random_weights_discriminate_and_say_that_they_are_not_valid(small):
    assert small.stamp["valid"] is False and small.stamp["weights"].startswith("random ")
    smooth = torch.nn.functional.avg_pool2d(noise(16, 64).float(), 4).round().to(torch.uint8)
    a, b, other = (small(p)["features"] for p in (smooth, smooth.flip(-1), noise(16, 16, 1)))
    assert frechet_distance(a, other) > 20 * frechet_distance(a, b) > 0


def test_random_weights_touch_no_other_randomness():
    before = torch.get_rng_state()
    one = open_extractor("compat", folder=Path("/nowhere"), layer="64", random_weights=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    two = open_extractor("compat", folder=Path("/nowhere"), layer="64", random_weights=True)
    assert one.stamp == two.stamp


def test_weights_from_a_file(small, known):
    loaded = open_extractor("compat", folder=known, layer="64")
    digest = hashlib.sha256(next(known.iterdir()).read_bytes()).hexdigest()
    assert loaded.stamp["valid"] is True and loaded.stamp["weights"] == digest[:16]
    assert torch.equal(loaded(noise(2))["features"], small(noise(2))["features"])


def test_weights_that_cannot_be_used(tmp_path, small, monkeypatch):
    with pytest.raises(UserError, match=r"fetch https://github\.com/toshas"):
        open_extractor("compat", folder=tmp_path)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"weights of another network: fc\.weight: expected shape \(1008, 2048\)"):
        extractors.load_network(small.network, tmp_path / "x.pth")
    with pytest.raises(UserError, match="extractor 'x', known: compat, clean"):
        open_extractor("x", folder=tmp_path)
    with pytest.raises(UserError, match="layer '64', the extractor torchvision has 2048"):
        open_extractor("torchvision", folder=tmp_path, layer="64", random_weights=True)
    with pytest.raises(UserError, match="Inception score needs"):
        open_extractor("torchvision", folder=tmp_path, logits=True, random_weights=True)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="pip install"):
        open_extractor("compat", folder=tmp_path)


def with_kind(extractor, kind):
    return extractors.Extractor(kind, extractor.network, extractor.stamp)


def test_every_resize_leaves_299_pixels_alone(small):
    """What reaches the network is then the same up to its range."""
    pixels = noise(1, 299)
    seen = []
    hook = small.network.Conv2d_1a_3x3.conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        for kind in ("compat", "clean", "pytorch-fid"):
            with_kind(small, kind)(pixels)
    finally:
        hook.remove()
    assert torch.equal(seen[0], (pixels.float() - 128) / 128)
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[2], pixels.float() / 127.5 - 1, atol=1e-5, rtol=0)
    assert len(small.network.Conv2d_1a_3x3._forward_pre_hooks) == 0


def test_clean_is_pillows_bicubic_of_every_channel_in_float():
    pixels = noise(2, 40)
    found = extractors._clean(pixels) * 128 + 128
    plane = Image.fromarray(pixels[1, 2].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(found[1, 2].numpy(), np.asarray(plane).clip(0, 255), atol=1e-4)
    assert found.min() >= 0 and found.max() <= 255 and (found != found.round()).any()


def test_only_clean_is_antialiased():
    """Stripes at a third of the size: a filter makes them grey, sampling keeps one of the colours."""
    stripes = torch.zeros(1, 3, 897, 897, dtype=torch.uint8)
    stripes[..., ::3] = 255
    inner = (..., slice(10, -10), slice(10, -10))
    clean = extractors._clean(stripes)[inner] * 128 + 128
    plain = (extractors._plain(stripes)[inner] + 1) * 127.5
    assert clean.std() < 1 and float(clean.mean()) == pytest.approx(85, abs=1)
    assert float(plain.mean()) < 1


def test_torchvisions_network_gives_what_its_last_layer_gets():
    extractor = open_extractor("torchvision", folder=Path("/nowhere"), random_weights=True)
    pixels = noise(2, 299)
    found = extractor(pixels)["features"]
    assert found.shape == (2, 2048) and extractor.stamp["extractor"] == "inception-torchvision"
    with torch.no_grad():
        torch.testing.assert_close(extractor.network.fc(found), extractor.network(extractors._imagenet(pixels)))
    grey = torch.full((1, 3, 299, 299), 124, dtype=torch.uint8)
    assert float(extractors._imagenet(grey)[0, 0].mean()) == pytest.approx((124 / 255 - 0.485) / 0.229, abs=1e-6)


# Against torch-fidelity itself


def pictures(folder, count, seed=0, side=32, shift=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(noise(count, side // 4, seed)):
        image = (image.float() * 0.7 + shift).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR).save(folder / f"{number:03d}.png")
    return folder


def theirs(a, b, weights, layer, **metrics):
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=str(a),
        input2=str(b),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        **{f"feature_layer_{metric}": layer for metric in ("fid", "kid", "prc")},
        cuda=False,
        batch_size=16,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
        **metrics,
    )


def test_equal_to_torch_fidelity(known, tmp_path):
    a, b = pictures(tmp_path / "a", 20), pictures(tmp_path / "b", 18, seed=1, shift=40)
    weights = next(known.iterdir())
    expected = theirs(a, b, weights, "64", fid=True, kid=True, prc=True, kid_subset_size=12, kid_subsets=10)
    command = ("eval/fidelity.py", a, b, "--out", tmp_path / "out", "--weights", known, "--layer", "64")
    command += ("--metrics", "fid", "kid", "prc", "--kid-subset-size", 12, "--kid-subsets", 10)
    done = run(*command)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out/fidelity.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in done.out.splitlines()] == rows
    found = by_metric(rows)
    assert found["fid"]["value"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert found["kid"]["value"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert found["kid"]["spread_of_subsets"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)
    assert found["precision"]["value"] == expected["precision"] and found["recall"]["value"] == expected["recall"]
    assert all(row["valid"] for row in rows) and "notice" not in done.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fidelity.jsonl"]


@pytest.mark.full
def test_the_whole_network_equals_torch_fidelity(known, tmp_path):
    a, b = pictures(tmp_path / "a", 20), pictures(tmp_path / "b", 18, seed=1, shift=40)
    weights = next(known.iterdir())
    expected = theirs(a, b, weights, "2048", fid=True, kid=True, isc=True, kid_subset_size=12, kid_subsets=10)
    command = ("eval/fidelity.py", a, b, "--out", tmp_path / "out", "--weights", known)
    done = run(*command, "--metrics", "fid", "kid", "isc", "--kid-subset-size", 12, "--kid-subsets", 10)
    found = by_metric(map(json.loads, done.out.splitlines()))
    assert found["fid"]["value"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert found["kid"]["value"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert found["inception_score"]["value"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)


# Ranks, resuming, storing


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_image_set(pictures(tmp_path_factory.mktemp("images") / "a", 2 * SLICE + 3))


@pytest.fixture(scope="module")
def whole(images, small):
    return assemble([extract_share(images, small)], stamp_of(images, small))


def test_any_number_of_ranks_gives_the_same_bits(images, small, whole):
    shares = [extract_share(images, small, rank=rank, world=2) for rank in range(2)]
    assert [sorted(share) for share in shares] == [[0, 2], [1]]
    assert torch.equal(assemble(shares[::-1], whole.stamp).values, whole.values)
    assert len(whole) == 2 * SLICE + 3
    # The last slice was filled up, and nothing of that is left: an image alone has the same features.
    last = small(images.read([len(images) - 1])[0])["features"]
    torch.testing.assert_close(whole.values[-1:], last)


def test_a_rank_that_fails_tells_the_others(images, small, tmp_path):
    class Broken:
        label, stamp, split = "x", "y", None

        def __len__(self):
            return 4

        def read(self, rows):
            raise UserError("picture 3 is broken")

    with pytest.raises(UserError, match=r"^picture 3 is broken$"):
        gather_features(Broken(), small, lambda mine: [{}, mine, mine])


def test_resumes_where_it_stopped(images, small, whole, tmp_path):
    class Interrupted(type(images)):
        def __init__(self, stop):
            self.__dict__ |= images.__dict__
            self.stop, self.asked = stop, []

        def read(self, rows):
            if rows[0] // SLICE == self.stop:
                raise KeyboardInterrupt
            self.asked.append(rows[0] // SLICE)
            return super().read(rows)

    keep = features.working_folder(tmp_path, whole.stamp)
    with pytest.raises(KeyboardInterrupt):
        extract_share(Interrupted(1), small, keep=keep)
    assert [p.name for p in keep.iterdir()] == ["000000.safetensors"]
    again = Interrupted(None)
    found = assemble([extract_share(again, small, keep=keep)], whole.stamp)
    assert again.asked == [1, 2] and torch.equal(found.values, whole.values)
    # One that a kill cut short is made again, and so are those of other data, which have another folder.
    (keep / "000001.safetensors").write_bytes((keep / "000001.safetensors").read_bytes()[:50])
    repaired = Interrupted(None)
    found = assemble([extract_share(repaired, small, keep=keep)], whole.stamp)
    assert repaired.asked == [1] and torch.equal(found.values, whole.values)
    assert features.working_folder(tmp_path, {**whole.stamp, "data": "other"}) != keep


def test_stored_features_are_used_when_they_match_and_refused_otherwise(whole, tmp_path):
    assert reuse(tmp_path / "ref", whole.stamp) is None
    store(whole, tmp_path / "ref")
    assert torch.equal(reuse(tmp_path / "ref", whole.stamp).values, whole.values)
    for name in ("weights", "data", "layer", "resize"):
        with pytest.raises(UserError, match=f"stored features differ, {name}: .* -> 'other'"):
            reuse(tmp_path / "ref", {**whole.stamp, name: "other"})
    config = tmp_path / "ref/config.json"
    config.write_text(config.read_text().replace(whole.stamp["data"], "0123"))
    with pytest.raises(UserError, match="one of the two files was edited"):
        reuse(tmp_path / "ref", whole.stamp)


def command(*more, layer="64"):
    return [*map(str, more), "--random-weights", "--layer", layer, "--metrics", "fid", "kid", "--kid-subset-size", "8"]


def test_the_program_on_two_ranks_and_with_a_stored_reference(fruit_shards, tmp_path):
    a, b = fruit_shards / "apple/train", fruit_shards / "orange/train"
    alone = run("eval/fidelity.py", *command(a, b, "--out", tmp_path / "1", "--reference", tmp_path / "ref"))
    assert alone.code == 0, alone.err
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2.yaml"]
    two = subprocess.run(
        [*start, "eval/fidelity.py", *command(a, b, "--out", tmp_path / "2")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert two.returncode == 0, two.stderr[-3000:]

    def values(out):
        rows = [json.loads(line) for line in (tmp_path / out / "fidelity.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]

    assert values("1") == values("2") and not any(row["valid"] for row in values("1"))
    kept = files(tmp_path / "ref")
    again = run("eval/fidelity.py", *command(a, b, "--out", tmp_path / "3", "--reference", tmp_path / "ref"))
    assert again.code == 0 and "those of" in again.err and files(tmp_path / "ref") == kept
    assert values("3") == values("1")
    other = run("eval/fidelity.py", *command(a, a, "--out", tmp_path / "4", "--reference", tmp_path / "ref"))
    assert other.code == 2 and "stored features differ, data" in other.err
    stored = run("eval/fidelity.py", *command(a, f"stored:{tmp_path / 'ref'}", "--out", tmp_path / "5"))
    assert stored.code == 0 and [r["value"] for r in values("5")] == [r["value"] for r in values("1")]


def test_both_sides_the_same(fruit_shards, tmp_path):
    a = fruit_shards / "apple/test"
    done = run("eval/fidelity.py", *command(a, a, "--out", tmp_path / "o"))
    assert done.code == 0 and "notice: both sides hold the same images" in done.err
    assert abs(by_metric(map(json.loads, done.out.splitlines()))["fid"]["value"]) < 1e-3


# Images


def test_sets_of_images_and_their_stamps(fruit_shards, tmp_path):
    shards = open_image_set(fruit_shards / "apple/test")
    assert len(shards) == 8 and shards.split == "test"
    folder = tmp_path / "f"
    folder.mkdir()
    for row, image in enumerate(shards.read(range(8))[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{row}.png")
    copied = open_image_set(folder)
    assert torch.equal(copied.read([3, 1])[0], shards.read([3, 1])[0]) and copied.stamp != shards.stamp
    stamp = copied.stamp
    (folder / "7.png").rename(folder / "6b.png")
    assert open_image_set(folder).stamp != stamp
    resized = open_image_set(folder, 20).read([0])[0][0]
    expected = Image.open(folder / "0.png").resize((20, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(resized.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_images_that_cannot_be_compared(tmp_path, fruit_shards, fruit_latents):
    folder = pictures(tmp_path / "mixed", 3)
    pictures(tmp_path / "mixed/more", 1, side=16)
    with pytest.raises(UserError, match=r"000\.png is 16x16, others in .*mixed are 32x32: give one --resize"):
        open_image_set(folder).read([0])
    assert open_image_set(folder, 24).read(range(4))[0].shape == (4, 3, 24, 24)
    (tmp_path / "empty").mkdir()
    for path, words in (
        ("empty", "no images below this folder"),
        ("nowhere", "no such folder"),
        ("mixed/000.png", "is a file"),
    ):
        with pytest.raises(UserError, match=words):
            open_image_set(tmp_path / path)
    with pytest.raises(UserError, match="holds codes, not images"):
        open_image_set(fruit_latents / "apple")
    (folder / "more/000.png").write_bytes((folder / "000.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"more/000\.png"):
        images = open_image_set(folder)
        images.read(range(len(images)))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return shared_chain(tmp_path_factory)


def test_an_energy_translates_on_the_fly(chain, tmp_path):
    """The same pixels as those that launch/translate.py writes, whatever the batch, and a result that names the run."""
    source = chain.images("apple", "test")
    done = run("launch/translate.py", source, "--energy", chain.energy(), "--out", tmp_path / "written")
    assert done.code == 0
    written = open_image_set(tmp_path / "written")
    translator = open_translator(chain.energy())
    sets = [TranslatedImages(translator, open_image_set(source), batch=batch) for batch in (16, 3)]
    pixels = [s.read(range(8))[0].int() for s in sets]
    for found in pixels:
        assert (found - written.read(range(8))[0]).abs().max() <= 1
    assert sets[0].stamp == sets[1].stamp
    target = chain.images("orange", "test")
    before = files(chain.energy())
    given = command(f"run:{chain.energy()}", target, "--source", source, "--out", tmp_path / "o")
    done = run("eval/fidelity.py", *given)
    assert done.code == 0, done.err
    row = json.loads(done.out.splitlines()[0])
    assert row["snapshot"]["images_seen"] == 256 and row["snapshot"]["energy"] == translator.energy.fingerprint()
    assert row["snapshot"]["run"] == str(chain.energy()) and row["counts"] == [8, 8]
    assert files(chain.energy()) == before


def test_several_outputs_need_noise(chain):
    source = open_image_set(chain.images("apple", "test"))
    translator = open_translator(chain.energy())
    config = translator.sampler.config
    noisy = type(translator.sampler)(config.model_copy(update={"noise_scale": 0.5}))
    quiet = type(translator.sampler)(config.model_copy(update={"noise_scale": 0.0}))
    translator.sampler = noisy
    both = TranslatedImages(translator, source, outputs=2, beside=faithfulness)
    pixels, columns = both.read([0, 8])
    assert len(both) == 16 and not torch.equal(pixels[0], pixels[1])
    difference = (pixels[0].double() - source.read([0])[0][0].double()) / 255
    assert float(columns["l2_to_source"][0]) == pytest.approx(float(difference.square().sum().sqrt()), rel=1e-9)
    translator.sampler = quiet
    if not translator.autoencoder.decodes_with_noise:
        with pytest.raises(UserError, match="2 outputs a source: this energy's chain has no noise"):
            TranslatedImages(translator, source, outputs=2)


# Protocols


@pytest.mark.parametrize("name", ["stargan2", "cut", "letit-kid", "egsde", "unsb", "clean"])
def test_shipped_protocols(name):
    protocol = load_protocol(name, ROOT / "configs/eval")
    assert protocol.name == name
    enough = {"sources": 10**6, "outputs": protocol.outputs, "reference": 10**6}
    protocol.check(**enough, splits=(protocol.source_split, protocol.reference_split))
    protocol.check(**enough, splits=(None, None))
    with pytest.raises(UserError) as error:
        protocol.check(sources=7, outputs=99, reference=6, splits=("train", None))
    text = str(error.value)
    assert f"found 7 source images, it needs {protocol.minimum_source}" in text
    assert f"found 6 reference images, it needs {protocol.minimum_reference}" in text
    assert "found 99 outputs" in text and "the source images are the train split, it takes test" in text
    wrong = "test" if protocol.reference_split == "train" else "train"
    with pytest.raises(UserError, match=f"the reference images are the {wrong} split"):
        protocol.check(**enough, splits=(None, wrong))


def test_a_protocols_result_says_what_it_is_comparable_with():
    clean = load_protocol("clean", ROOT / "configs/eval")
    row = clean.annotate({"metric": "fid", "value": 1.0, "valid": True})
    assert row["protocol"] == "clean" and "clean-fid" in row["comparable_with"] and row["headline"] is False
    assert clean.annotate({"metric": "fid_equal_n", "valid": True})["headline"] is True
    random = clean.annotate({"metric": "fid", "valid": False})
    assert random["comparable_with"] == "nothing: the network's weights are random or unverified"


def test_protocols_on_the_command_line(fruit_shards, tmp_path):
    a, b = fruit_shards / "apple/test", fruit_shards / "orange/test"
    given = ("eval/fidelity.py", a, b, "--out", tmp_path / "o", "--random-weights", "--protocol")
    few = run(*given, "cut")
    assert few.code == 2 and "protocol cut: found 8 source images, it needs 120" in few.err
    clash = run(*given, "cut", "--extractor", "clean")
    assert clash.code == 2 and "--extractor clean: protocol cut has pytorch-fid" in clash.err
    unknown = run(*given, "cat")
    assert unknown.code == 2 and "known: clean, cut, egsde, letit-kid, stargan2, unsb" in unknown.err
    assert not (tmp_path / "o").exists()


def test_bad_command_lines(fruit_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("LETIT_WEIGHTS", str(tmp_path / "none"))
    a, b, out = fruit_shards / "apple/test", fruit_shards / "orange/test", ("--out", tmp_path / "o")
    cases = (
        ((a, b, *out), "KID needs --kid-subset-size <= 8, got 1000"),
        ((a, b, *out, "--metrics", "fid"), f"is not in {tmp_path / 'none'}: fetch https://"),
        ((a, b, *out, "--source", a), "need A to be run:RUN"),
        (("run:x", b, *out), "name the images that it translates with --source"),
        (("run:x", b, *out, "--source", a), "no such energy: x"),
        ((a, tmp_path / "nowhere", *out), "no such folder"),
        ((a, f"stored:{a}", *out), "no config.json"),
    )
    for given, words in cases:
        done = run("eval/fidelity.py", *given)
        assert done.code == 2 and words in done.err and "Traceback" not in done.err, (given, done.err)
    assert not (tmp_path / "o").exists()
