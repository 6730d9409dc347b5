"""The loop, its feeds and its batch arithmetic."""

from itertools import pairwise

import pytest
import torch
from conftest import everything, stats_of, tiny_energy_trainer, tiny_trainer
from PIL import Image
from torch import nn

from letit_dist.cards import Card
from letit_dist.data.latents import LatentSet
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError
from letit_dist.ranks import launched_ranks
from letit_dist.recipes.base import Batch, Level, OptimizerConfig, Phase, Recipe, RecipeConfig, StepResult
from letit_dist.schemas import ImagesConfig, IntervalsConfig, TrainingConfig
from letit_dist.training.feeds import ImageFeed, LatentFeed
from letit_dist.training.plan import BatchPlan, plan_batches, timetable
from letit_dist.training.run import export
from letit_dist.training.setup import create_accelerator, main_decides, seed_weights
from letit_dist.training.trainer import Trainer

# ------------------------------------------------------------------------------------------- batches


def training(**changes):
    return TrainingConfig(**{"images": 64, "batch": 24, **changes})


def test_the_arithmetic_of_a_batch():
    (plan,) = plan_batches(training(microbatch=3), ranks=4)
    assert (plan.per_rank, plan.microbatch, plan.accumulation) == (6, 3, 2)
    assert str(plan) == "24 = 4 ranks x 3 images x 2 accumulation"
    assert str(plan_batches(training(), ranks=1)[0]) == "24 = 1 rank x 24 images x 1 accumulation"


@pytest.mark.parametrize(("limit", "taken"), [(1, 1), (5, 4), (6, 6), (11, 6), (12, 12), (24, 12)])
def test_a_microbatch_is_an_upper_limit_and_divides(limit, taken):
    assert plan_batches(training(microbatch=limit), ranks=2)[0].microbatch == taken


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 5, r"training.batch: 24 images do not divide over 5 ranks \(try 20 or 25\)"),
        ({"batch": 3}, 5, r"training.batch: 3 images do not divide over 5 ranks \(try 5\)"),
        ({"batch": (24, 16)}, 2, r"training.batch: 2 values, but this recipe does not grow: give 1"),
        ({"microbatch": (2, 2)}, 2, r"training.microbatch: 2 values, but this recipe does not grow: give 1"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_what_would(changes, ranks, message):
    with pytest.raises(UserError, match=message):
        plan_batches(training(**changes), ranks)


def test_levels_have_their_own_batches_and_a_timetable():
    plans = plan_batches(training(batch=(8, 4, 2), microbatch=(3, 8, 1)), ranks=2, levels=3)
    assert plans == [BatchPlan(8, 2, 2), BatchPlan(4, 2, 2), BatchPlan(2, 2, 1)]
    with pytest.raises(UserError, match=r"training.batch: 2 values, but the network grows over 3 levels: give 3, or"):
        plan_batches(training(batch=(8, 4)), ranks=2, levels=3)
    levels = [Level(0, 4), Level(20, 8), Level(30, 16)]
    # The third batch of 8 reaches into the second level; no level loses or repeats an image.
    assert timetable(levels, plans, images=40) == [
        "level 0: 4 pixels from 0 images on, batch: 8 = 2 ranks x 2 images x 2 accumulation, 3 steps, 24 images",
        "level 1: 8 pixels from 24 images on, batch: 4 = 2 ranks x 2 images x 1 accumulation, 2 steps, 8 images",
        "level 2: 16 pixels from 32 images on, batch: 2 = 2 ranks x 1 images x 1 accumulation, 4 steps, 8 images",
        "steps: 9, 40 images",
    ]
    assert timetable([Level()], plans[:1], images=20) == ["batch: " + str(plans[0]), "steps: 3, 24 images"]


def run_in_double(build, tmp_path, microbatch):
    trainer = build(
        tmp_path / f"micro{microbatch}",
        training={"precision": "fp64", "microbatch": microbatch, "images": 64},
        intervals={"report": 32},
    )
    assert trainer.train() == 0
    return everything(trainer), stats_of(trainer.run)


@pytest.mark.parametrize("kind", ["vqvae2", "latent_energy"])
def test_the_microbatch_changes_no_result(kind, fruit_shards, fruit_latents, fresh_accelerate, tmp_path):
    def build(run, **changes):
        if kind == "vqvae2":
            return tiny_trainer(run, fruit_shards, **changes)
        return tiny_energy_trainer(run, fruit_latents, **changes)

    (one, stats_one), (many, stats_many) = (run_in_double(build, tmp_path, size) for size in (8, 2))
    assert {value.dtype for name, value in one.items() if not name.startswith("step/")} <= {torch.float64, torch.int64}
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(stats_one, stats_many, strict=True):
        assert a == pytest.approx(b, abs=1e-11)
    # The comparison is sharper than anything but arithmetic: in float32 the two runs do differ.
    assert any(not torch.equal(many[name], one[name]) for name in one)


# ------------------------------------------------------------------------------------------- the loop


class TwoNetsConfig(RecipeConfig):
    kind: str = "two_nets"


class TwoNets(Recipe):
    """Two linear networks; each has its phase, and both enter both losses, as in adversarial training."""

    phases = (Phase("first", ("a",)), Phase("second", ("b",), every=3))

    def __init__(self, **optimizer):
        config = TwoNetsConfig(optimizer=OptimizerConfig(**{"learning_rate": 0.1, **optimizer}))
        super().__init__(config, seed=0, precision="fp32")
        seed_weights(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)
        self.seen, self.gradients = [], []

    def step(self, phase, batch):
        colours = batch.data["images"].mean((2, 3))
        self.seen.append((phase, batch.images_seen, self.a.weight.detach().clone(), self.b.weight.detach().clone()))
        loss = self.b(self.a(colours)).square().mean()
        if phase == "first":
            self.gradients += torch.autograd.grad(loss, self.a.weight, retain_graph=True)
        return StepResult(loss, {f"saw_{phase}": torch.tensor(1.0)})

    def after_batch(self, batch):
        self.seen.append(("after", batch.images_seen, self.a.weight.detach().clone(), self.b.weight.detach().clone()))
        return {"after": 2.0}

    def samples(self, batch):
        return {"image": batch.data["images"]}

    def save(self, folder, **extra):
        raise NotImplementedError


@pytest.fixture
def two_nets(fruit_shards, fresh_accelerate, tmp_path):
    """two_nets(images=...): a Trainer of TwoNets in batches of 4."""

    def build(images=24, ema=None, intervals=None, **optimizer):
        fresh_accelerate()
        (tmp_path / "run").mkdir(exist_ok=True)
        return Trainer(
            create_accelerator(several_phases=True),
            TwoNets(**optimizer),
            ImageFeed(ImagesConfig(train=(str(fruit_shards / "apple/train"),), workers=0), seed=0),
            run=tmp_path / "run",
            training=TrainingConfig(images=images, batch=4, ema_half_life=ema, ema_warmup=0),
            intervals=IntervalsConfig(**{"report": 8, "samples": 1000, "checkpoint": 1000, **(intervals or {})}),
        )

    return build


def test_each_phase_moves_its_own_networks_when_its_turn_comes(two_nets):
    trainer = two_nets()
    assert trainer.train() == 0
    seen = trainer.recipe.seen
    # Six batches; the second phase at batches 0 and 3, after the first phase.
    assert [phase for phase, *_ in seen] == ["first", "second", "after", *["first", "after"] * 2] * 2
    assert [images for phase, images, *_ in seen if phase == "after"] == [0, 4, 8, 12, 16, 20]
    for (phase, _, a, b), (_, _, a_next, b_next) in pairwise(seen):
        assert torch.equal(a, a_next) == (phase != "first")
        assert torch.equal(b, b_next) == (phase != "second")


def test_a_batch_in_which_no_phase_has_its_turn_moves_nothing_and_counts(two_nets):
    trainer = two_nets(ema=8)
    trainer.recipe.phases = (Phase("first", ("a",), every=2), Phase("second", ("b",), every=3))
    assert trainer.train() == 0 and trainer.images_seen == 24
    seen = trainer.recipe.seen
    turns = ["first", "second", "after", "after", "first", "after", "second", "after", "first", "after", "after"]
    assert [phase for phase, *_ in seen] == turns
    assert [line["after"] for line in stats_of(trainer.run)] == [2.0, 2.0, 2.0]
    # Batches 1 and 5 are those without any: what the next one finds is what they found.
    after = {images: (a, b) for phase, images, a, b in seen if phase == "after"}
    for batch in (4, 20):
        assert all(map(torch.equal, after[batch], after[batch - 4]))


def test_phases_go_on_in_their_rhythm_after_a_resume(two_nets):
    whole = two_nets()
    whole.train()
    last = whole.recipe.seen[-1]
    checkpoints = whole.run / "checkpoints"
    checkpoints.rename(whole.run / "unused")
    two_nets(images=8).train()
    again = two_nets()
    again.train()
    assert [(phase, images) for phase, images, *_ in again.recipe.seen] == [
        (phase, images) for phase, images, *_ in whole.recipe.seen if images >= 8
    ]
    assert torch.equal(again.recipe.seen[-1][2], last[2]) and torch.equal(again.recipe.seen[-1][3], last[3])


def test_a_batch_is_one_step_of_descent_at_the_rate_of_its_first_image(two_nets):
    trainer = two_nets(images=16, warmup=10, kind="sgd", intervals={"report": 4})
    rates = [0.1 * min(1, (images + 1) / 10) for images in (0, 4, 8, 12)]
    trainer.train()
    assert [line["learning_rate"] for line in stats_of(trainer.run)] == pytest.approx(rates)
    weights = [a for phase, _, a, _ in trainer.recipe.seen if phase == "first"]
    for batch in range(3):
        moved = weights[batch] - weights[batch + 1]
        assert moved.abs().max() > 1e-4
        torch.testing.assert_close(moved, rates[batch] * trainer.recipe.gradients[batch], atol=1e-7, rtol=0)


def test_lines_and_pictures_and_checkpoints_come_at_their_intervals(two_nets, capsys):
    trainer = two_nets(images=40, intervals={"report": 10, "samples": 16, "checkpoint": 12, "keep": 9})
    trainer.train()
    lines = stats_of(trainer.run)
    # Batches of 4: the first batch end at or past each multiple of the interval, and the end of the run.
    assert [line["images_seen"] for line in lines] == [12, 20, 32, 40]
    names = [f"images-{images:012d}" for images in (0, 16, 32, 40)]
    assert sorted(path.name for path in (trainer.run / "samples").iterdir()) == [f"{name}.png" for name in names]
    assert Image.open(trainer.run / "samples" / f"{names[0]}.png").format == "PNG"
    checkpoints = sorted(path.name for path in (trainer.run / "checkpoints").iterdir())
    assert checkpoints == [f"images-{images:012d}" for images in (12, 24, 36, 40)]
    assert set(lines[0]) == {
        "images_seen",
        "loss_first",
        "loss_second",
        "saw_first",
        "saw_second",
        "after",
        "learning_rate",
        "bad_samples",
    }
    assert lines[0]["after"] == 2.0 and lines[0]["saw_second"] == 1.0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[0].lstrip().startswith("12/40 images  loss_first 0.")


def test_a_run_ends_with_the_batch_that_reaches_its_length(two_nets):
    trainer = two_nets(images=10)
    assert trainer.train() == 0 and trainer.images_seen == 12
    assert trainer.store.latest().images_seen == 12


def test_the_average_is_what_is_pictured_and_exported(fruit_shards, fresh_accelerate, tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, fruit_shards, training={"images": 24})
    trainer.train()
    assert trainer.trained is trainer.average.module is not trainer.recipe
    folder = export(trainer, Card(), data="d", note="x")
    assert folder == tmp_path / "export" / f"images-{24:012d}" and f"exported to {folder}" in capsys.readouterr().out
    from letit_dist.autoencoders.base import load_autoencoder
    from letit_dist.pretrained import read_extra

    assert load_autoencoder(folder).fingerprint() == trainer.average.module.autoencoder.fingerprint()
    assert load_autoencoder(folder).fingerprint() != trainer.recipe.autoencoder.fingerprint()
    assert read_extra(folder) == {"images_seen": 24, "note": "x"}
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    export(trainer, Card(), data="d")
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_without_an_average_the_weights_are_the_result(fruit_shards, fresh_accelerate, tmp_path):
    trainer = tiny_trainer(tmp_path, fruit_shards, training={"ema_half_life": None})
    assert trainer.average is None and trainer.trained is trainer.recipe


@pytest.mark.parametrize("ema", [100.0, None])
def test_pictures_leave_the_training_as_it_was(fruit_shards, fresh_accelerate, tmp_path, ema):
    training = {"images": 48, "ema_half_life": ema}
    often = tiny_trainer(tmp_path / "often", fruit_shards, training=training, intervals={"samples": 8})
    never = tiny_trainer(tmp_path / "never", fruit_shards, training=training)
    often.train()
    never.train()
    for name, value in everything(never).items():
        assert torch.equal(everything(often)[name], value), name
    assert len(list((tmp_path / "often" / "samples").iterdir())) == 7
    assert often.recipe.training


def test_all_networks_are_moved_to_the_precision_and_layout_of_the_run(fruit_latents, fresh_accelerate, tmp_path):
    trainer = tiny_energy_trainer(tmp_path, fruit_latents, training={"precision": "fp64"})
    for module in (trainer.recipe, *trainer.recipe.companions):
        floats = [p for p in module.state_dict().values() if p.is_floating_point()]
        assert {p.dtype for p in floats} == {torch.float64}
    assert trainer.recipe.energy.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert trainer.recipe.companions[0].decoder.conv.weight.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------- feeds


def images_feed(shards, seed=7, **changes):
    return ImageFeed(ImagesConfig(**{"train": (str(shards / "apple/train"),), "workers": 0, **changes}), seed=seed)


def take(feed, count, *place):
    stream = feed.batches(*place)
    return [next(stream) for _ in range(count)]


def test_every_division_into_ranks_gives_the_same_global_batches(fruit_shards):
    feed = images_feed(fruit_shards, grayscale=0.3)
    whole = take(feed, 4, 16, 8, 0, 1)
    halves = [take(feed, 4, 16, 8, rank, 2) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        left, right = halves[0][number], halves[1][number]
        assert torch.equal(batch.data["images"], torch.cat([left.data["images"], right.data["images"]]))
        assert torch.equal(batch.positions, torch.cat([left.positions, right.positions]))
        assert batch.positions.tolist() == list(range(16 + 8 * number, 24 + 8 * number))
        assert batch.slots.tolist() == list(range(8)) and right.slots.tolist() == [4, 5, 6, 7]
        assert left.global_batch == 8 and left.images_seen == batch.images_seen == 16 + 8 * number
    assert torch.equal(take(feed, 1, 24, 8, 0, 1)[0].data["images"], whole[1].data["images"])
    assert -1 <= whole[0].data["images"].min() < whole[0].data["images"].max() <= 1
    assert feed.image_size == (32, 32)


def test_images_are_augmented_as_configured(fruit_shards):
    plain, flipped, grey = (
        take(images_feed(fruit_shards, flip=flip, grayscale=share), 1, 0, 24, 0, 1)[0].data["images"]
        for flip, share in ((False, 0.0), (True, 0.0), (False, 1.0))
    )
    mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(plain, flipped, strict=True)]
    kept = [torch.equal(b, a) for a, b in zip(plain, flipped, strict=True)]
    assert 0 < sum(mirrored) < 24 and sum(mirrored) + sum(kept) == 24
    assert torch.equal(grey[:, 0], grey[:, 1]) and not torch.equal(plain[:, 0], plain[:, 1])


def test_the_preview_is_spread_over_the_data_and_not_augmented(fruit_shards):
    feed = images_feed(fruit_shards, grayscale=1.0)
    preview = feed.preview(4)
    expected = [feed.dataset.pixels(sample) for sample in (0, 6, 12, 18)]
    assert torch.equal(preview.data["images"], torch.stack(expected).float() / 127.5 - 1)
    assert preview.size == 4 and len(feed.preview(1000).positions) == 24


@pytest.fixture
def rotten_shards(tmp_path, fruit_shards):
    """Six samples, the first, second and fourth of which cannot be decoded."""
    feed = images_feed(fruit_shards)
    with ShardWriter(tmp_path / "rotten") as writer:
        for number in range(6):
            data = b"not a picture" if number in (0, 1, 3) else feed.dataset.read(number)["png"]
            writer.write(f"k{number}", {"png": data})
    return tmp_path / "rotten"


def test_a_preview_takes_the_next_sample_that_can_be_decoded(rotten_shards):
    feed = ImageFeed(ImagesConfig(train=(str(rotten_shards),), workers=0), seed=0)
    expected = torch.stack([feed.dataset.pixels(sample) for sample in (2, 2, 2, 4, 4, 5)])
    assert torch.equal(feed.preview(8).data["images"], expected.float() / 127.5 - 1)


def test_bad_samples_are_told_with_the_batch_they_were_in(rotten_shards):
    feed = ImageFeed(ImagesConfig(train=(str(rotten_shards),), workers=0), seed=0)
    batches = take(feed, 2, 0, 6, 0, 1)
    for batch in batches:
        assert {"k0", "k1", "k3"} <= {key for key, _ in batch.bad}
        assert all(isinstance(entry, tuple) and len(entry) == 2 for entry in batch.bad)


def test_latents_come_in_pairs_and_the_same_for_every_division(fruit_latents):
    sides = [LatentSet.open(fruit_latents / style) for style in ("apple", "orange")]
    feed = LatentFeed(*sides, seed=3)
    whole = take(feed, 5, 8, 8, 0, 1)
    parts = [take(feed, 5, 8, 8, rank, 4) for rank in range(4)]
    for number, batch in enumerate(whole):
        assert sorted(batch.data) == ["source.bottom", "source.top", "target.bottom", "target.top"]
        for name, value in batch.data.items():
            assert torch.equal(value, torch.cat([part[number].data[name] for part in parts])), name
        assert batch.images_seen == 8 + 8 * number and batch.slots.tolist() == list(range(8))
    # 24 a side: three batches are one epoch of each, in orders of their own.
    seen = torch.cat([batch.data["source.bottom"] for batch in take(feed, 3, 0, 8, 0, 1)]).flatten(1)
    assert sorted(seen.tolist()) == sorted(sides[0].fields["bottom"].long().flatten(1).tolist())
    assert feed.preview(1000).size == 24
    assert torch.equal(feed.preview(4).data["target.top"], sides[1].fields["top"][::6].long())


def test_a_preview_of_unequal_sides_fits_the_smaller_one(fruit_latents):
    sides = [LatentSet.open(fruit_latents / style) for style in ("apple", "orange")]
    sides[1].fields = {name: field[:5] for name, field in sides[1].fields.items()}
    sides[1].keys = sides[1].keys[:5]
    preview = LatentFeed(*sides, seed=3).preview(8)
    assert len(preview.data["source.top"]) == len(preview.data["target.top"]) == preview.size == 5


# ------------------------------------------------------------------------------------------- Batch, accelerator


def test_a_batch_splits_in_order_and_keeps_its_place():
    batch = Batch({"x": torch.arange(6)[:, None]}, torch.arange(60, 66), 58, 12, (("k", "why"),))
    parts = batch.split(2)
    assert [part.positions.tolist() for part in parts] == [[60, 61], [62, 63], [64, 65]]
    assert [part.slots.tolist() for part in parts] == [[2, 3], [4, 5], [6, 7]]
    assert torch.equal(torch.cat([part.data["x"] for part in parts]), batch.data["x"])
    assert all((part.images_seen, part.global_batch) == (58, 12) for part in parts)
    (same,) = batch.split(6)
    assert torch.equal(same.data["x"], batch.data["x"]) and same.bad == batch.bad


def test_moving_a_batch_changes_floats_alone():
    batch = Batch({"maps": torch.zeros(2, 3, 4, 4), "flat": torch.zeros(2, 3), "codes": torch.ones(2, 4, 4).long()},
                  torch.arange(2), 0, 2)  # fmt: skip
    moved = batch.to(torch.device("cpu"), torch.float64, torch.channels_last)
    assert moved.data["maps"].dtype == moved.data["flat"].dtype == torch.float64
    assert moved.data["maps"].is_contiguous(memory_format=torch.channels_last)
    assert moved.data["codes"].dtype == moved.positions.dtype == torch.int64


def test_the_main_process_decides_and_its_error_is_told(fresh_accelerate):
    accelerator = create_accelerator(several_phases=False)
    assert main_decides(accelerator, lambda: "chosen") == "chosen"

    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match=r"^no$"):
        main_decides(accelerator, refuse)


def test_a_world_that_accelerate_does_not_see_is_refused(fresh_accelerate, monkeypatch):
    create_accelerator(several_phases=False)  # of one process, and kept by accelerate
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launched_ranks() == 3
    with pytest.raises(UserError, match="launched 3 processes, but accelerate sees 1"):
        create_accelerator(several_phases=False)


def test_weights_are_a_function_of_the_seed():
    seed_weights(1)
    first = torch.randn(3)
    torch.manual_seed(99)
    seed_weights(1)
    assert torch.equal(torch.randn(3), first)
    seed_weights(2)
    assert not torch.equal(torch.randn(3), first)
