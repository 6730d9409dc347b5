"""Tables of the paper: what is printed, what is measured and how, what is not measured twice."""

import functools
import json
import shutil

import pytest
from programs import ROOT, run

from letit_dist.config import load_config, parse_config
from letit_dist.energy.translate import open_translator
from letit_dist.errors import UserError
from letit_dist.evaluation import paper_tables
from letit_dist.evaluation.extractors import open_extractor
from letit_dist.evaluation.paper_tables import CellConfig, TablesConfig, going, open_runs, shards_of, training_days
from letit_dist.evaluation.protocols import load_protocol
from letit_dist.pretrained import find_folder

CONFIGS = ROOT / "configs/eval"
TABLES = """
source: a paper
tables:
  table3:
    title: FID
    columns:
      fruit: {measure: fid, data: fruit, domains: [apple, orange], protocol: tiny}
      other: {measure: fid, data: other, domains: [cat, dog], protocol: tiny}
    published:
      theirs: [1.5, null]
  table5:
    title: one direction
    note: a note
    columns:
      KID: {measure: kid, data: fruit, pair: [apple, orange], protocol: tiny, scale: 100}
      days: {measure: days, pair: [apple, orange]}
      GB: {measure: memory, pair: [apple, orange]}
    published:
      theirs: [4.42, 0.1, 1.24]
  table6:
    title: sizes
    columns:
      M: {measure: parameters}
      days: {measure: days_of_both}
    published:
      theirs: ["17 + 1.4", 3]
"""
PROTOCOL = """
name: tiny
reference_split: test
source_split: test
outputs: 3
resize: 32
extractor: compat
metrics: [fid, kid]
kid: {subsets: 3, subset_size: 4}
minimum_source: 8
minimum_reference: 8
aggregation: a
checkpoint: the last
comparable_with: nothing
not_comparable: everything
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.yaml").write_text(PROTOCOL)
    (tmp_path / "configs/tables.yaml").write_text(TABLES)
    return tmp_path / "configs/tables.yaml"


@pytest.fixture
def shallow(monkeypatch):
    pytest.importorskip("torch_fidelity")
    # The first layers of the network alone: all of it takes minutes here.
    monkeypatch.setattr(paper_tables, "open_extractor", functools.partial(open_extractor, layer="64"))


def call(name, chain, config, out, *options):
    given = ("--data", chain.root, "--tables", config, "--out", out, *options)
    done = run("eval/paper.py", name, *given)
    assert done.code == 0, done.err
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}, done.out


# The shipped file


def test_the_shipped_tables():
    tables = load_config(TablesConfig, CONFIGS / "paper_tables.yaml").tables
    assert list(tables) == ["table3", "table5", "table6"]
    for table in tables.values():
        assert all(len(cells) == len(table.columns) for cells in table.published.values())
        for cell in table.columns.values():
            if cell.protocol:
                assert cell.measure in load_protocol(cell.protocol, CONFIGS).metrics and cell.data and cell.pairs
    assert tables["table3"].published["LETIT (paper)"] == (12.5, 15.9)
    assert len(tables["table3"].columns["AFHQ"].pairs) == 6
    names = (ROOT / "docs/data.md").read_text()
    assert all(f"data/{c.data} " in names for t in tables.values() for c in t.columns.values() if c.data)


@pytest.mark.parametrize("name", ["table3", "table5", "table6"])
def test_without_a_run_everything_of_ours_is_not_yet_measured(name, tmp_path):
    done = run("eval/paper.py", name, "--out", tmp_path)
    table = load_config(TablesConfig, CONFIGS / "paper_tables.yaml").tables[name]
    ours = next(line for line in done.out.splitlines() if line.startswith("| latent energy"))
    assert done.code == 0 and ours.count("not yet measured") == len(table.columns)
    for method, cells in table.published.items():
        line = next(line for line in done.out.splitlines() if line.startswith(f"| {method} "))
        assert all(f"| {cell:g} " in line for cell in cells if isinstance(cell, float))


# Measuring


def test_a_direction_is_measured_as_fidelity_does(chain, config, shallow, tmp_path, monkeypatch):
    rows, said = call("table3", chain, config, tmp_path / "out", "--run", chain.energy(), "--random-weights")
    given = ("--source", chain.images("apple", "test"), "--resize", 32, "--layer", 64, "--metrics", "fid")
    done = run("eval/fidelity.py", f"run:{chain.energy()}", chain.images("orange", "test"), *given,
               "--random-weights", "--out", tmp_path / "fidelity")  # fmt: skip
    expected = json.loads(done.out.splitlines()[0])["value"]
    assert rows["theirs"]["fruit"] == "1.5" and rows["theirs"]["other"] == "-"
    assert rows["latent energy"]["fruit"] == f"{expected:.4g} (1 of 2 pairs, not valid)"
    assert rows["latent energy"]["other"] == "not yet measured"
    assert "its chain has no noise, one output a source instead of 3 equal ones" in said
    [first, _] = [json.loads(line) for line in (tmp_path / "out/table3.jsonl").read_text().splitlines()]
    assert (
        first["value"] == pytest.approx(expected)
        and first["valid"] is False
        and first["pairs"] == [["apple", "orange"]]
    )
    record = [json.loads(line) for line in (tmp_path / "out/measured.jsonl").read_text().splitlines()]
    assert [row["metric"] for row in record] == ["fid", "fid_equal_n"] and record[0]["protocol"] == "tiny"
    assert record[0]["comparable_with"] == "nothing: the network's weights are random or unverified"
    assert not list((tmp_path / "out").glob(".features*"))
    # The other direction is added, the first one is not measured again.
    seen = []
    gather = paper_tables.gather_features
    monkeypatch.setattr(
        paper_tables, "gather_features", lambda s, *a, **k: (seen.append(s.label), gather(s, *a, **k))[1]
    )
    both = ("--run", chain.energy(), chain.energy("orange", "apple"), "--random-weights")
    rows, _ = call("table3", chain, config, tmp_path / "out", *both)
    assert seen == [f"run:{chain.energy('orange', 'apple')}", str(chain.images("apple", "test"))]
    [first, _] = [json.loads(line) for line in (tmp_path / "out/table3.jsonl").read_text().splitlines()]
    record = [json.loads(line) for line in (tmp_path / "out/measured.jsonl").read_text().splitlines()]
    values = [row["value"] for row in record if row["metric"] == "fid"]
    assert len(values) == 2 and first["value"] == pytest.approx(sum(values) / 2)
    assert rows["latent energy"]["fruit"] == f"{first['value']:.4g} (not valid)"
    call("table3", chain, config, tmp_path / "out", *both)
    assert len(seen) == 2


def test_kid_days_and_memory(chain, config, shallow, tmp_path):
    rows, said = call("table5", chain, config, tmp_path / "out", "--run", chain.energy(), "--random-weights")
    record = [json.loads(line) for line in (tmp_path / "out/measured.jsonl").read_text().splitlines()]
    kid = next(row["value"] for row in record if row["metric"] == "kid")
    assert rows["latent energy"]["KID"] == f"{100 * kid:.4g} (not valid)" and "a note" in said.splitlines()
    assert rows["latent energy"]["days"] == f"{training_days(chain.energy()):.4g}"
    translator = open_translator(chain.energy())
    held = sum(p.numel() * 4 for n in (translator.autoencoder, translator.energy) for p in n.parameters()) / 1e9
    assert held < float(rows["latent energy"]["GB"]) < 0.1
    other = call("table5", chain, config, tmp_path / "two", "--run", chain.energy("orange", "apple"))
    assert set(list(other[0]["latent energy"].values())[2:]) == {"not yet measured"}
    assert "goes from orange to apple, which is no part of table5" in other[1]


def test_sizes_are_counted(chain, config, tmp_path):
    rows, _ = call("table6", chain, config, tmp_path / "out", "--run", chain.energy())
    translator = open_translator(chain.energy())
    counts = [sum(p.numel() for p in n.parameters()) / 1e6 for n in (translator.autoencoder, translator.energy)]
    ours = rows["latent energy: apple2orange"]
    assert ours["M"] == "{:.3g} + {:.3g}".format(*counts) and rows["theirs"]["M"] == "17 + 1.4"
    assert ours["days"] == " + ".join(f"{training_days(folder):.2g}" for folder in (chain.autoencoder, chain.energy()))


def test_days_are_those_of_the_rates(tmp_path):
    assert training_days(tmp_path) is None
    lines = [{"images_seen": 1000, "images_per_second": 10}, {"images_seen": 3000, "images_per_second": 40}]
    (tmp_path / "stats.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"images_seen": 50')
    assert training_days(tmp_path) == pytest.approx((100 + 50) / 86_400)


def test_an_energy_from_anywhere_serves_every_pair(chain, tmp_path):
    [forth] = open_runs([str(chain.energy())]).values()
    assert (
        going({(None, "dog"): forth}, ("cat", "dog")) is forth and going({(None, "dog"): forth}, ("dog", "cat")) is None
    )
    assert going({("cat", "dog"): forth}, ("wild", "dog")) is None


def test_bad_input(chain, config, shallow, tmp_path):
    shutil.copytree(chain.energy(), tmp_path / "twin")
    with pytest.raises(UserError, match=r"twin and .*apple2orange both go from apple to orange: name one"):
        open_runs([str(chain.energy()), str(tmp_path / "twin")])
    missing = r"no shards in .*fruit/apple/val: docs/data\.md has the command that packs fruit"
    with pytest.raises(UserError, match=missing):
        shards_of(tmp_path, "fruit", "apple", "val")
    assert shards_of(chain.root, "fruit", "apple", "val") == chain.images("apple", "test")
    base = ("eval/paper.py", "table3", "--tables", config, "--out", tmp_path / "out", "--run", chain.energy())
    for given, message in (
        ((), "--data is needed"),
        (("--data", tmp_path), "no shards in"),
        (("--data", chain.root, "--weights", tmp_path), "weights-inception-2015-12-05-6726825d.pth is needed"),
        (("--data", chain.root, "--batch", 0), "--batch must be at least 1"),
    ):
        done = run(*base, *given)
        assert done.code == 2 and message in done.err, (message, done.err)
    (config.parent / "tiny.yaml").write_text(PROTOCOL.replace("minimum_source: 8", "minimum_source: 9"))
    done = run(*base, "--data", chain.root, "--random-weights")
    assert done.code == 2 and "protocol tiny: found 8 source images, it needs 9" in done.err
    (tmp_path / "out/measured.jsonl").write_text("{")
    (config.parent / "tiny.yaml").write_text(PROTOCOL)
    done = run(*base, "--data", chain.root, "--random-weights")
    assert done.code == 2 and "measured.jsonl is damaged" in done.err


def test_a_cell_says_what_it_lacks_to_be_measured():
    with pytest.raises(UserError, match=r"^measure fid needs data and protocol$"):
        parse_config(CellConfig, {"measure": "fid"})
    with pytest.raises(UserError, match=r"^measure kid needs protocol$"):
        parse_config(CellConfig, {"measure": "kid", "data": "fruit"})
    assert parse_config(CellConfig, {"measure": "days"}).data is None


def test_table8_prints_the_sweep(chain, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copytree(find_folder(chain.autoencoder), tmp_path / "runs/c32d8")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"config: x.yaml\nrun: {tmp_path}/runs/c{{codes}}d{{code_dim}}\ncodes: [32, 64]\ncode_dim: [8]\n")
    shards = chain.images("apple", "test")
    done = run("eval/paper.py", "table8", "--data", shards, "--sweep", sweep, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    [cell] = [json.loads(line) for line in (tmp_path / "out/table8.jsonl").read_text().splitlines()]
    assert f"{cell['mse']:.4g}" in done.out and "not yet measured:" in done.out and "autoencoder.codes=64" in done.out


def test_a_changed_protocol_is_measured_again(chain, config, shallow, tmp_path):
    """What stands in the record was measured with the old subsets."""
    pytest.importorskip("torch_fidelity")
    given = ("table5", chain, config, tmp_path / "out", "--run", chain.energy(), "--random-weights")

    def record():
        lines = (tmp_path / "out/measured.jsonl").read_text().splitlines()
        return [(row["subset_size"], row["value"]) for row in map(json.loads, lines) if row["metric"] == "kid"]

    call(*given)
    (config.parent / "tiny.yaml").write_text(PROTOCOL.replace("subset_size: 4", "subset_size: 8"))
    rows, _ = call(*given)
    assert [size for size, _ in record()] == [4, 8]
    # Hundred times the plain one, by the `scale` of the cell.
    assert rows["latent energy"]["KID"] == f"{100 * record()[1][1]:.4g} (not valid)"
    before = record()
    call(*given)
    assert record() == before
