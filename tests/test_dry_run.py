"""--check: it refuses what would refuse the run, says what was not looked at, and writes nothing."""

import os
import shutil
from pathlib import Path

import pytest
from programs import ROOT, STYLES, run
from refusals import energy_command, one

from letit_dist.data import order
from letit_dist.data.reader import ShardDataset
from letit_dist.training.dry_run import shards_of_a_rank
from letit_dist.training.plan import BatchPlan


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
    assert done.code == 2 and "encoded by autoencoder" in one(done.errors)
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


def test_a_full_disk(chain, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("letit_dist.training.dry_run.shutil.disk_usage", lambda path: usage)
    done = check(chain, tmp_path / "new")
    assert done.code == 2 and "are needed for checkpoints, export and pictures" in one(done.errors)
    assert lines(done)[-1].endswith("(NOT ENOUGH)") and not (tmp_path / "new").exists()
    # What a finished run holds already needs no room.
    held = sum(path.stat().st_size for path in chain.autoencoder.rglob("*") if path.is_file())
    done = check(chain, chain.autoencoder)
    assert f"{held / 2**20:.3g} MiB of it there already" in lines(done)[-1]


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
