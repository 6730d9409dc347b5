import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, assert_equal, everything, tiny_autoencoder, tiny_energy_trainer, tiny_trainer

from letit_dist.errors import UserError
from letit_dist.pretrained import load_exactly
from letit_dist.recipes.base import OptimizerConfig
from letit_dist.recipes.vqvae2 import VQVAE2Recipe, VQVAE2RecipeConfig
from letit_dist.training import checkpoint
from letit_dist.training.checkpoint import CheckpointStore, open_checkpoint, verify


def tensors(number):
    """Of several dtypes and layouts, from a number."""
    draws = torch.Generator().manual_seed(number)
    image = torch.randn(4, 3, 5, 5, generator=draws).to(memory_format=torch.channels_last)
    return {
        "model": {"a.weight": image, "count": torch.tensor(number), "wide": torch.randn(7, generator=draws).double()},
        "optimizer": {"step/a.weight": torch.tensor(float(number))},
    }


def filled(folder, *images, keep=9):
    store = CheckpointStore(folder / "checkpoints", keep)
    for number in images:
        store.save(number, tensors(number), {"note": number})
    return store


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def name(images):
    return f"images-{images:012d}"


def test_what_is_saved_comes_back(tmp_path):
    found = filled(tmp_path, 8, 16).latest()
    assert found.images_seen == 16 and found.state == {"note": 16, "images_seen": 16}
    for part, expected in tensors(16).items():
        loaded = found.tensors(part)
        assert_equal(loaded, expected)
        assert {n: t.dtype for n, t in loaded.items()} == {n: t.dtype for n, t in expected.items()}
    with pytest.raises(UserError, match=r"holds no average\.safetensors"):
        found.tensors("average")


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert CheckpointStore(tmp_path / "nowhere", 2).latest() is None
    assert not (tmp_path / "nowhere").exists()


def test_the_newest_are_kept(tmp_path):
    store = filled(tmp_path, 8, 16, 24, 1_000_000_000_000, keep=2)
    assert names(store) == [name(24), name(1_000_000_000_000)]


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def lose_the_state(folder):
    (folder / "state.json").unlink()


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def misspell_the_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"files"', '"filws"'))


def misspell_a_manifest_entry(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"bytes"', '"bytds"', 1))


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text("[]")


def come_from_another_version(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


DAMAGES = {
    truncate: r"model\.safetensors has \d+ bytes, expected \d+",
    flip_a_byte: "model.safetensors does not match its hash",
    lose_the_state: "state.json is missing",
    lose_the_manifest: "no readable manifest.json",
    misspell_the_manifest: "no readable manifest.json",
    misspell_a_manifest_entry: "no readable manifest.json",
    empty_the_manifest: "no readable manifest.json",
    come_from_another_version: "format 2, this version reads 1",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    store = filled(tmp_path, 8, 16, 24)
    damage(store.folder / name(24))
    said = []
    assert store.latest(said.append).images_seen == 16
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint {name(24)} is damaged (") and "trying the one before it" in said[0]
    assert re.search(DAMAGES[damage], said[0])
    # Set aside: said once, and no longer in the way.
    assert names(store) == [f"damaged-{name(24)}", name(8), name(16)]
    assert store.latest(said.append).images_seen == 16 and len(said) == 1


def test_damaged_checkpoints_are_not_counted_among_those_kept(tmp_path):
    store = filled(tmp_path, 8, 16, 24, 32)
    for images in (24, 32):
        flip_a_byte(store.folder / name(images))
    store.keep = 2
    assert store.latest(lambda text: None).images_seen == 16
    store.save(20, tensors(20), {})
    assert [n for n in names(store) if n.startswith("images")] == [name(16), name(20)]
    # Damaged a second time, at the same place.
    store.save(24, tensors(24), {})
    flip_a_byte(store.folder / name(24))
    assert store.latest(lambda text: None).images_seen == 20


def test_when_all_are_damaged_the_run_does_not_start_anew_by_itself(tmp_path):
    store = filled(tmp_path, 8, 16)
    for images in (8, 16):
        truncate(store.folder / name(images))
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is whole; move the folder away"):
            store.latest(lambda text: None)
    assert names(store) == [name(8), name(16)]


def test_leftovers_of_interrupted_saves_are_removed(tmp_path):
    store = filled(tmp_path, 8)
    shutil.copytree(store.folder / name(8), store.folder / f".{name(16)}.writing")
    assert store.latest().images_seen == 8
    assert names(store) == [name(8)]


def test_a_checkpoint_that_is_not_written_in_the_background_stands_when_save_returns(tmp_path):
    store = CheckpointStore(tmp_path, 2)
    assert store.save(8, tensors(8), {}) == tmp_path / name(8) and verify(tmp_path / name(8)) is None


# ------------------------------------------------------------------------------------ disks and kills


@contextmanager
def largest_file(size):
    """The system itself refuses longer files: what a full disk is to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# safetensors reports the failure of its own file in another way than Python does that of state.json.
@pytest.mark.parametrize("state", [{}, {"long": "x" * 5000}], ids=["model.safetensors", "state.json"])
def test_a_write_that_fails_is_one_clear_error_and_leaves_the_others_whole(tmp_path, state):
    store = filled(tmp_path, 8, 16)
    small = {"model": {"a": torch.zeros(1)}} if state else {"model": {"a": torch.zeros(5000)}}
    with largest_file(2000), pytest.raises(UserError) as caught:
        store.save(24, small, state)
    (line,) = str(caught.value).splitlines()
    assert f"cannot write the checkpoint {store.folder / name(24)}: " in line
    assert "File too large" in line and "the checkpoints before it are untouched" in line
    assert names(store) == [name(8), name(16)] and store.latest().images_seen == 16
    store.save(24, small, state)
    assert store.latest().images_seen == 24


def test_a_folder_that_cannot_be_made_is_the_same_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*: (Not a directory|File exists) \(free some"):
        CheckpointStore(tmp_path / "checkpoints", 2).save(8, tensors(8), {})


def _save_for_ever(folder):
    store = CheckpointStore(folder, 2)
    start = store.latest(lambda text: None)
    number = start.images_seen if start else 0
    while True:
        number += 8
        store.save(number, tensors(number), {})


class Gate:
    """Holds back every file of a checkpoint until it is opened."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.begun = threading.Event()
        really = checkpoint.save_file

        def save_file(*given):
            self.begun.set()
            assert self.open.wait(20)
            really(*given)

        monkeypatch.setattr(checkpoint, "save_file", save_file)


def test_a_background_save_keeps_what_was_there_when_it_began(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    store, given = CheckpointStore(tmp_path, 2), tensors(8)
    store.save(8, given, {}, background=True)
    assert gate.begun.wait(20) and not (tmp_path / name(8)).exists()
    for values in given.values():
        for tensor in values.values():
            tensor.add_(1)
    second = threading.Thread(target=store.save, args=(16, tensors(16), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not (tmp_path / f".{name(16)}.writing").exists(), "one at a time"
    gate.open.set()
    second.join(20)
    store.wait()
    assert names_in(tmp_path) == [name(8), name(16)]
    for part, expected in tensors(8).items():
        assert_equal(open_checkpoint(tmp_path / name(8)).tensors(part), expected)
    assert verify(tmp_path / name(8)) is None


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_goes_wrong_in_the_background_is_said_once(tmp_path):
    store = filled(tmp_path, 8)
    with largest_file(100):
        store.save(16, tensors(16), {}, background=True)
        store._writer.join()
    assert store.failed and names(store) == [name(8)]
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*images-000000000016: .*free some space"):
        store.save(24, tensors(24), {})
    assert not store.failed
    store.wait()
    store.save(24, tensors(24), {})
    assert names(store) == [name(8), name(24)]


def test_a_run_that_cannot_be_saved_ends(fruit_shards, fresh_accelerate, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, fruit_shards, intervals={"checkpoint": 8})
    really = checkpoint.save_file

    def save_file(values, path):
        if "000000000024" in str(path):
            raise OSError(28, "No space left on device")
        really(values, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*images-000000000024: No space left on device"):
        trainer.train()
    assert trainer.images_seen == 32, "at the next batch or save, whichever learns of it first"
    assert trainer.store.latest().images_seen == 16


def test_a_program_that_ends_finishes_its_checkpoint(tmp_path):
    program = f"""
import torch, time
from pathlib import Path
from letit_dist.training import checkpoint
hashed = checkpoint.hash_file
checkpoint.hash_file = lambda path: (time.sleep(0.3), hashed(path))[1]
store = checkpoint.CheckpointStore(Path({str(tmp_path)!r}), 2)
store.save(8, {{"model": {{"a": torch.ones(3)}}}}, {{}}, background=True)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 3
    assert CheckpointStore(tmp_path, 2).latest().images_seen == 8


def test_a_kill_at_any_moment_loses_the_save_it_falls_into_and_no_other(tmp_path):
    fork, chance, leftovers, newest = multiprocessing.get_context("fork"), random.Random(0), 0, 0
    for _ in range(12):
        process = fork.Process(target=_save_for_ever, args=(tmp_path,), daemon=True)
        process.start()
        while max((path.name for path in tmp_path.glob("images-*")), default="") <= name(newest):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        whole = sorted(tmp_path.glob("images-*"))
        leftovers += len(list(tmp_path.glob(".*.writing")))
        # Whatever has its final name is whole, unless the kill fell into its removal, which never meets the newest.
        said = []
        found = CheckpointStore(tmp_path, 2).latest(said.append)
        assert said == [] and found.folder == whole[-1] and found.images_seen > newest
        assert_equal(found.tensors("model"), tensors(found.images_seen)["model"])
        assert not list(tmp_path.glob(".*"))
        newest = found.images_seen
    assert leftovers > 0, "no kill fell into a save: the test says nothing"


# ------------------------------------------------------------------------------------ the trainer's side


def test_the_trainer_falls_back_to_the_checkpoint_before_a_damaged_one(
    fruit_shards, fresh_accelerate, tmp_path, capsys
):
    whole = tiny_trainer(tmp_path, fruit_shards)
    whole.train()
    flip_a_byte(tmp_path / "checkpoints" / name(128))
    again = tiny_trainer(tmp_path, fruit_shards)
    assert again.train() == 0
    out = capsys.readouterr().out
    assert f"checkpoint {name(128)} is damaged" in out and "resumed at 96 of 128 images" in out
    assert_equal(everything(again), everything(whole))


def checkpoint_of(recipe, folder):
    CheckpointStore(folder, 2).save(8, {"model": recipe.state_dict()}, {})
    return open_checkpoint(folder / name(8))


def recipe_of(**changes):
    config = VQVAE2RecipeConfig(optimizer=OptimizerConfig(learning_rate=1e-3))
    return VQVAE2Recipe(config, tiny_autoencoder(**changes), seed=0, precision="fp32")


def test_a_checkpoint_of_another_architecture_is_refused_and_nothing_is_loaded(tmp_path):
    checkpoint = checkpoint_of(recipe_of(), tmp_path)
    other = recipe_of(seed=1, noise=True, codes=32)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_exactly(other, checkpoint.tensors("model"), checkpoint.folder)
    text = str(caught.value)
    assert "missing autoencoder.decoder.noise.weight (1,)" in text
    assert "autoencoder.top_quantizer.embed: expected shape (32, 4), got (16, 4)" in text
    assert_equal(dict(other.state_dict()), before)


def test_the_checkpoint_of_another_kind_of_run_is_refused(fruit_shards, fruit_latents, fresh_accelerate, tmp_path):
    tiny_trainer(tmp_path, fruit_shards, training={"images": 8}).train()
    with pytest.raises(UserError, match=r"missing energy\.stem\.weight.*(\n.*)*unexpected autoencoder\."):
        tiny_energy_trainer(tmp_path, fruit_latents).train()


def test_a_checkpoint_without_an_average_is_refused_by_a_run_with_one(fruit_shards, fresh_accelerate, tmp_path):
    tiny_trainer(tmp_path, fruit_shards, training={"images": 8, "ema_half_life": None}).train()
    with pytest.raises(UserError, match=r"holds no average\.safetensors"):
        tiny_trainer(tmp_path, fruit_shards).train()


def test_nothing_but_safetensors_and_json_is_written(fruit_shards, fresh_accelerate, tmp_path):
    tiny_trainer(tmp_path, fruit_shards, training={"images": 8}).train()
    found = {path for _, _, files in os.walk(tmp_path / "checkpoints") for path in files}
    assert found == {"model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
