"""FID, KID and their like: what a row says, the numbers of torch-fidelity itself, and the program."""

import json
from dataclasses import replace

import pytest
import torch
from programs import files, run
from ranks import start
from small_inception import command, pictures

from letit_dist.errors import UserError
from letit_dist.evaluation.features import (
    Features,
)
from letit_dist.evaluation.fidelity import FidelityOptions, draw_equal, fid, kid, measure

pytest.importorskip("torch_fidelity")


STAMP = {"extractor": "x", "layer": "3", "resize": "none", "weights": "w", "valid": True, "kind": "features"}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


# Against torch-fidelity itself


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


def test_equal_to_torch_fidelity(known_weights, tmp_path):
    a, b = pictures(tmp_path / "a", 20), pictures(tmp_path / "b", 18, seed=1, shift=40)
    weights = next(known_weights.iterdir())
    expected = theirs(a, b, weights, "64", fid=True, kid=True, prc=True, kid_subset_size=12, kid_subsets=10)
    command = ("eval/fidelity.py", a, b, "--out", tmp_path / "out", "--weights", known_weights, "--layer", "64")
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
def test_the_whole_network_equals_torch_fidelity(known_weights, tmp_path):
    a, b = pictures(tmp_path / "a", 20), pictures(tmp_path / "b", 18, seed=1, shift=40)
    weights = next(known_weights.iterdir())
    expected = theirs(a, b, weights, "2048", fid=True, kid=True, isc=True, kid_subset_size=12, kid_subsets=10)
    command = ("eval/fidelity.py", a, b, "--out", tmp_path / "out", "--weights", known_weights)
    done = run(*command, "--metrics", "fid", "kid", "isc", "--kid-subset-size", 12, "--kid-subsets", 10)
    found = by_metric(map(json.loads, done.out.splitlines()))
    assert found["fid"]["value"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert found["kid"]["value"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert found["inception_score"]["value"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)


# The program


def test_the_program_on_two_ranks_and_with_a_stored_reference(fruit_shards, tmp_path):
    a, b = fruit_shards / "apple/train", fruit_shards / "orange/train"
    alone = run("eval/fidelity.py", *command(a, b, "--out", tmp_path / "1", "--reference", tmp_path / "ref"))
    assert alone.code == 0, alone.err
    two = start("eval/fidelity.py", *command(a, b, "--out", tmp_path / "2"))
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
