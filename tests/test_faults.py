"""What may go wrong in the middle of a run, and what is left of it then."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, assert_equal, everything, stats_of, tiny_energy_trainer, tiny_trainer

from letit_dist.energy.langevin import LangevinConfig
from letit_dist.errors import UserError, reports_errors


class FaultyFeed:
    """The feed it wraps, with one batch changed by a function."""

    def __init__(self, feed, at, change):
        self.feed, self.at, self.change = feed, at, change

    def batches(self, *place):
        """The wrapped batches."""
        for number, batch in enumerate(self.feed.batches(*place)):
            yield self.change(batch) if number in self.at else batch

    def preview(self, count):
        """The wrapped preview."""
        return self.feed.preview(count)


def with_nan(batch):
    """The last sample of the batch, in its last microbatch, is not a number."""
    images = batch.data["images"].clone()
    images[-1, 0, 3, 3] = float("nan")
    return replace(batch, data={"images": images})


@pytest.mark.parametrize("microbatch", [8, 2])
def test_a_loss_that_is_not_finite_changes_nothing(fruit_shards, fresh_accelerate, tmp_path, microbatch):
    training = {"microbatch": microbatch}
    until = tiny_trainer(tmp_path / "until", fruit_shards, training={**training, "images": 56})
    until.train()
    trainer = tiny_trainer(
        tmp_path / "faulty", fruit_shards, training=training, feed=lambda feed: FaultyFeed(feed, [7], with_nan)
    )
    with pytest.raises(UserError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "the loss of phase 'reconstruct' is not finite at 56 images (this rank: nan); the weights were not changed "
        "by it and the newest checkpoint is at 48 images. The same command with a lower "
        "recipe.optimizer.learning_rate goes on from there"
    )
    assert trainer.images_seen == 56
    assert_equal(everything(trainer), everything(until))
    assert all(parameter.grad is None for parameter in trainer.recipe.parameters())
    for quantizer in (trainer.recipe.autoencoder.top_quantizer, trainer.recipe.autoencoder.bottom_quantizer):
        assert quantizer._sums is None
    # An update now would be one of an empty batch: no code was used.
    assert all(stats.usage == 0 for stats in trainer.recipe.autoencoder.update_codebooks().values())


def test_the_same_before_the_first_checkpoint(fruit_shards, fresh_accelerate, tmp_path):
    trainer = tiny_trainer(tmp_path, fruit_shards, feed=lambda feed: FaultyFeed(feed, [0], with_nan))
    with pytest.raises(
        UserError, match=r"is not finite at 0 images .* none is saved yet\. .*learning_rate begins again$"
    ):
        trainer.train()


def as_it_is(batch):
    return batch


def swapped(batch):
    """Source and target change places."""
    data = {f"target.{field}": batch.data[f"source.{field}"] for field in ("top", "bottom")}
    data |= {f"source.{field}": batch.data[f"target.{field}"] for field in ("top", "bottom")}
    return replace(batch, data=data)


@pytest.mark.parametrize(("change", "sign"), [(as_it_is, "-0"), (swapped, "0")])
def test_a_loss_beyond_its_limit_is_refused_in_the_same_way(fruit_latents, fresh_accelerate, tmp_path, change, sign):
    # Chains of no steps: the loss is E(target) - E(source), whose sign changes with the sides.
    recipe = {"loss_limit": 1000.0, "langevin": LangevinConfig(steps=0, step_size=1.0)}
    until = tiny_energy_trainer(tmp_path / "until", fruit_latents, training={"images": 16}, recipe=recipe)
    until.train()

    def lower_the_limit(batch):
        trainer.recipe.loss_limit = 1e-5
        return change(batch)

    trainer = tiny_energy_trainer(
        tmp_path / "limited",
        fruit_latents,
        feed=lambda feed: FaultyFeed(feed, [2], lower_the_limit),
        recipe=recipe,
    )
    assert trainer.recipe.loss_limit == 1000
    with pytest.raises(UserError) as caught:
        trainer.train()
    text = str(caught.value)
    assert f"'energy' is not finite or beyond recipe.loss_limit 1e-05 at 16 images (this rank: {sign}." in text
    assert "; or lower recipe.langevin.step_size, or give recipe.l2 a small weight, in a new folder" in text
    assert_equal(everything(trainer), everything(until))


def test_bad_samples_past_the_share_stop_the_run_and_it_is_saved(fruit_shards, fresh_accelerate, tmp_path, capsys):
    def rotten(batch):
        return replace(batch, bad=(("some-key", "truncated"),) * 3)

    def build(run, **options):
        return tiny_trainer(run, fruit_shards, feed=lambda feed: FaultyFeed(feed, [1, 3, 4], rotten), **options)

    trainer = build(tmp_path / "strict", max_bad_fraction=0.008)
    with pytest.raises(UserError) as caught:
        trainer.train()
    # The share is taken of 1000 samples at least: 8 are allowed.
    assert str(caught.value).startswith(
        "9 of 40 samples could not be read, data.max_bad_fraction allows 0.008: check the shards"
    )
    assert trainer.store.latest().images_seen == 40 and trainer.store.latest().state["bad_samples"] == 9
    captured = capsys.readouterr()
    assert captured.err.count("unreadable sample replaced: some-key: truncated\n") == 9

    patient = build(tmp_path / "patient", max_bad_fraction=0.009)
    assert patient.train() == 0
    assert [line["bad_samples"] for line in stats_of(patient.run)] == [9, 9, 9, 9]
    whole = tiny_trainer(tmp_path / "whole", fruit_shards)
    whole.train()
    assert_equal(everything(patient), everything(whole))
    # What was counted is counted still after a resume, and no batch is needed to say so again.
    again = tiny_trainer(tmp_path / "strict", fruit_shards, max_bad_fraction=0.008)
    with pytest.raises(UserError, match="9 of 48 samples"):
        again.train()


# ------------------------------------------------------------------------------------------- programs


@pytest.fixture
def program():
    """program(message or exception): what a program that ends in that way returns."""

    def run(error):
        @reports_errors
        def main(argv=None):
            """What it is for."""
            if error is not None:
                raise error
            return argv

        assert main.__doc__ == "What it is for."
        return main(0 if error is None else None)

    return run


def test_a_user_error_is_one_line_each_and_exit_code_2(program, capsys):
    assert program(UserError("a: wrong\nb: also wrong")) == 2
    assert capsys.readouterr().err == "error: a: wrong\nerror: b: also wrong\n"


def test_several_ranks_say_which_they_are(program, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert program(UserError("wrong")) == 2
    assert capsys.readouterr().err == "[rank 3] error: wrong\n"


def test_other_errors_keep_their_traceback_and_codes_pass_through(program):
    with pytest.raises(ZeroDivisionError):
        program(ZeroDivisionError())
    assert program(None) == 0
    assert program(BrokenPipeError()) == 1
    assert reports_errors(lambda: 75)() == 75 and reports_errors(lambda: None)() == 0


def test_a_program_answers_a_wrong_configuration_without_a_traceback(tmp_path):
    (tmp_path / "c.yaml").write_text("trainin: {}\n")
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), str(tmp_path / "c.yaml"), "--check"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    assert any("trainin: unknown key, did you mean 'training'?" in line for line in lines)
