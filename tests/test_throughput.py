"""The published iteration against the trainer's; the harness on fake clocks; its report; eval/throughput.py."""

import argparse
import gc
import re
import sys
from datetime import date

import pytest
import torch
from programs import ROOT, run

from letit_dist.autoencoders.alae import ALAE, ALAEConfig
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

sys.path.insert(0, str(ROOT / "eval"))  # as Python does for a program there

from speed.alae_sides import AlaeSides, Tolerance
from speed.naive_alae import NaiveALAE
from speed.training_sides import Setting

THROUGHPUT = "eval/throughput.py"
TINY = (THROUGHPUT, "alae", "--width", "tiny", "--batch", 2, "--repeats", 2, "--threads", 1)


def small(resolution: int) -> ALAEConfig:
    return ALAEConfig(resolution=resolution, start_channels=4, max_channels=8, latent_dim=8, mapping_layers=2)


# The published iteration


@pytest.fixture
def sides(fresh_accelerate, tmp_path):
    def build(resolution: int = 16, precision: str = "fp32", **options) -> AlaeSides:
        fresh_accelerate()
        return AlaeSides(small(resolution), tmp_path, Setting(2, precision), **options)

    return build


@pytest.mark.parametrize("resolution", [16, 32, 128])  # 128: resampling inside strided convolutions
def test_an_iteration_is_the_published_one(sides, resolution):
    pair = sides(resolution, precision="fp64", eps=1e-30)
    for _ in range(2):  # the second one with second moments and averages of the first
        found = pair.compare(Tolerance())
        # Losses are taken in float32.
        assert found.found["loss"] < 1e-6 and found.found["gradient"] < 1e-10 and found.found["weight"] < 1e-7
        assert found.found["average"] < 1e-12
        assert found.weights > 3000 and found.exempt < 0.01 * found.weights


def test_an_iteration_is_the_published_one_in_float32_too(sides):
    """Gradients jump where an activation lies within rounding of LeakyReLU's kink: losses only."""
    infinity = float("inf")
    pair = sides(32)
    assert pair.compare(Tolerance(1e-3, infinity, infinity, infinity)).found["loss"] > 0


def test_eps_at_its_published_place_moves_only_weights_of_small_gradients(sides):
    found = sides(16, precision="fp64", eps=1e-8).compare(Tolerance(weight=0.5, floor=1e-6)).found
    assert found["gradient"] < 1e-10 and 1e-6 < found["weight"] < 0.1


def wrong_gamma(naive):
    naive.gamma *= 1.01


def wrong_blur(naive):
    naive.kernel = naive.kernel * 1.001


def wrong_coefficient(naive):
    naive.coefficients["generator.blocks.1.conv2.weight"] *= 1.001


def wrong_half_life(naive):
    naive.half_life *= 2


def wrong_bias(naive):
    with torch.no_grad():
        naive.weights["generator.blocks.1.styled1.bias"] += 1e-6


def wrong_slope(naive):
    naive._from_rgb = lambda images, level: torch.nn.functional.leaky_relu(
        naive._convolve(f"encoder.from_rgb.{level}", images), 0.2
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (wrong_gamma, "loss of discriminator by"),
        (wrong_blur, "loss of discriminator by"),
        (wrong_slope, "loss of discriminator by"),
        (wrong_coefficient, r"weight of generator.blocks.1.conv2.weight after generator by 0.001, allowed are 1e-06"),
        (wrong_half_life, "average of .* by"),
        (wrong_bias, "generator.blocks.1.styled1.bias after discriminator, which the naive one does not move"),
    ],
)
def test_a_wrong_formula_is_seen(sides, fault, message):
    pair = sides(16, precision="fp64", eps=1e-30)
    fault(pair.naive)
    with pytest.raises(UserError, match=f"the two sides disagree: {message}"):
        pair.compare(Tolerance())


def test_a_network_that_learns_on_one_side_only_is_seen(sides):
    pair = sides(16, precision="fp64", eps=1e-30)
    step = pair.naive._adam
    pair.naive._adam = lambda learning: step({n: w for n, w in learning.items() if not n.startswith("critic")})
    with pytest.raises(UserError, match=r"weight of critic\..* after discriminator"):
        pair.compare(Tolerance())


@pytest.mark.parametrize(("level", "blend"), [(0, 1.0), (1, 0.3), (3, 1.0), (5, 0.5), (5, 1.0)])
def test_networks_at_every_stage_of_growing(level, blend):
    torch.manual_seed(0)
    network = ALAE(small(128)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    naive = NaiveALAE(network, rate=1.0, half_life=1.0)
    z = torch.randn(2, 8).double()
    noise = naive.draw("reciprocity", 2, level).noise
    w = network.mapping(z)
    images = network.generate(w, level, blend, noise=noise)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(naive.mapping(z), w, **close)
    styles = w[:, None].repeat(1, 2 * (level + 1), 1)
    torch.testing.assert_close(naive.generate(styles, noise, level, blend), images, **close)
    found = network.encode_at(images, level, blend)
    torch.testing.assert_close(naive.encode(images, level, blend), found, **close)
    torch.testing.assert_close(naive.critic(found), network.critic(found), **close)


def test_the_coefficients_are_the_rates_of_the_recipe(sides):
    pair = sides(128)
    rates = {parameter: group.rate for group in pair.recipe.parameter_groups() for parameter in group.parameters}
    for name, parameter in pair.recipe.autoencoder.named_parameters():
        assert pair.naive.coefficients[name] == pytest.approx(rates[parameter]), name


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


# The program


@pytest.mark.parametrize("options", [(), ("--bf16",)])
def test_alae(tmp_path, options):
    done = run(*TINY, "--resolution", 8, 32, "--out", tmp_path, *options)
    assert done.code == 0, done.err
    (path,) = tmp_path.glob("*-alae.md")
    text = path.read_text()
    assert f"report: {path}" in done.out
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in (table[0], *table[2:])] == ["case", "8", "32"]
    assert all(line in done.out for line in table)
    assert "python eval/throughput.py alae --width tiny --batch 2" in text
    for fact in ("- width: tiny", "- batch: 2", f"- bf16: {'yes' if options else 'no'}", "1 torch thread"):
        assert fact in text
    naive, ours = (float(cell) for cell in table[-1].split("|")[6:8])
    assert 0 < ours < naive


@pytest.mark.full
def test_alae_compiled():
    done = run(*TINY, "--resolution", 8, "--compile", "eager")
    assert done.code == 0, done.err
    assert re.search(r"\| 8 pixels .*\| - +\| - +\| float64", done.out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", 0), "--batch 0: must be at least 1"),
        (("--repeats", 0), "--repeats 0: must be at least 1"),
        (("--threads", -1), "--threads -1: must be at least 1"),
        (("--resolution", 16, 100), "resolution: must be a power of two from 8 on"),
    ],
)
def test_bad_numbers(options, message):
    done = run(THROUGHPUT, "alae", "--width", "tiny", *options)
    assert done.code == 2 and len(done.errors) == 1
    assert done.errors[0].startswith("error: ") and message in done.errors[0]
    assert not done.out


def test_other_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*TINY, "--out", tmp_path / "file")
    assert done.code == 2 and done.errors == [f"error: --out {tmp_path / 'file'} is a file, expected a folder"]
    assert run(THROUGHPUT).code == 2 and run(THROUGHPUT, "alae", "--width", "huge").code == 2
    if not torch.cuda.is_available():
        done = run(*TINY, "--device", "cuda")
        assert done.code == 2 and done.errors == ["error: --device cuda: torch sees no GPU here"]


def test_the_table_for_a_gpu_on_a_cpu(tmp_path):
    parts = ("vqvae2", "alae", "energy", "decode")
    done = run(THROUGHPUT, "all", "--tiny", "--only", *parts, "--repeats", 1, "--out", tmp_path)
    assert done.code == 0, done.err
    header, _, *rows = (line.split("|")[1:-1] for line in done.out.splitlines() if line.startswith("| "))
    columns = [cell.strip() for cell in header]
    assert {"naive, images/s", "ours, images/s", "naive, MiB", "ours, MiB", "GFLOP an image"} <= set(columns)
    assert {"ours, GFLOP/s", "of the peak"} <= set(columns) and "target" not in columns
    names = [row[0].strip() for row in rows]
    assert names[:3] == ["vqvae2: 32 pixels", "alae: 8 pixels", "alae: 16 pixels"]
    assert sum(name.startswith("energy: ") for name in names) == 6
    assert names[-4:] == [f"decode: {kind}, 64 pixels" for kind in ("vqvae2", "alae", "beta_vae", "taesd")]
    assert all(float(row[columns.index("GFLOP an image")]) > 0 for row in rows)
    text = next(tmp_path.glob("*-all.md")).read_text()
    assert "- plain: yes" in text and "- flops: yes" in text and "model FLOP utilisation" in text


@pytest.mark.parametrize("tiny", [False, True])
def test_every_row_of_that_table_is_a_command(tiny):
    """Of the real one, which no test runs, the options at least."""
    from speed import all as whole

    names = []
    for command, words in whole._commands(tiny):
        found = whole._arguments(argparse.Namespace(compile="inductor", bf16=True), command, words)
        assert found.command == command and found.bf16
        assert (found.compile is None) == (command == "energy")
        names.append(command)
    assert set(names) == set(whole.PARTS)


def test_help_names_every_benchmark():
    done = run(THROUGHPUT, "--help")
    assert done.code == 0
    for name in (
        "alae",
        "vqvae2",
        "beta_vae",
        "energy",
        "decode",
        "translate",
        "data",
        "ranks",
        "save",
        "zero",
        "startup",
        "all",
    ):
        assert re.search(rf"^ +{name} +\w", done.out, re.MULTILINE), name


# What several ranks and checkpoints cost


def test_the_cost_of_saving_is_measured(fresh_accelerate, tmp_path):
    fresh_accelerate()
    done = run(THROUGHPUT, "save", "--configs", "configs/debug/vqvae2.yaml", "--repeats", 2, "--out", tmp_path)
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("vqvae2: "))
    found = re.search(r"checkpoint of (\d+) MiB every 8000 images: .* for ([\d.]+) s of (\d+) s, ([\d.]+)%", line)
    size, held, interval, share = map(float, found.groups())
    assert size >= 3 and interval > 1 and share == pytest.approx(100 * held / interval, abs=0.01 * 100 / interval)
    assert "target: below 1 %" in next(tmp_path.glob("*-save.md")).read_text()
    resumed = float(re.search(r"resumed in ([\d.]+) s", line)[1])
    assert resumed < 60


@pytest.mark.full
def test_ranks_are_compared_with_one(tmp_path):
    tiny = ("autoencoder.channels=8", "autoencoder.residual_channels=4")
    done = run(THROUGHPUT, "ranks", "--repeats", 1, "--images", 16, "--batch", 8, "--side", 32, "--", *tiny)
    assert done.code == 0, done.err
    lines = done.out.splitlines()[-5:]
    assert all(line.startswith("32 pixels, 8 images a step: ") for line in lines)
    assert "2 runs at once of 4 images a step: " in lines[2]
    one, two, apart, at_once, share = (float(re.search(r": ([\d.]+)[^:]*(\(target: .*)?$", line)[1]) for line in lines)
    assert share == pytest.approx(two / (2 * one), abs=0.02) and at_once == pytest.approx(apart / (2 * one), abs=0.02)


GROWING = "configs/pretrain/ffhq1024_alae.yaml"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--batch", 8, 9), "training.batch: 9 images do not divide over 2 ranks (try 8 or 10)"),
        (("autoencoder.resolution=32",), "autoencoder.resolution: give --side, whose rows say it"),
        (("training.batch=8",), "training.batch: give --batch, whose rows say it"),
        (("--config", GROWING), f"--config {GROWING}: a batch by level, expected one"),
    ],
)
def test_batches_that_cannot_be_dealt_to_ranks(given, says):
    done = run(THROUGHPUT, "ranks", *given)
    assert done.code == 2 and says in done.err


def test_one_process_is_no_launch_file_for_ranks():
    done = run(THROUGHPUT, "ranks", "--launch", "launch/accelerate/one.yaml")
    assert done.code == 2 and "launch/accelerate/one.yaml: starts 1 process, expected several" in done.err
    done = run(THROUGHPUT, "save", "--bf16")
    assert done.code == 2 and "--bf16 has no effect on save: leave it out" in done.err
