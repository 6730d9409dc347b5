"""TensorBoard and Weights & Biases beside stats.jsonl, which is always written."""

import importlib.util
import json
import shutil

import pytest
from programs import STYLES, run

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
needs_tensorboard = pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")


def train(chain, folder, *more):
    """The chain's energy training in a folder of its own."""
    command = list(chain.train_energy(*STYLES))
    command[command.index("--run") + 1] = folder
    return run(*command, *more)


def stats(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def events(folder):
    """{name: {step: value}} of all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard/letit_dist"))
    found.Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def same(found, lines):
    for line in lines:
        for name, value in line.items():
            assert found[name][line["images_seen"]] == pytest.approx(value, rel=1e-6), (name, line["images_seen"])
    assert all(set(steps) == {line["images_seen"] for line in lines} for steps in found.values())


@needs_tensorboard
def test_event_files_hold_the_numbers_of_stats(chain, tmp_path):
    done = train(chain, tmp_path / "run", "training.trackers=[tensorboard]")
    assert done.code == 0, done.err
    lines = stats(tmp_path / "run")
    assert len(lines) == 2 and "loss" in lines[0]
    same(events(tmp_path / "run"), lines)


@needs_tensorboard
def test_what_was_written_past_the_checkpoint_is_hidden_on_resume(chain, tmp_path):
    # Neither the trackers nor how often they are told change a result, so the run is the same one.
    train(chain, tmp_path / "run", "training.trackers=[tensorboard]", "intervals.report=32")
    assert [line["images_seen"] for line in stats(tmp_path / "run")][-3:] == [192, 224, 256]
    for name in ("export", "checkpoints/images-000000000256"):
        shutil.rmtree(tmp_path / "run" / name)
    done = train(chain, tmp_path / "run", "training.trackers=[tensorboard]")
    assert done.code == 0 and "resumed at 128" in done.out, done.err
    assert [line["images_seen"] for line in stats(tmp_path / "run")] == [32, 64, 96, 128, 256]
    same(events(tmp_path / "run"), stats(tmp_path / "run"))


def test_off_by_default(chain):
    assert (chain.energy() / "stats.jsonl").is_file() and not (chain.energy() / "tensorboard").exists()


def test_unknown_and_missing_trackers(chain, tmp_path):
    done = train(chain, tmp_path / "run", "training.trackers=[tensorbord]")
    assert done.code == 2 and "training.trackers" in done.err and "tensorboard" in done.err
    if importlib.util.find_spec("wandb") is None:
        done = train(chain, tmp_path / "run", "training.trackers=[wandb]")
        assert done.code == 2
        assert done.errors == ["error: training.trackers: wandb not installed: pip install wandb"]
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_without_a_network(chain, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = train(chain, tmp_path / "run", "training.trackers=[wandb]")
    assert done.code == 0, done.err
    lines = stats(tmp_path / "run")
    assert len(lines) == 2 and "loss" in lines[0]
    (log,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    found = history(log)
    assert {name for steps in found.values() for name in steps} >= set(lines[0])
    for line in lines:
        sent = {name: value for name, value in found[line["images_seen"]].items() if not name.startswith("_")}
        assert sent == pytest.approx(line, rel=1e-6)


def records(data):
    """Those of a file in LevelDB's log format, after its head of seven bytes: parts of records in blocks of 32 KiB,
    each with a checksum (4 bytes), its length (2) and what it is (1): all, the first, a middle or the last part."""
    at, held = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):
            yield held
            held = b""


def history(log):
    """{step: {name: value}} of what a run without a network has written down to be sent."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for packed in records(log.read_bytes()):
        record = Record.FromString(packed)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            found[values["_step"]] = values
    return found
