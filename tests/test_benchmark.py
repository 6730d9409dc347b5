"""How two formulations are timed: the harness on fake clocks, and its report."""

import gc
import re
from datetime import date

import pytest
import torch

from letit_dist.errors import UserError
from letit_dist.evaluation.benchmark import (
    Match,
    Report,
    Result,
    Side,
    clock,
    interleave,
    machine,
    measure,
    memory,
    operations,
    peak_rate,
    quartiles,
)

# The harness


def test_pairs_are_taken_in_turns_after_a_warm_up():
    calls = []
    durations = iter([3.0, 1.0, 4.0, 2.0, 10.0, 4.0])

    def seconds(function):
        function()
        return next(durations)

    pairs = interleave(lambda: calls.append("n"), lambda: calls.append("o"), repeats=3, warmup=2, seconds=seconds)
    assert "".join(calls) == "nono" + "nonono"
    assert pairs == ((3.0, 1.0), (4.0, 2.0), (10.0, 4.0))
    result = Result("x", pairs, (3 << 20, 1 << 19), "equal")
    assert result.ratios == [3.0, 2.0, 2.5] and result.quartiles == (2.25, 2.5, 2.75)
    row = result.row()
    assert row["naive / ours"] == "2.50 (2.25 to 2.75)" and row["pairs"] == 3
    assert (row["naive, s"], row["ours, s"], row["naive, MiB"], row["ours, MiB"]) == ("4", "2", "3.0", "0.5")
    assert Result("x", pairs, None, "equal").row()["ours, MiB"] is None


def test_the_collector_is_off_while_the_clock_runs():
    seen = []

    def seconds(function):
        seen.append(gc.isenabled())
        return 1.0

    assert gc.isenabled()
    interleave(int, int, repeats=1, warmup=0, seconds=seconds)
    assert seen == [False, False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave(lambda: 1 / 0, int, repeats=1, warmup=0, seconds=clock("cpu"))
    assert gc.isenabled()


def test_one_pair_has_no_spread():
    assert quartiles([1.5]) == (1.5, 1.5, 1.5)


def test_the_clock_measures_seconds():
    assert 0 <= clock("cpu")(lambda: sum(range(1000))) < 60


def test_memory_is_what_is_held_and_what_a_run_adds():
    weight = torch.zeros(1000)
    state = {"left": torch.zeros(5000)}

    def work():
        first = torch.zeros(2000)
        second = first + 1
        del first
        state["left"] = second[:10]

    side = Side(work, lambda: [weight, weight[:5], torch.zeros(0)], state.clear)
    assert memory(side, "cpu") == 4 * (1000 + 2000 + 2000)


def test_operations_are_counted_by_hand():
    images, kernel, columns = torch.randn(2, 3, 16, 16), torch.nn.Conv2d(3, 8, 3, padding=1), torch.randn(5, 7)
    convolution = 2 * (2 * 16 * 16) * 8 * (3 * 9)
    assert operations(lambda: kernel(images)) == convolution
    assert operations(lambda: torch.randn(4, 5) @ columns + 1) == 2 * 4 * 5 * 7
    images.requires_grad_()
    # Forward, and backward to the images and to the weights.
    assert operations(lambda: kernel(images).sum().backward()) == 3 * convolution

    def penalty():
        (gradient,) = torch.autograd.grad(kernel(images).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()

    assert operations(penalty) >= 4 * convolution
    compiled = torch.compile(lambda: kernel(images.detach()), backend="eager")
    compiled()
    assert operations(compiled) == convolution


def test_operations_a_second_and_the_share_of_the_peak():
    result = Result("x", ((3.0, 2.0),), None, "equal", images=4, operations=8 * 10**9, peak=1e12)
    row = result.row()
    assert (row["GFLOP an image"], row["ours, GFLOP/s"], row["of the peak"]) == ("2", "4", "0.4%")
    row = Result("x", ((3.0, 2.0),), None, "equal", operations=8 * 10**9).row()
    assert (row["GFLOP an iteration"], row["of the peak"]) == ("8", None)
    assert "ours, GFLOP/s" not in Result("x", ((3.0, 2.0),), None, "equal").row()
    assert peak_rate("cpu") is None


def test_the_peak_goes_by_the_name(monkeypatch):
    for name, rate in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_rate("cuda") == rate


def test_nothing_is_timed_where_the_results_differ():
    ran = []
    side = Side(lambda: ran.append(1))

    def disagree():
        raise UserError("the two sides disagree")

    with pytest.raises(UserError, match="disagree"):
        measure(Match("x", side, side, disagree), device="cpu", repeats=1)
    assert not ran
    result = measure(Match("x", side, side, lambda: "equal"), device="cpu", repeats=3, warmup=2)
    assert len(ran) == 2 * (2 + 3 + 1) and len(result.seconds) == 3
    assert result.agreement == "equal" and result.memory == (0, 0)
    assert measure(Match("x", side, side, str), device="cpu", repeats=1, with_memory=False).memory is None


# The report


def report(**changes) -> Report:
    facts = {"title": "Throughput: x", "command": "python eval/throughput.py x", "commit": "abc", "machine": "a lathe"}
    facts |= {"results": [Result("64 pixels", ((2.0, 1.0),), (1 << 20, 1 << 20), "equal")], "day": date(2026, 11, 21)}
    return Report(**{**facts, **changes})


def test_a_report_says_what_where_and_how(tmp_path):
    path = report(settings={"sizes": [1, 2], "bf16": False, "fast": True, "batch": 1}).write(tmp_path / "new", "x")
    assert path == tmp_path / "new" / "2026-11-21-x.md"
    text = path.read_text()
    for line in ("# Throughput: x", "python eval/throughput.py x", "- date: 2026-11-21", "- commit: abc"):
        assert line in text.splitlines()
    for line in ("- machine: a lathe", f"- torch: {torch.__version__}", "- sizes: 1 2", "- bf16: no", "- fast: yes"):
        assert line in text.splitlines()
    assert "- batch: 1" in text.splitlines()
    assert re.search(r"\| 64 pixels +\| 2 +\| 1 +\| 2.00 \(2.00 to 2.00\) \| 1 ", text)


def test_reports_of_a_day_stand_side_by_side(tmp_path):
    names = [report(commit=str(i)).write(tmp_path, "x").name for i in range(3)]
    assert names == ["2026-11-21-x.md", "2026-11-21-x-2.md", "2026-11-21-x-3.md"]
    assert "- commit: 0" in (tmp_path / names[0]).read_text()


def test_a_file_is_no_folder_for_reports(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        report().write(tmp_path / "file", "x")


def test_the_machine_in_words():
    assert re.search(r".+, \d+ cores, \d+ torch threads?$", machine("cpu"))
