"""Two processes equal one: the same global batches, weights, codebooks and averages."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import ROOT, start
from safetensors.torch import load_file

CONFIG = "configs/debug/vqvae2.yaml"
TINY = [
    "autoencoder.resolution=32",
    "autoencoder.channels=8",
    "autoencoder.residual_blocks=1",
    "autoencoder.residual_channels=4",
    "autoencoder.code_dim=4",
    "autoencoder.codes=16",
    "autoencoder.noise=true",
    "autoencoder.restart_every=5",
    "recipe.input_noise=0.03",
    "recipe.optimizer.decay=null",
    "data.grayscale=0.2",
    "training.batch=8",
    "training.ema_half_life=40",
    "intervals.report=80",
    "intervals.samples=1000000",
]


def launch(run: Path, shards: Path, *overrides: str, yaml: str | Path | None = None, fresh: bool = False):
    """Run the program itself, or under accelerate with one of the shipped files; returns the finished process."""
    train = f"data.train=[{shards / 'apple/train'}, {shards / 'orange/train'}]"
    return start("launch/pretrain.py", CONFIG, "--run", run, train, *TINY, *overrides, launch=yaml, fresh=fresh)


def checkpoint(run: Path, name: str) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("images-*"))[-1]
    return load_file(newest / f"{name}.safetensors")


def assert_close(a: dict, b: dict, rtol: float, atol: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def started(process) -> None:
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]


STEPS20 = ["training.images=160", "intervals.checkpoint=160"]


def test_two_ranks_equal_one_in_float64_after_twenty_steps(tmp_path, fruit_shards):
    """Weights, codebooks, averages and optimiser state, with noise, restarts and accumulation on."""
    double = [*STEPS20, "training.precision=fp64"]
    started(launch(tmp_path / "one", fruit_shards, *double))
    split = (*double, "training.microbatch=2")
    two = launch(tmp_path / "two", fruit_shards, *split, yaml="launch/accelerate/cpu2.yaml", fresh=True)
    started(two)
    assert "8 = 2 ranks x 2 images x 2 accumulation" in two.stdout
    for name in ("model", "average", "optimizer"):
        one = checkpoint(tmp_path / "one", name)
        assert any(value.dtype == torch.float64 for value in one.values())
        assert_close(checkpoint(tmp_path / "two", name), one, rtol=1e-9, atol=1e-9)
    embeds = [value for name, value in checkpoint(tmp_path / "one", "model").items() if name.endswith("embed")]
    assert embeds and all(value.std() > 0 for value in embeds)


def test_first_gradients_of_two_ranks_equal_one_in_float32(tmp_path, fruit_shards):
    """After one step Adam's first moment is (1 - beta1) times the gradient: later weights are no fair test."""
    first = ["training.images=8", "intervals.checkpoint=8", "intervals.report=8"]
    started(launch(tmp_path / "one", fruit_shards, *first))
    started(launch(tmp_path / "two", fruit_shards, *first, yaml="launch/accelerate/cpu2.yaml"))
    one, two = (checkpoint(tmp_path / run, "optimizer") for run in ("one", "two"))
    gradients = [name for name in one if name.startswith("exp_avg/")]
    assert len(gradients) > 20
    for name in gradients:
        scale = float(one[name].abs().max())
        assert scale > 0, f"{name} got no gradient"
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5 * scale)


DEEPSPEED = ("zero1", "zero0", "imagenet256", "ffhq1024", "zero3", "zero2_offload")


def under(name: str, folder: Path) -> Path:
    """A launch file for two CPU processes under launch/deepspeed/`name`.json."""
    text = (ROOT / "launch/accelerate/deepspeed_cpu2.yaml").read_text()
    assert "launch/deepspeed/zero1.json" in text
    yaml = folder / f"{name}.yaml"
    yaml.write_text(text.replace("launch/deepspeed/zero1.json", f"launch/deepspeed/{name}.json"))
    return yaml


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, fruit_shards):
    """Twenty batches of DDP in float32, with a checkpoint half-way: what DeepSpeed is held to."""
    run = tmp_path_factory.mktemp("ddp") / "run"
    started(launch(run, fruit_shards, *SHORT, yaml="launch/accelerate/cpu2.yaml"))
    return run


SHORT = ["training.images=160", "intervals.checkpoint=80", "training.microbatch=2"]


def half_of(run: Path, to: Path) -> Path:
    """A copy of a run that was killed between its two checkpoints."""
    shutil.copytree(run, to)
    newest = sorted((to / "checkpoints").glob("images-*"))
    assert len(newest) == 2
    shutil.rmtree(newest[-1])
    shutil.rmtree(to / "export")
    return to


def assert_rounding(run: Path, other: Path) -> None:
    """Equal but for the order of float32 additions, over twenty steps: weights, codebooks, average, Adam's moments."""
    for name in ("model", "average", "optimizer"):
        assert_close(checkpoint(run, name), checkpoint(other, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("zero0", "zero3") else pytest.mark.full) for n in DEEPSPEED]
)
def test_deepspeed_is_ddp_and_its_checkpoints_belong_to_any_number_of_ranks(tmp_path, fruit_shards, ddp, name):
    """Every shipped JSON; then half of it continued by one process without DeepSpeed, and half of DDP by it."""
    pytest.importorskip("deepspeed")
    yaml = under(name, tmp_path)
    started(launch(tmp_path / "ds", fruit_shards, *SHORT, yaml=yaml))
    assert_rounding(tmp_path / "ds", ddp)
    assert_same_numbers(tmp_path / "ds", ddp, rel=1e-5)
    assert len(checkpoint(ddp, "optimizer")) > 100

    alone = half_of(tmp_path / "ds", tmp_path / "alone")
    again = launch(alone, fruit_shards, *SHORT)
    started(again)
    assert "resumed at 80 of 160 images" in again.stdout
    assert_rounding(alone, ddp)

    taken = half_of(ddp, tmp_path / "taken")
    started(launch(taken, fruit_shards, *SHORT, yaml=yaml))
    assert_rounding(taken, ddp)


@pytest.mark.parametrize("name", ["zero1", *(pytest.param(n, marks=pytest.mark.full) for n in DEEPSPEED[1:])])
def test_deepspeed_resumes_equal_to_itself(tmp_path, fruit_shards, name):
    """No average: pictures, checkpoints and the export then read the weights that stage 3 keeps in parts."""
    pytest.importorskip("deepspeed")
    options = [*SHORT, "training.ema_half_life=null"]
    yaml = under(name, tmp_path)
    started(launch(tmp_path / "ds", fruit_shards, *options, yaml=yaml, fresh=True))
    again = half_of(tmp_path / "ds", tmp_path / "again")
    started(launch(again, fruit_shards, *options, yaml=yaml))
    for part in ("model", "optimizer"):
        assert_close(checkpoint(again, part), checkpoint(tmp_path / "ds", part), rtol=0, atol=0)
    exported = load_file(next((tmp_path / "ds/export").glob("images-*")) / "model.safetensors")
    trained = checkpoint(tmp_path / "ds", "model")
    assert all(torch.equal(value, trained[f"autoencoder.{name}"]) for name, value in exported.items())


def test_a_run_continues_on_another_number_of_ranks(tmp_path, fruit_shards):
    """Half the run on two ranks, the rest on one: equal to one rank throughout, in float64, with means over both."""
    double = [*STEPS20, "training.precision=fp64", "intervals.report=160"]
    started(launch(tmp_path / "one", fruit_shards, *double))
    half = ["training.precision=fp64", "training.images=160", "intervals.checkpoint=80", "intervals.report=160"]
    started(launch(tmp_path / "two", fruit_shards, *half, yaml="launch/accelerate/cpu2.yaml"))
    sorted((tmp_path / "two" / "checkpoints").glob("images-*"))[-1].rename(tmp_path / "aside")
    again = launch(tmp_path / "two", fruit_shards, *half)
    started(again)
    assert "resumed at 80 of 160 images" in again.stdout
    for name in ("model", "average", "optimizer"):
        assert_close(checkpoint(tmp_path / "two", name), checkpoint(tmp_path / "one", name), rtol=1e-9, atol=1e-9)
    one, two = (json.loads((tmp_path / run / "stats.jsonl").read_text()) for run in ("one", "two"))
    del one["images_per_second"], two["images_per_second"]
    assert two == pytest.approx(one, rel=1e-9, abs=1e-12)


def test_two_machines_equal_one(tmp_path, fruit_shards):
    """The shipped file for two machines, with one CPU process on each of two that are both this one."""
    text = (ROOT / "launch/accelerate/gpu8x2.yaml").read_text()
    yaml = tmp_path / "two.yaml"
    yaml.write_text(text.replace("num_processes: 16", "num_processes: 2").replace("use_cpu: false", "use_cpu: true"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    short = ["training.images=40", "intervals.checkpoint=40", "training.precision=fp64"]
    one = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(yaml)]
    one += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    train = f"data.train=[{fruit_shards / 'apple/train'}, {fruit_shards / 'orange/train'}]"
    rest = ["launch/pretrain.py", CONFIG, "--run", str(tmp_path / "two"), train, *TINY, *short]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [*one, "--machine_rank", str(rank), *rest],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    outputs = [machine.communicate(timeout=400)[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    assert "batch: 8 = 2 ranks x 4 images x 1 accumulation" in outputs[0]
    started(launch(tmp_path / "one", fruit_shards, *short))
    assert_close(checkpoint(tmp_path / "two", "model"), checkpoint(tmp_path / "one", "model"), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------- several phases, growing


def launch_tiny_alae(run: Path, shards: Path, precision: str, microbatches: str, yaml: str | Path | None = None):
    """72 phase steps over four levels: R1, style mixing, layer noise, the mean of w, a batch and a rate a level."""
    return start("tests/tiny_run.py", run, shards, precision, microbatches, launch=yaml)


def test_two_ranks_equal_one_over_the_phases_and_levels_of_alae(tmp_path, fruit_shards):
    started(launch_tiny_alae(tmp_path / "one", fruit_shards, "fp64", "8,8,4,4"))
    two = launch_tiny_alae(tmp_path / "two", fruit_shards, "fp64", "4,2,2,1", "launch/accelerate/cpu2.yaml")
    started(two)
    assert "level 1: 8 pixels, batch: 8 = 2 ranks x 2 images x 2 accumulation" in two.stdout
    assert "level 3: 32 pixels, batch: 4 = 2 ranks x 1 images x 2 accumulation" in two.stdout
    for name in ("model", "average", "optimizer"):
        one = checkpoint(tmp_path / "one", name)
        assert_close(checkpoint(tmp_path / "two", name), one, rtol=1e-9, atol=1e-9)
    model = checkpoint(tmp_path / "one", "model")
    assert model["autoencoder.w_mean"].std() > 0 and model["autoencoder.w_mean"].dtype == torch.float64

    # From mid-growth on with another number of ranks: each continues what the other began.
    whole = {name: checkpoint(tmp_path / "one", name) for name in ("model", "average", "optimizer")}
    ways = (("one", "4,2,2,1", "launch/accelerate/cpu2.yaml"), ("two", "8,8,4,4", None))
    for run, microbatches, yaml in ways:
        max((tmp_path / run / "checkpoints").glob("images-*")).rename(tmp_path / f"aside of {run}")
        again = launch_tiny_alae(tmp_path / run, fruit_shards, "fp64", microbatches, yaml)
        started(again)
        assert "resumed at 64 of 128 images" in again.stdout
        for name, tensors in whole.items():
            assert_close(checkpoint(tmp_path / run, name), tensors, rtol=1e-9, atol=1e-9)


def test_two_ranks_equal_one_where_phases_have_their_turns_in_some_batches_only(tmp_path, fruit_shards):
    """Every second and every third batch, and none in others; a mean over the batch in one of the phases."""
    for run, microbatch, yaml in (("one", 8, None), ("two", 2, "launch/accelerate/cpu2.yaml")):
        started(start("tests/two_phases.py", tmp_path / run, fruit_shards, "fp64", microbatch, launch=yaml))
    for name in ("model", "average", "optimizer"):
        one = checkpoint(tmp_path / "one", name)
        assert_close(checkpoint(tmp_path / "two", name), one, rtol=1e-9, atol=1e-9)
    steps = {key: int(value) for key, value in one.items() if key.startswith("step/")}
    assert steps == {"step/a.weight": 8, "step/a.bias": 8, "step/b.weight": 6, "step/b.bias": 6}
    assert checkpoint(tmp_path / "one", "model")["moved"].std() > 0
    assert_same_numbers(tmp_path / "two", tmp_path / "one", rel=1e-9)


def assert_same_numbers(run: Path, other: Path, rel: float) -> None:
    """Every line of stats.jsonl but for the clock."""
    sides = [[json.loads(line) for line in (r / "stats.jsonl").read_text().splitlines()] for r in (run, other)]
    assert len(sides[0]) == len(sides[1]) > 1
    for mine, theirs in zip(*sides, strict=True):
        del mine["images_per_second"], theirs["images_per_second"]
        assert mine == pytest.approx(theirs, rel=rel, abs=1e-12)


@pytest.mark.parametrize("file", [*(pytest.param(n, marks=pytest.mark.full) for n in DEEPSPEED[:3]), "ffhq1024"])
def test_alae_under_deepspeed_is_alae_under_ddp(tmp_path, fruit_shards, file):
    """Two ranks, growing and accumulating; then continued from mid-growth, equal to itself."""
    pytest.importorskip("deepspeed")
    yaml = under(file, tmp_path)
    options = (fruit_shards, "fp32", "4,2,2,1")
    started(launch_tiny_alae(tmp_path / "ddp", *options, "launch/accelerate/cpu2.yaml"))
    started(launch_tiny_alae(tmp_path / "ds", *options, yaml))
    whole = {name: checkpoint(tmp_path / "ds", name) for name in ("model", "average", "optimizer")}
    # A step is as long as the rate, 1e-3; what is left are the roundings of another order of sums.
    for name in ("model", "average"):
        assert_close(whole[name], checkpoint(tmp_path / "ddp", name), rtol=0, atol=1e-5)
    # Squared gradients of R1 reach thousands, so each tensor is measured by its own length.
    expected = checkpoint(tmp_path / "ddp", "optimizer")
    assert whole["optimizer"].keys() == expected.keys()
    for name, value in expected.items():
        assert (whole["optimizer"][name] - value).norm() <= 5e-4 * value.norm(), name
    newest = sorted((tmp_path / "ds" / "checkpoints").glob("images-*"))[-1]
    newest.rename(tmp_path / "aside")
    again = launch_tiny_alae(tmp_path / "ds", *options, yaml)
    started(again)
    assert "resumed at 64 of 128 images" in again.stdout
    for name, tensors in whole.items():
        assert_close(checkpoint(tmp_path / "ds", name), tensors, rtol=0, atol=0)


@pytest.mark.full
def test_deepspeeds_own_launcher_starts_the_same_run(tmp_path, fruit_shards):
    pytest.importorskip("deepspeed")
    options = (fruit_shards, "fp32", "4,2,2,1")
    started(launch_tiny_alae(tmp_path / "accelerate", *options, "launch/accelerate/deepspeed_cpu2.yaml"))
    asked = {"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": "launch/deepspeed/zero1.json"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {f"ACCELERATE_{name}": value for name, value in asked.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    command = [*own, "--no_local_rank", "tests/tiny_run.py", str(tmp_path / "own"), *map(str, options)]
    started(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400))
    for name in ("model", "average"):
        assert_close(checkpoint(tmp_path / "own", name), checkpoint(tmp_path / "accelerate", name), rtol=0, atol=0)


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(tmp_path, fruit_shards):
    process = launch(tmp_path / "run", fruit_shards, "training.batch=7", yaml="launch/accelerate/cpu2.yaml")
    assert process.returncode != 0
    assert "training.batch: 7 images do not divide over 2 ranks (try 6 or 8)" in process.stderr
    assert not (tmp_path / "run").exists()
