import json

import pytest
import torch

from letit_dist.training.metrics import Means, StatsFile

CPU = torch.device("cpu")


def test_means_weigh_what_they_are_given():
    means = Means(CPU)
    means.add({"loss": torch.tensor(1.0), "only once": 5})
    means.add({"loss": torch.tensor(4.0, requires_grad=True)}, weight=3)
    assert means.means() == {"loss": 3.25, "only once": 5.0}
    means.clear()
    assert means.means() == {} and means.state() == {}


def test_sums_are_in_double_precision():
    means = Means(CPU)
    for _ in range(1000):
        means.add({"loss": torch.tensor(0.1)})
    assert means.means()["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-14)


def test_half_an_interval_saved_and_loaded_is_bit_equal():
    whole, first, second = Means(CPU), Means(CPU), Means(CPU)
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    for value in values:
        whole.add({"loss": value}, weight=3)
    for value in values[:7]:
        first.add({"loss": value}, weight=3)
    second.load(json.loads(json.dumps(first.state())))
    for value in values[7:]:
        second.add({"loss": value}, weight=3)
    assert second.means() == whole.means()


def test_names_that_come_in_several_groups():
    """Each has one sum, whichever names it comes with, also across a save."""
    groups = [("a", "b", "c"), ("b", "d"), ("c", "a"), ("e",)]
    generator = torch.Generator().manual_seed(0)
    added = [{name: torch.rand((), generator=generator) for name in groups[number % 4]} for number in range(40)]
    means, loaded = Means(CPU), Means(CPU)
    expected = {}
    for number, values in enumerate(added):
        if number in (3, 18):
            loaded.load(json.loads(json.dumps(means.state())))
            means, loaded = loaded, means
        means.add(values, weight=2)
        for name, value in values.items():
            total, count = expected.get(name, (0.0, 0.0))
            expected[name] = total + 2 * float(value), count + 2
    assert means.means() == {name: total / count for name, (total, count) in expected.items()}
    means.clear()
    means.add({"b": 1.0, "z": 2.0})
    assert means.means() == {"b": 1.0, "z": 2.0}


def test_lines_after_the_checkpoint_and_broken_ones_are_dropped(tmp_path):
    stats = StatsFile(tmp_path / "stats.jsonl")
    for images in (8, 16, 24):
        stats.append({"images_seen": images, "loss": 0.1})
    with stats.path.open("ab") as stream:
        stream.write(b'7\n"text"\n[1]\n{"loss": 1.0}\n{"images_seen": 8, "lo')
        stream.write(b"\x00\x00\xff")
    stats.rewind(16)
    stats.append({"images_seen": 20})
    assert [json.loads(line)["images_seen"] for line in stats.path.read_text().splitlines()] == [8, 16, 20]
    stats.rewind(0)
    assert stats.path.read_text() == "" and [path.name for path in tmp_path.iterdir()] == ["stats.jsonl"]


def test_nothing_to_rewind_is_nothing_to_do(tmp_path):
    StatsFile(tmp_path / "stats.jsonl").rewind(16)
    assert not list(tmp_path.iterdir())
