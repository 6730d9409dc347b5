"""The judge of domain and factors: what it learns from, what it sees, and when a kept one is used."""

import json

import pytest
import torch
from fruit_judge import contents, pack
from programs import files

from letit_dist.data.reader import ShardDataset
from letit_dist.data.synthetic import CONTENT_FACTORS, sample_factors
from letit_dist.data.transforms import to_images
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError
from letit_dist.evaluation import attributes
from letit_dist.evaluation.attributes import (
    judge_images,
    load_or_train_judge,
    read_examples,
    read_factors,
    train_judge,
)


def test_examples(fruit64, examples):
    assert examples.pixels.shape == (200, 3, 64, 64) and examples.pixels.dtype == torch.uint8
    assert examples.domain.tolist() == [0] * 100 + [1] * 100
    assert examples.names == tuple(sorted(CONTENT_FACTORS))
    source = fruit64["train"][0]
    assert torch.equal(examples.pixels[7], source.pixels(7))
    content = source.json(7)["factors"]["content"]
    torch.testing.assert_close(examples.factors[7], torch.tensor([content[name] for name in examples.names]))


def test_the_factors_of_the_packed_fruit_are_found(fruit_shards):
    """What shards/pack.py writes is what the judge reads."""
    factors, names = read_factors(ShardDataset([fruit_shards / "apple/train"]))
    assert names == tuple(sorted(CONTENT_FACTORS)) and factors.shape == (24, len(names))
    expected = sample_factors("apple", 0, 3).content
    torch.testing.assert_close(factors[3], torch.tensor([expected[name] for name in names]))


def test_factors_that_differ_between_samples_are_refused(tmp_path):
    with ShardWriter(tmp_path / "a") as writer:
        for number, content in enumerate(({"x": 0.5}, {"x": 0.1, "y": 0.2})):
            writer.write(str(number), {"json": json.dumps({"factors": {"content": content}}).encode()})
    with pytest.raises(UserError, match=r": 1\.json: factors\.content has x, y; the first sample has x"):
        read_factors(ShardDataset([tmp_path / "a"]))


def test_the_judge_reads_images_it_has_not_seen(judge, fruit64, fruit64_images):
    factors, names = read_factors(fruit64["test"])
    assert names == judge.names
    apples = judge_images(judge, fruit64_images["test"], factors)
    oranges = judge_images(judge, fruit64_images["pairs"], factors.flip(0))
    assert 0.5 * (1 - apples["target_accuracy"] + oranges["target_accuracy"]) > 0.9
    for scores in (apples, oranges):
        # Guessing the mean of uniform factors is wrong by 0.25.
        assert scores["content_error"] < 0.16
        assert max(scores["error_x"], scores["error_y"], scores["error_size"]) < 0.15
        errors = [scores[f"error_{name}"] for name in names]
        assert scores["content_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        seen = judge.factors(fruit64_images["test" if scores is apples else "pairs"]).T
        truth = (factors if scores is apples else factors.flip(0)).T
        pairs = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(seen, truth, strict=True)]
        assert scores["content_correlation"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    swapped = judge_images(judge, fruit64_images["pairs"], factors)  # the contents in the wrong order
    assert swapped["content_correlation"] < 0.5 * oranges["content_correlation"]
    assert swapped["content_error"] > 2 * oranges["content_error"]


def test_chunks_change_no_score(judge, fruit64, fruit64_images):
    factors, _ = read_factors(fruit64["test"])
    whole = judge_images(judge, fruit64_images["test"], factors)
    assert judge_images(judge, fruit64_images["test"], factors, chunk=7) == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_the_judge_sees_other_sizes(judge, fruit64_images):
    large = torch.nn.functional.interpolate(fruit64_images["pairs"], scale_factor=2)
    assert judge.domain(large).gt(0.5).float().mean() > 0.9


def test_blur_as_an_autoencoder_makes_decides_nothing(judge, fruit64_images):
    blurred = attributes._degrade(fruit64_images["test"], torch.ones(40))
    assert (blurred - fruit64_images["test"]).abs().mean() > 0.005
    assert judge.domain(blurred).gt(0.5).float().mean() < 0.25
    assert torch.equal(attributes._degrade(fruit64_images["test"], torch.full((40,), 0.4)), fruit64_images["test"])


def test_training_is_deterministic(examples):
    states = []
    for _ in range(2):
        torch.manual_seed(len(states))  # whatever was drawn before
        states.append(train_judge(examples, steps=3, batch=8).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = train_judge(examples, steps=3, batch=8, seed=1).state_dict()
    assert not torch.equal(states[0]["classifier.0.weight"], other["classifier.0.weight"])


def test_one_step_is_enough_to_run(examples):
    assert train_judge(examples, steps=1, batch=4).domain(torch.zeros(2, 3, 64, 64)).shape == (2,)


def test_without_factors_there_is_no_regressor(tmp_path, fruit64):
    plain = pack(tmp_path / "plain", "orange", contents(4, 0), factors=False)
    examples = read_examples(fruit64["train"][0], plain)
    assert examples.factors is None and examples.names == ()
    judge = train_judge(examples, steps=1, batch=4)
    images = to_images(examples.pixels[:3])
    assert set(judge_images(judge, images, torch.zeros(3, 8))) == {"target_accuracy"}
    with pytest.raises(ValueError, match="no factors"):
        judge.factors(images)


def test_a_kept_judge_is_used_for_the_same_data_and_settings_only(examples, fruit64, tmp_path, monkeypatch):
    def state(examples=examples, **settings):
        judge = load_or_train_judge(examples, tmp_path / "judge", **{"steps": 1, **settings})
        assert not judge.training and not any(p.requires_grad for p in judge.parameters())
        return judge.state_dict()

    first, kept = state(), files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(attributes, "train_judge", pytest.fail)  # not trained again
        again = state()
    assert all(torch.equal(first[name], again[name]) for name in first) and files(tmp_path) == kept
    exchanged = read_examples(*fruit64["train"][::-1])
    assert exchanged.stamp != examples.stamp
    for changed in ({"seed": 1}, {"steps": 2}, {"examples": exchanged}):
        other = state(**changed)
        assert not torch.equal(other["classifier.0.weight"], first["classifier.0.weight"])
        again = state()
        assert all(torch.equal(first[name], again[name]) for name in first)
