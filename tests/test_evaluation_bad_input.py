"""Mistakes in what the programs of eval/ are given: one line that says what to change, and code 2."""

import hashlib
import json
from dataclasses import replace

import pytest
from programs import ROOT, run

from letit_dist.errors import UserError
from letit_dist.evaluation.fidelity import FidelityOptions
from letit_dist.evaluation.paper_tables import Job
from letit_dist.evaluation.protocols import load_protocol
from letit_dist.evaluation.run_folder import read_run
from letit_dist.evaluation.run_page import run_page
from letit_dist.evaluation.weights import FILES


def refused(*command):
    """The one line."""
    done = run(*command)
    assert done.code == 2 and "Traceback" not in done.err, (command, done.err)
    [line] = done.errors
    return line


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_weights_are_imported_into_a_folder(place, tmp_path, monkeypatch):
    data = b"the weights of a network"
    digest = hashlib.sha256(data).hexdigest()
    monkeypatch.setitem(FILES, "inception", replace(FILES["inception"], sha256=digest[:8]))
    (tmp_path / "file").write_bytes(b"here before")
    (tmp_path / "good.pth").write_bytes(data)
    folder = tmp_path / place
    line = refused("eval/weights.py", "import", tmp_path / "good.pth", "--weights", folder)
    assert f"cannot write to {folder}: " in line and line.endswith("; name another --weights")
    assert (tmp_path / "file").read_bytes() == b"here before"


def test_seeds_are_checked_before_the_work(fruit_shards, tmp_path):
    given = (fruit_shards / "apple/test", fruit_shards / "orange/test", "--random-weights", "--metrics", "fid")
    line = refused("eval/fidelity.py", *given, "--seeds", -1, 3, 2**32, "--out", tmp_path / "o")
    assert line == "error: --seeds -1 4294967296: expected 0 .. 4294967295" and not (tmp_path / "o").exists()
    FidelityOptions(metrics=("fid",), seeds=(0, 2**32 - 1)).check(9, 9)


TABLES = """
source: a paper
tables:
  table6:
    title: sizes
    columns: {M: {measure: parameters}, days: {measure: days_of_both}}
    published: {theirs: ["17 + 1.4"], others: [1, 2]}
"""


def test_tables_that_lack_something(tmp_path):
    config = tmp_path / "tables.yaml"
    config.write_text(TABLES)
    given = ("--tables", config, "--out", tmp_path / "o")
    assert "2 columns, but of published 'theirs' has 1: write null" in refused("eval/paper.py", "table6", *given)
    config.write_text(TABLES.replace('["17 + 1.4"]', "[1, null]"))
    assert refused("eval/paper.py", "table3", *given) == f"error: {config} has no table3, it has table6"
    assert run("eval/paper.py", "table6", *given).code == 0


@pytest.mark.parametrize("text", ["{}", "[]", '{"identity": "a"}', "\u00ff"])
def test_a_record_of_something_else_is_damaged(text, tmp_path):
    job = Job(data=None, out=tmp_path, protocols=tmp_path, weights=tmp_path)
    good = json.dumps({"identity": "a", "headline": True, "value": 1.0, "valid": True, "protocol": "tiny"})
    job.record.write_text(good + "\n")
    assert [row["value"] for row in job.measured()] == [1.0]
    job.record.write_bytes((good + "\n" + text).encode("latin-1"))
    with pytest.raises(UserError, match=r"measured\.jsonl is damaged: remove it"):
        job.measured()


def test_a_configuration_that_is_none(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_bytes(b"\x89PNG\r\n\xff\xfe")
    line = refused("eval/report.py", tmp_path, "--out", tmp_path / "r.html")
    assert line == f"error: {config} is not UTF-8 text: it is damaged, or no configuration"
    (tmp_path / "stats.jsonl").write_text('{"images_seen": 5, "loss": 1.0}\n')
    for text, title in (
        ("training: 3\nrecipe: [1]\nautoencoder: 7\n", "stage 1: unknown recipe at ? pixels"),
        ("autoencoder: runs/a\ndata: here\nrecipe: x\n", "stage 2: energy, several domains (unknown recipe)"),
    ):
        config.write_text(text)
        assert f"<p>{title}</p>" in run_page(read_run(tmp_path))


def test_results_that_are_not_valid_say_why(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    row = {"metric": "fd_dinov2", "value": 1.5, "valid": False, "weights": "unverified 1234"}
    (tmp_path / "fidelity.jsonl").write_text(json.dumps(row) + "\n")
    assert "Not valid: measured with random or unverified weights." in run_page(read_run(tmp_path))


# Protocols


def test_a_protocol_of_several_outputs_needs_a_run(fruit_shards, tmp_path):
    given = (fruit_shards / "apple/test", fruit_shards / "orange/train", "--out", tmp_path / "o")
    line = refused("eval/fidelity.py", *given, "--random-weights", "--protocol", "stargan2")
    assert line == "error: protocol stargan2 takes 10 translations of each source: A must be run:RUN"


@pytest.mark.parametrize("name", ["paper_tables", "table8", "nothing", "../eval/cut"])
def test_other_files_of_the_folder_are_no_protocols(name):
    known = "clean, cut, egsde, letit-kid, stargan2, unsb"
    with pytest.raises(UserError, match=f"^no protocol '{name}', known: {known}$"):
        load_protocol(name, ROOT / "configs/eval")
