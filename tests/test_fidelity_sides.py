"""What the two sides of eval/fidelity.py state of themselves: splits, stored ones too."""

import json

import pytest
from programs import ROOT, _program, run

from letit_dist.evaluation.protocols import load_protocol

TINY = """
name: tiny
reference_split: test
source_split: test
outputs: 1
resize: null
extractor: compat
metrics: [fid]
minimum_source: 8
minimum_reference: 8
aggregation: one
checkpoint: the last
comparable_with: a table
not_comparable: the rest
"""
FAST = ("--random-weights", "--layer", "64", "--metrics", "fid")


@pytest.fixture
def protocols(tmp_path, monkeypatch):
    """A folder of protocols with `tiny`, in place of configs/eval."""
    folder = tmp_path / "protocols"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(_program("eval/fidelity.py"), "PROTOCOLS", folder)
    return folder


# Splits


def test_a_stored_reference_of_the_wrong_split_is_refused_as_its_shards_are(protocols, fruit_shards, tmp_path):
    pytest.importorskip("torch_fidelity")
    a, train, stored = fruit_shards / "apple/test", fruit_shards / "orange/train", tmp_path / "ref"
    made = run("eval/fidelity.py", a, train, *FAST, "--reference", stored, "--out", tmp_path / "o")
    assert made.code == 0, made.err
    assert all(json.loads(line)["splits"] == ["test", "train"] for line in made.out.splitlines())
    for b in (train, f"stored:{stored}"):
        done = run("eval/fidelity.py", a, b, "--protocol", "tiny", "--random-weights", "--out", tmp_path / "p")
        assert done.code == 2, (b, done.out)
        assert "protocol tiny: the reference images are the train split, it takes test" in done.err


def test_a_row_says_which_split_nobody_stated():
    clean = load_protocol("clean", ROOT / "configs/eval")

    def condition(*splits):
        row = clean.annotate({"metric": "fid", "valid": True, "splits": splits})
        return row["comparable_with"].removesuffix(clean.comparable_with)

    assert condition("test", "val") == ""
    assert condition("test", None) == "if the real images are the test split, which nothing here states: "
    assert condition(None, "test") == "if the source images are the test split, which nothing here states: "
    both = "if the source images are the test split and the real images are the test split, which nothing here states: "
    assert condition(None, None) == both
