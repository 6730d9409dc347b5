"""Named protocols: those that are shipped, what they ask for, and what their results may be compared with."""

import pytest
from programs import ROOT, run

from letit_dist.errors import UserError
from letit_dist.evaluation.protocols import load_protocol

pytest.importorskip("torch_fidelity")


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
