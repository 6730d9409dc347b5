"""--check: it refuses what would refuse the run, says what was not looked at, and writes nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, STYLES, run
from refusals import energy_command, one

from letit_dist.config import load_config
from letit_dist.data import order
from letit_dist.data.reader import ShardDataset
from letit_dist.schemas import PretrainConfig
from letit_dist.training.dry_run import DryRun, gib, shards_of_a_rank
from letit_dist.training.plan import BatchPlan
from letit_dist.training.run import open_run


def check(chain, folder, *more, energy=False):
    """--check of the chain's commands, in a folder of its own."""
    command = list(chain.train_energy(*STYLES) if energy else chain.pretrain)
    command[command.index("--run") + 1] = folder
    return run(*command, "--check", *more)


def lines(done):
    return [line.removeprefix("# ") for line in done.out.splitlines() if line.startswith("# ")]


@pytest.mark.parametrize("energy", [False, True])
def test_it_says_what_a_run_will_take_and_writes_nothing(refused, chain, tmp_path, energy):
    done = check(chain, tmp_path / "new", "--ranks", 2, energy=energy)
    assert done.code == 0, done.err
    begins = ["batch: 16 = 2 ranks x 8 images", "steps: ", "data: ", "DDP: a rank holds ", "the largest pass: "]
    begins += ["a checkpoint: ", "an export: ", "disk: "]
    found = [line for line in lines(done) if not line.startswith("data: orange")]
    assert [line.startswith(begin) for line, begin in zip(found, begins, strict=True)] == [True] * len(begins), found
    assert not (tmp_path / "new").exists() and "free at" in found[-1]


@pytest.mark.parametrize("energy", [False, True])
def test_every_refusal_of_a_run_is_one_of_the_dry_run(chain, tmp_path, energy, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.png").touch()
    done = check(chain, tmp_path / "other", energy=energy)
    assert done.code == 2 and "is not empty and is no run folder" in one(done.errors)
    done = check(chain, chain.energy() if energy else chain.autoencoder, "training.seed=5", energy=energy)
    assert done.code == 2 and "belongs to another configuration" in done.err and "training.seed: 0 -> 5" in done.err
    done = check(chain, tmp_path / "other/photo.png", energy=energy)
    assert done.code == 2 and "is a file, expected a run folder" in one(done.errors)
    done = check(chain, tmp_path / "other/photo.png/run", energy=energy)
    assert done.code == 2 and one(done.errors).endswith("photo.png is a file")
    monkeypatch.setattr("letit_dist.training.setup._installed", lambda name: name != "wandb")
    done = check(chain, tmp_path / "new", "training.trackers=[wandb]", energy=energy)
    assert done.code == 2 and one(done.errors) == "error: training.trackers: wandb not installed: pip install wandb"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    done = check(chain, tmp_path / "new", energy=energy)
    assert done.code == 2 and f"{tmp_path} is not yours to write into" in one(done.errors)
    assert not (tmp_path / "new").exists() and [p.name for p in tmp_path.iterdir()] == ["other"]


def test_all_problems_come_at_once(chain, tmp_path, monkeypatch):
    monkeypatch.setattr("letit_dist.training.setup._installed", lambda name: False)
    (tmp_path / "run").touch()
    more = ("training.trackers=[wandb]", f"data.train=[{tmp_path}/none]", "--gpu-memory", "0.0001")
    done = check(chain, tmp_path / "run", *more)
    starts = (
        "training.trackers: ",
        f"{tmp_path}/run is a file",
        f"data.train: {tmp_path}/none is not here (if it is on another machine: --without-data)",
        "--gpu-memory 0.0001: a step takes",
    )
    assert done.code == 2 and len(done.errors) == 4
    assert all(line.startswith(f"error: {s}") for line, s in zip(done.errors, starts, strict=True)), done.err


def test_all_problems_of_an_energy_come_at_once(chain, tmp_path, stranger, monkeypatch):
    monkeypatch.setattr("letit_dist.training.setup._installed", lambda name: False)
    (tmp_path / "run").touch()
    more = ("--check", "training.trackers=[wandb]", "--deepspeed", tmp_path / "none.json")
    before = ("training.trackers: ", f"{tmp_path}/run is a file", f"{tmp_path}/none.json: No such")
    places = {"autoencoder": tmp_path / "a", "source": tmp_path / "b", "target": tmp_path / "c"}
    done = run(*energy_command(chain, tmp_path / "run", **places), *more)
    assert done.code == 2 and len(done.errors) == 6, done.err
    assert all(line.startswith(f"error: {start}") for line, start in zip(done.errors, before, strict=False)), done.err
    assert all(str(place) in line for line, place in zip(done.errors[3:], places.values(), strict=True))
    done = run(*energy_command(chain, tmp_path / "run", autoencoder=stranger), *more)
    assert len(done.errors) == 5 and all("encoded by autoencoder" in line for line in done.errors[3:])
    # What no single input shows.
    shutil.copytree(chain.latents("orange"), tmp_path / "again")
    command = [word for word in energy_command(chain, tmp_path / "run") if not str(word).startswith("data.")]
    domains = f"data.domains=[{chain.latents('orange')},{tmp_path}/again]"
    done = run(*command, "--check", domains, "energy.condition_on=target")
    assert done.code == 2 and len(done.errors) == 2 and "two of one name" in done.errors[1]


def test_a_folder_in_which_another_process_runs(chain, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(chain.autoencoder, folder)
    code = (
        "import fcntl, pathlib, sys; f = open(pathlib.Path(sys.argv[1]) / '.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    given = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], **given) as other:
        assert other.stdout.readline() == "locked\n"
        done = check(chain, folder)
        assert done.code == 2 and one(done.errors).startswith(f"error: another process is running in {folder}: wait")
        other.communicate()
    assert check(chain, folder).code == 0


def test_a_folder_that_this_process_holds_stays_held(chain, tmp_path):
    """A process that closes the file of its lock has lost it."""
    config = load_config(PretrainConfig, chain.autoencoder / "config.yaml", [])
    open_run(tmp_path, config)
    DryRun(config, [BatchPlan(16, 1, 1)], run=tmp_path)
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], capture_output=True, text=True)
    assert done.returncode == 1 and "BlockingIOError" in done.stderr


def test_data_that_are_not_here_or_of_another_size(chain, tmp_path):
    done = check(chain, tmp_path / "new", f"data.train=[{tmp_path}/none]")
    assert done.code == 2 and f"{tmp_path}/none is not here" in one(done.errors)
    done = check(chain, tmp_path / "new", f"data.train=[{tmp_path}/none]", "--without-data")
    assert done.code == 0 and f"data.train: {tmp_path}/none is elsewhere, not looked at" in lines(done)
    done = check(chain, tmp_path / "new", "autoencoder.resolution=64")
    assert done.code == 2 and "holds images of 32x32, autoencoder.resolution is 64" in one(done.errors)
    done = check(chain, tmp_path / "new", "start_from=./nowhere")
    assert done.code == 2 and "no weights at nowhere" in one(done.errors)
    done = check(chain, tmp_path / "new", "start_from=./nowhere", "--without-data")
    assert done.code == 0 and "start_from: ./nowhere is elsewhere, not looked at" in lines(done)


def test_an_energy_without_its_latents(chain, tmp_path, stranger):
    nowhere = {"source": tmp_path / "none"}
    done = run(*energy_command(chain, tmp_path / "new", **nowhere), "--check")
    assert done.code == 2 and f"{tmp_path / 'none'}" in one(done.errors)
    done = run(*energy_command(chain, tmp_path / "new", autoencoder=stranger), "--check")
    assert done.code == 2 and ["encoded by autoencoder" in line for line in done.errors] == [True, True]
    command = energy_command(chain, tmp_path / "new", autoencoder=tmp_path / "none", **nowhere)
    done = run(*command, "--check", "--without-data")
    assert done.code == 0 and lines(done)[-1].startswith("autoencoder and latents: elsewhere, not looked at")
    done = run(*command, "--check", "--without-data", "--gpu-memory", 8)
    assert done.code == 2 and "memory is known only where" in one(done.errors)
    done = run(*command, "--check", "--without-data", "--deepspeed", ROOT / "launch/deepspeed/zero3.json")
    assert done.code == 2 and "asks for ZeRO stage 3, which has no parameters at hand" in one(done.errors)


def test_shards_without_an_index(chain, tmp_path):
    folder = tmp_path / "tars"
    shutil.copytree(chain.images("apple"), folder)
    (folder / "index.json").unlink()
    done = check(chain, tmp_path / "new", f"data.train=[{folder}]", "data.workers=0")
    assert done.code == 0 and "data: 1 shards without an index, 1 a rank, dealt to 1 readers" in done.out
    done = check(chain, tmp_path / "new", f"data.train=[{folder}]", "data.workers=0", "autoencoder.resolution=64")
    assert done.code == 2 and "holds images of 32x32" in one(done.errors)
    done = check(chain, tmp_path / "new", f"data.train=[{folder}]", "data.workers=0", "--ranks", 2)
    assert done.code == 2 and "1 shards without an index cannot feed 2 ranks" in one(done.errors)
    done = check(chain, tmp_path / "new", f"data.train=['{folder}/none-{{0..3}}.tar']")
    assert done.code == 2 and "no such tar" in one(done.errors)


def test_a_cache_of_remote_shards(chain, tmp_path):
    remote = ("data.train=[https://nowhere.invalid/a]", f"data.cache={tmp_path}/cache")
    done = check(chain, tmp_path / "new", *remote, "data.cache_gib=0.5")
    assert done.code == 0, done.err
    assert any(line.startswith(f"cache of remote shards: at most 0.5 GiB in {tmp_path}/cache") for line in lines(done))
    assert "data.train: https://nowhere.invalid/a is on a server, not looked at" in lines(done)
    done = check(chain, tmp_path / "new", *remote, "data.cache_gib=1e9")
    assert done.code == 2 and one(done.errors).startswith("error: data.cache_gib: the cache may take 1e+09 GiB")
    assert done.errors and not list(tmp_path.iterdir())


def test_local_data_beside_those_on_a_server(chain, tmp_path):
    def beside(*local, **more):
        places = ",".join(map(str, ("https://nowhere.invalid/a", *local)))
        more = {"data.cache": tmp_path / "cache", "data.cache_gib": 0.5, **more}
        return check(chain, tmp_path / "new", f"data.train=[{places}]", *(f"{k}={v}" for k, v in more.items()))

    done = beside(chain.images("apple"))
    assert done.code == 0, done.err
    assert "data: 24 images in 1 shards here, beside those on a server" in lines(done)
    done = beside(tmp_path / "none", chain.images("apple"), tmp_path / "nor")
    assert done.code == 2 and [line.split()[2] for line in done.errors] == [f"{tmp_path}/none", f"{tmp_path}/nor"]
    done = beside(chain.images("apple"), **{"autoencoder.resolution": 64})
    assert done.code == 2 and "holds images of 32x32, autoencoder.resolution is 64" in one(done.errors)
    tars = tmp_path / "tars"
    shutil.copytree(chain.images("apple"), tars)
    (tars / "index.json").unlink()
    assert "cannot be mixed in one stream" in one(beside(tars).errors)
    remote = f"data.train=[{tars},'https://nowhere.invalid/b-{{0..2}}.tar']"
    given = (remote, f"data.cache={tmp_path}/cache", "data.cache_gib=0.5", "data.workers=0")
    done = check(chain, tmp_path / "new", *given, "--ranks", 2)
    assert done.code == 0 and "data: 4 shards without an index, 2 a rank, dealt to 2 readers" in done.out, done.err
    done = check(chain, tmp_path / "new", *given, "autoencoder.resolution=64")
    assert done.code == 2 and "holds images of 32x32" in one(done.errors)


def test_a_full_disk(chain, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("letit_dist.training.dry_run.shutil.disk_usage", lambda path: usage)
    done = check(chain, tmp_path / "new")
    assert done.code == 2 and "are needed for checkpoints, export and pictures" in one(done.errors)
    assert lines(done)[-1].endswith("(NOT ENOUGH)") and not (tmp_path / "new").exists()
    # What a finished run holds of this already needs no room; what else lies there makes none.
    folder = tmp_path / "run"
    shutil.copytree(chain.autoencoder, folder)
    counted = (path for kind in ("checkpoints", "export", "samples") for path in (folder / kind).rglob("*"))
    held = sum(path.stat().st_size for path in counted if path.is_file())
    for other in ("wandb/log", "tensorboard/events", "checkpoints/damaged-images-000000000480/model.safetensors"):
        (folder / other).parent.mkdir(parents=True)
        (folder / other).write_bytes(bytes(held))
    done = check(chain, folder)
    assert f"{gib(held)} of it there already" in lines(done)[-1]


def test_a_gpu_that_is_too_small(chain, tmp_path):
    def refusal(*more):
        return one(check(chain, tmp_path / "new", *more).errors)

    assert check(chain, tmp_path / "new", "--gpu-memory", 1).code == 0
    assert "lower training.microbatch, there 16" in refusal("--gpu-memory", "0.001")
    found = refusal("--gpu-memory", "0.0003", "training.microbatch=1")
    assert found.endswith("set training.recompute_from=8, or use a larger GPU")
    found = refusal("--gpu-memory", "0.0003", "training.microbatch=1", "training.recompute_from=8")
    assert "recompute_from" not in found and found.endswith("use a larger GPU")
    assert "no batch is small enough" in refusal("--gpu-memory", "0.0001")
    given = ("configs/debug/alae.yaml", "--check", "--without-data", "--gpu-memory", "0.08")
    done = run("launch/pretrain.py", *given)
    assert done.code == 2 and "level 3 (32 pixels) takes about" in one(done.errors)


def test_deepspeed(chain, tmp_path):
    done = check(chain, tmp_path / "new", "--ranks", 2, "--deepspeed", ROOT / "launch/deepspeed/zero2_offload.json")
    assert done.code == 0
    (held,) = (line for line in lines(done) if "a rank holds" in line)
    assert held.startswith("DeepSpeed, ZeRO stage 2, the optimiser on the CPU: ") and "in main memory" in held
    for name, why in {
        "none.json": "No such file",
        "broken.json": "is not JSON",
        "list.json": "expected keys and values, found list",
        "clips.json": "has no gradient_clipping",
    }.items():
        (tmp_path / name).write_text({"broken.json": "{", "list.json": "[]"}.get(name, "{}"))
        if name == "none.json":
            (tmp_path / name).unlink()
        done = check(chain, tmp_path / "new", "--deepspeed", tmp_path / name)
        assert done.code == 2 and why in one(done.errors)
    given = (
        "configs/debug/alae.yaml",
        "--check",
        "--without-data",
        "--deepspeed",
        ROOT / "launch/deepspeed/zero3.json",
    )
    done = run("launch/pretrain.py", *given)
    assert done.code == 2 and "asks for ZeRO stage 3, which repeats old gradients" in one(done.errors)


def test_options_that_belong_to_it(chain, tmp_path):
    for more in (("--ranks", 2), ("--deepspeed", "x.json"), ("--gpu-memory", 8), ("--without-data",)):
        for command in (chain.pretrain, chain.train_energy(*STYLES)):
            done = run(*command, *more)
            assert done.code == 2 and f"{more[0]}: only with --check" in done.errors[-1]
    for more in (("--ranks", 0), ("--gpu-memory", 0)):
        done = run(*chain.pretrain, "--check", *more)
        assert done.code == 2 and done.errors[-1].endswith(("must be at least 1", "must be above 0"))


def test_the_shards_that_a_rank_reads(chain):
    dataset = ShardDataset([chain.images(style) for style in STYLES])
    for ranks in (1, 2, 16):
        plan = BatchPlan(16, ranks, 1)
        read = set()
        for seen in range(0, 48, 16):
            samples = order.sample_at(order.rank_positions(seen, 16, 0, ranks), 3, len(dataset))
            read |= {dataset.place(int(sample)).partition(": ")[0] for sample in samples}
        assert shards_of_a_rank([24, 24], 3, plan) == len(read)
    counts = [1] * 48
    assert [shards_of_a_rank(counts, 3, BatchPlan(16, ranks, 1)) for ranks in (1, 2, 16)] == [48, 24, 3]
