import json
import os
import platform
import runpy
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT, stats_of

from letit_dist.config import parse_config
from letit_dist.errors import UserError
from letit_dist.schemas import PretrainConfig, TrainingConfig
from letit_dist.training import run
from letit_dist.training.feeds import ImageFeed
from letit_dist.training.run import environment, open_run


def config(**changes):
    tree = {
        "autoencoder": {"kind": "vqvae2", "resolution": 32, "channels": 8, "code_dim": 4, "codes": 16},
        "recipe": {"kind": "vqvae2", "optimizer": {"learning_rate": 1e-5, "eps": 1e-8}},
        "data": {"train": ["shards/a"]},
        "training": {"images": 10**7, "batch": 8},
        "intervals": {"report": 8, "samples": 80, "checkpoint": 80},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    return parse_config(PretrainConfig, tree)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_folder_says_what_runs_and_where(tmp_path):
    open_run(tmp_path / "a/b", config())
    folder = tmp_path / "a/b"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml", "environment.json"]
    assert parse_config(PretrainConfig, yaml.safe_load((folder / "config.yaml").read_text())) == config()
    found = json.loads((folder / "environment.json").read_text())
    assert found["torch"] == torch.__version__ and found["python"] == platform.python_version()
    assert found["ranks"] == 1 and found["accelerate"] and "commit" in found
    assert set(found) == set(environment())


def test_the_same_configuration_is_welcome_again(tmp_path):
    open_run(tmp_path, config())
    (tmp_path / "stats.jsonl").write_text("{}\n")
    open_run(tmp_path, config())
    assert (tmp_path / "stats.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    "change",
    [
        {"data__workers": 7},
        {"training__microbatch": 4},
        {"intervals": {"report": 1, "samples": 2, "checkpoint": 3, "keep": 4}},
    ],
    ids=str,
)
def test_what_changes_no_result_may_change(tmp_path, change):
    open_run(tmp_path, config())
    open_run(tmp_path, config(**change))
    assert parse_config(PretrainConfig, yaml.safe_load((tmp_path / "config.yaml").read_text())) == config(**change)


def test_another_configuration_is_refused_with_all_differences_and_touches_nothing(tmp_path):
    open_run(tmp_path, config())
    before = contents(tmp_path)
    other = config(
        recipe__optimizer={"learning_rate": 2e-5}, training__batch=16, data__train=["shards/b"], data__workers=0
    )
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, other)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path} belongs to another configuration; name another folder with --run, or undo:"
    assert lines[1:] == [
        "  data.train: ['shards/a'] -> ['shards/b']",
        "  training.batch: 8 -> 16",
    ]
    assert contents(tmp_path) == before


def test_the_folder_of_something_else_is_refused_and_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(UserError, match=r"is not empty and is no run folder \(no config.yaml\)"):
        open_run(tmp_path, config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis.tex is a file, expected a run folder"):
        open_run(tmp_path / "thesis.tex", config())


def test_an_empty_folder_and_hidden_files_are_no_obstacle(tmp_path):
    (tmp_path / ".nfs0001").write_text("")
    open_run(tmp_path, config())
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("content", [b"", b"- a\n", b"a: [", b"\xff\xfe\xfa"], ids=["empty", "list", "broken", "bytes"])
def test_a_config_that_cannot_be_read_is_an_error_of_its_own(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config.yaml cannot be read: name another run folder"):
        open_run(tmp_path, config())
    assert (tmp_path / "config.yaml").read_bytes() == content


def test_a_folder_that_cannot_be_made_is_a_plain_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into the run folder .*file/run: .*/file is a file$"):
        open_run(tmp_path / "file/run", config())


@pytest.fixture
def program(fruit_shards, fresh_accelerate, tmp_path):
    """program(*overrides): launch/pretrain.py in this process, at toy size, into tmp_path/run."""
    tree = json.loads(config(data__train=[str(fruit_shards / "apple/train")]).model_dump_json())
    tree["training"]["images"], tree["data"]["workers"] = 24, 0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    main = runpy.run_path(os.fspath(ROOT / "launch/pretrain.py"))["main"]

    def run(*overrides):
        fresh_accelerate()
        return main([str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run"), *overrides])

    return run


def test_a_finished_run_holds_everything_and_is_left_alone(program, tmp_path, capsys):
    assert program() == 0
    run, end = tmp_path / "run", f"images-{24:012d}"
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    kept = {f"checkpoints/{end}/{name}" for name in
            ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")}  # fmt: skip
    assert found == kept | {
        ".lock",
        "config.yaml",
        "environment.json",
        "stats.jsonl",
        f"samples/images-{0:012d}.png",
        f"samples/{end}.png",
        f"export/{end}/config.json",
        f"export/{end}/model.safetensors",
        f"export/{end}/README.md",
    }
    assert [line["images_seen"] for line in stats_of(run)] == [8, 16, 24]
    assert capsys.readouterr().out.startswith("batch: 8 = 1 rank x 8 images x 1 accumulation\n")

    before = contents(run)
    assert program() == 0
    after = contents(run)
    assert {path.name for path in before if before[path] != after.get(path)} <= {"environment.json"}
    assert "complete: 24 of 24 images" in capsys.readouterr().out


def test_a_run_whose_loss_diverged_goes_on_with_a_lower_rate(program, tmp_path, capsys, monkeypatch):
    options = ("intervals.checkpoint=8", "recipe.optimizer.learning_rate=0.01")
    really = ImageFeed.batches

    def spoilt(feed, *place):
        for batch in really(feed, *place):
            yield replace(batch, data={"images": batch.data["images"] * (1 if batch.images_seen < 16 else torch.nan)})

    monkeypatch.setattr(ImageFeed, "batches", spoilt)
    assert program(*options) == 2
    said = "The same command with a lower recipe.optimizer.learning_rate goes on from there"
    assert said in capsys.readouterr().err
    run = tmp_path / "run"
    before = {path: data for path, data in contents(run).items() if "checkpoints" in path.parts}
    assert sorted({path.parent.name[-2:] for path in before}) == ["08", "16"]
    monkeypatch.undo()

    assert program(options[0], "recipe.optimizer.learning_rate=0.002") == 0
    assert before.items() <= contents(run).items()
    out = capsys.readouterr().out
    assert "recipe.optimizer.learning_rate: 0.01 -> 0.002 from 16 images on (noted in changes.jsonl)" in out
    assert [line["learning_rate"] for line in stats_of(run)] == [0.01, 0.01, 0.002]
    (line,) = map(json.loads, (run / "changes.jsonl").read_text().splitlines())
    key = "recipe.optimizer.learning_rate"
    assert line == {"images_seen": 16, "key": key, "before": 0.01, "after": 0.002}
    assert yaml.safe_load((run / "config.yaml").read_text())["recipe"]["optimizer"]["learning_rate"] == 0.002
    # It is at its end: another rate would change nothing in it.
    assert program(*options) == 2
    assert "learning_rate: 0.002 -> 0.01" in capsys.readouterr().err
    assert len((run / "changes.jsonl").read_text().splitlines()) == 1


def test_the_rates_of_all_levels_may_change_and_nothing_beside_them(tmp_path):
    def rates(*values, **others):
        return config(recipe__optimizer={"learning_rate": values, "eps": 1e-8, **others})

    assert open_run(tmp_path, rates(0.002, 0.001)) == []
    line = "recipe.optimizer.learning_rate: [0.002, 0.001] -> [0.001, 0.001] from 0 images on (noted in changes.jsonl)"
    assert open_run(tmp_path, rates(0.001, 0.001)) == [line]
    assert len(open_run(tmp_path, rates(0.003, 0.001))) == 1
    noted = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert [(one["before"], one["after"]) for one in noted] == [
        ([0.002, 0.001], [0.001, 0.001]),
        ([0.001, 0.001], [0.003, 0.001]),
    ]
    with pytest.raises(UserError, match=r"or undo:\n  recipe.optimizer.decay: None -> \[1, 2\]$"):
        open_run(tmp_path, rates(0.1, 0.1, decay=(1, 2)))


RATE = "recipe.optimizer.learning_rate"


def noted(folder):
    return [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]


def with_rate(rate):
    return config(recipe__optimizer={"learning_rate": rate, "eps": 1e-8})


@pytest.mark.parametrize(("rate", "lines"), [(0.002, 2), (0.001, 2), (0.01, 1)])
def test_a_change_is_noted_once_however_its_start_ends(tmp_path, monkeypatch, rate, lines):
    """Killed after the note and before the configuration: another start makes the change, another one, or none."""
    open_run(tmp_path, with_rate(0.1))
    open_run(tmp_path, with_rate(0.01))
    first = noted(tmp_path)
    really = run.write_atomically

    def killed(path, data):
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        really(path, data)

    monkeypatch.setattr(run, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        open_run(tmp_path, with_rate(0.002))
    assert noted(tmp_path)[1:] == [{"images_seen": 0, "key": RATE, "before": 0.01, "after": 0.002}]
    monkeypatch.undo()
    with (tmp_path / "changes.jsonl").open("a") as stream:
        stream.write('{"images_seen": 0, "ke')  # what an append that was killed would have left
    open_run(tmp_path, with_rate(rate))
    expected = [{"images_seen": 0, "key": RATE, "before": 0.01, "after": rate}]
    assert noted(tmp_path) == first + expected[: lines - 1]


def test_a_change_is_noted_from_where_the_run_goes_on(program, tmp_path, capsys):
    """The newest checkpoint is damaged, so it goes on from the one before, and was not at its end."""
    folder = tmp_path / "run"
    assert program("intervals.checkpoint=8") == 0
    damaged = folder / f"checkpoints/images-{24:012d}/model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (folder / "checkpoints/images-of mine").mkdir()
    changed = open_run(folder, parse_config(PretrainConfig, halved(folder)))
    assert changed == [f"{RATE}: 1e-05 -> 5e-06 from 16 images on (noted in changes.jsonl)"]
    assert damaged.read_bytes() == data


def halved(folder):
    """The configuration of a run, at half the rate."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["recipe"]["optimizer"]["learning_rate"] /= 2
    return tree


def test_an_export_that_was_lost_is_written_again(program, tmp_path):
    program()
    weights = tmp_path / "run/export" / f"images-{24:012d}/model.safetensors"
    before = weights.read_bytes()
    for path in weights.parent.iterdir():
        path.unlink()
    weights.parent.rmdir()
    assert program() == 0
    assert weights.read_bytes() == before


def test_the_program_refuses_another_configuration_in_the_same_folder(program, tmp_path, capsys):
    program("training.images=8")
    before = contents(tmp_path / "run")
    assert program("training.images=8", "training.seed=1") == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "error:   training.seed: 0 -> 1" and all(line.startswith("error: ") for line in err)
    assert contents(tmp_path / "run") == before


def test_check_runs_nothing(program, tmp_path, capsys):
    assert program("--check", "training.microbatch=2") == 0
    out = capsys.readouterr().out
    assert "# batch: 8 = 1 rank x 2 images x 4 accumulation" in out and "# steps: 3" in out
    assert not (tmp_path / "run").exists()


def test_images_of_another_size_are_refused_before_anything_is_written(program, tmp_path, capsys):
    assert program("autoencoder.resolution=64") == 2
    assert "data.train holds images of 32x32, autoencoder.resolution is 64" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_in_which_another_process_runs_is_refused(tmp_path):
    """Two runs in one folder would rewind each other's statistics and prune each other's checkpoints."""
    import subprocess
    import sys

    code = (
        "import fcntl, pathlib, sys; f = open(pathlib.Path(sys.argv[1]) / '.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    run = tmp_path / "run"
    run.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is running in"):
            open_run(run, TrainingConfig(images=8, batch=8))
        assert not (run / "config.yaml").exists()
    finally:
        other.communicate()
    open_run(run, TrainingConfig(images=8, batch=8))
    assert (run / "config.yaml").exists()
