"""What the two sides of eval/fidelity.py state of themselves: splits, sizes, stored ones too."""

import json

import pytest
from PIL import Image
from programs import ROOT, _program, run, shared_chain

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


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return shared_chain(tmp_path_factory)


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


# Sizes


def pictures(folder, side, count=8):
    folder.mkdir()
    for number in range(count):
        Image.linear_gradient("L").rotate(11 * number).resize((side, side + 8)).save(folder / f"{number}.png")
    return folder


def test_sides_of_two_sizes_are_not_compared(fruit_shards, tmp_path):
    pytest.importorskip("torch_fidelity")
    small, large, stored = fruit_shards / "apple/test", pictures(tmp_path / "large", 64), tmp_path / "ref"
    out = ("--out", tmp_path / "o")
    both = run("eval/fidelity.py", small, large, *FAST, *out, "--resize", 24, "--reference", tmp_path / "ref24")
    assert both.code == 0, both.err
    assert run("eval/fidelity.py", large, large, *FAST, *out, "--reference", stored).code == 0
    for a, b in ((small, large), (large, small), (small, f"stored:{stored}")):
        done = run("eval/fidelity.py", a, b, *FAST, "--out", tmp_path / "p")
        assert done.code == 2, (a, b, done.out)
        sizes = ("32x32", "64x72") if a is small else ("64x72", "32x32")
        assert "images of {} and of {}: give one --resize for both".format(*sizes) in done.err
        assert not (tmp_path / "p").exists(), "nothing was made of images that cannot be compared"
    assert run("eval/fidelity.py", small, f"stored:{tmp_path / 'ref24'}", *FAST, *out, "--resize", 24).code == 0


def test_translations_are_of_the_autoencoders_size(chain):
    from letit_dist.energy.translate import open_translator
    from letit_dist.evaluation.image_sets import TranslatedImages, open_image_set

    source = open_image_set(chain.images("apple", "test"))
    for side, expected in ((None, (32, 32)), (24, (24, 24))):
        made = TranslatedImages(open_translator(chain.energy()), source, side=side)
        assert made.pixels == expected == tuple(made.read([0])[0].shape[2:])
