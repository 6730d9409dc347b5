"""A run that is stopped or killed, and started again, is the run that was not."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import (
    ROOT,
    SignalFeed,
    assert_equal,
    everything,
    stats_of,
    tiny_alae_trainer,
    tiny_energy_trainer,
    tiny_trainer,
)
from safetensors.torch import load_file

from letit_dist.schemas import ImagesConfig
from letit_dist.training.feeds import ImageFeed
from letit_dist.training.trainer import STOPPED

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def harmless_signals():
    """A signal that the trainer does not answer fails its test, and does not end all of them."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(params=["vqvae2", "alae", "latent_energy"])
def build(request, fruit_shards, fruit_latents, fresh_accelerate):
    """build(run, **changes): a Trainer of one of the recipes."""
    if request.param == "vqvae2":
        return lambda run, **changes: tiny_trainer(run, fruit_shards, **changes)
    if request.param == "alae":
        return lambda run, **changes: tiny_alae_trainer(run, fruit_shards, **changes)
    return lambda run, **changes: tiny_energy_trainer(run, fruit_latents, **changes)


def test_a_run_stopped_by_sigterm_is_bit_equal_to_one_never_stopped(build, tmp_path):
    whole = build(tmp_path / "whole")
    assert whole.train() == 0 and whole.images_seen == 128

    starts = 0
    code = STOPPED
    while code == STOPPED:
        part = build(tmp_path / "parts", feed=lambda feed: SignalFeed(feed, 2, signal.SIGTERM))
        code = part.train()
        starts += 1
    # Three batches a start: the last batch of a run is its end, stop or not.
    assert code == 0 and starts >= 6
    assert_equal(everything(part), everything(whole))
    assert stats_of(tmp_path / "parts") == stats_of(tmp_path / "whole")
    assert [line["images_seen"] for line in stats_of(tmp_path / "parts")] == [40, 80, 120, 128]


def test_weights_do_move_and_codebooks_do_restart(fruit_shards, fresh_accelerate, tmp_path):
    """Guards the test above: nothing in it is equal because nothing happened."""
    trainer = tiny_trainer(tmp_path, fruit_shards)
    before = everything(trainer)
    trainer.train()
    after = everything(trainer)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still
    assert sum(line["restarted_top"] for line in stats_of(tmp_path)) > 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_other_signals_stop_as_well_and_handlers_come_back(fruit_shards, fresh_accelerate, tmp_path, number):
    before = signal.getsignal(number)
    trainer = tiny_trainer(tmp_path, fruit_shards, feed=lambda feed: SignalFeed(feed, 1, number))
    assert trainer.train() == STOPPED
    assert signal.getsignal(number) is before
    assert trainer.store.latest().images_seen == trainer.images_seen == 16


class GroupFeed(SignalFeed):
    """Sends SIGTERM from another process to this one and to its loader processes: what Slurm and torchrun do."""

    def batches(self, *place):
        for count, batch in enumerate(self.feed.batches(*place)):
            if count == self.after:
                everyone = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
                assert len(everyone) == 2
                subprocess.run(["sh", "-c", f"kill -TERM {' '.join(map(str, everyone))}"], check=True)
                time.sleep(0.5)
            yield batch


def test_a_signal_to_the_whole_process_group_stops_as_well(fruit_shards, fresh_accelerate, tmp_path):
    images = ImageFeed(ImagesConfig(train=(str(fruit_shards / "apple/train"),), workers=1, grayscale=0.3), seed=7)
    part = tiny_trainer(tmp_path / "parts", fruit_shards, feed=lambda feed: GroupFeed(images, 3, signal.SIGTERM))
    assert part.train() == STOPPED and part.images_seen == 32
    again, whole = (tiny_trainer(tmp_path / name, fruit_shards) for name in ("parts", "whole"))
    assert (again.train(), whole.train()) == (0, 0)
    assert_equal(everything(again), everything(whole))


def test_a_second_ctrl_c_ends_at_once(fruit_shards, fresh_accelerate, tmp_path):
    def impatient(feed):
        return SignalFeed(SignalFeed(feed, 1, signal.SIGINT), 1, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, fruit_shards, feed=impatient).train()


def test_a_finished_run_says_so_and_changes_nothing(build, tmp_path, capsys):
    first = build(tmp_path)
    assert first.train() == 0
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = build(tmp_path)
    assert again.train() == 0
    assert "complete: 128 of 128 images" in capsys.readouterr().out
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert_equal(everything(again), everything(first))


def test_a_run_killed_before_its_first_checkpoint_leaves_no_lines_behind(fruit_shards, fresh_accelerate, tmp_path):
    class Killed(Exception):
        pass

    class Fragile(SignalFeed):
        def batches(self, *place):
            for count, batch in enumerate(self.feed.batches(*place)):
                if count == 5:
                    raise Killed
                yield batch

    with pytest.raises(Killed):
        tiny_trainer(tmp_path / "a", fruit_shards, feed=lambda feed: Fragile(feed, 5, 0)).train()
    assert [line["images_seen"] for line in stats_of(tmp_path / "a")] == [40]
    tiny_trainer(tmp_path / "a", fruit_shards).train()
    tiny_trainer(tmp_path / "b", fruit_shards).train()
    assert stats_of(tmp_path / "a") == stats_of(tmp_path / "b")


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def test_the_same_command_after_kill_9_gives_the_run_that_was_never_killed(fruit_shards, fresh_accelerate, tmp_path):
    tree = {
        "base": str(ROOT / "configs/base/vqvae2.yaml"),
        "autoencoder": {
            "resolution": 32,
            "channels": 8,
            "residual_blocks": 1,
            "residual_channels": 4,
            "code_dim": 4,
            "codes": 16,
        },
        "recipe": {"input_noise": 0.1},
        "data": {"train": [str(fruit_shards / "orange/train")], "workers": 0, "grayscale": 0.2},
        "training": {"images": 240, "batch": 8, "ema_half_life": 100},
        "intervals": {"report": 40, "samples": 240, "checkpoint": 8},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def arguments(run):
        return [str(tmp_path / "config.yaml"), "--run", str(run)]

    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), *arguments(killed)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    lines, checkpoints = killed / "stats.jsonl", killed / "checkpoints"

    def saving():
        return lines.exists() and 'seen": 40,' in lines.read_text() and list(checkpoints.glob(".*.writing"))

    wait_for(saving, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "export").exists()

    # In this process, to save the imports; with a loader process, which changes no result.
    program = runpy.run_path(str(ROOT / "launch/pretrain.py"))["main"]
    assert program([*arguments(killed), "data.workers=1"]) == 0
    fresh_accelerate()
    assert program([*arguments(whole), "intervals.checkpoint=240"]) == 0
    for name in ("model", "average", "optimizer"):
        saved = f"checkpoints/images-{240:012d}/{name}.safetensors"
        assert_equal(load_file(killed / saved), load_file(whole / saved))
    assert stats_of(killed) == stats_of(whole)
    exported = f"export/images-{240:012d}/model.safetensors"
    assert (killed / exported).read_bytes() == (whole / exported).read_bytes()
    assert not list(checkpoints.glob(".*"))
