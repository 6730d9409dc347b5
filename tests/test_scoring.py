"""Scores of translators that are perfect, absurd, noisy, and of images that cannot be scored."""

import json
from dataclasses import replace

import pytest
import torch
from fruit_judge import contents, pack
from plain_autoencoders import Pixels

from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import encode, to_images
from letit_dist.data.writer import ShardWriter
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation import attributes
from letit_dist.evaluation.attributes import (
    judge_images,
    read_pixels,
)
from letit_dist.evaluation.frechet import frechet_distance
from letit_dist.evaluation.latents import kernel_distance
from letit_dist.evaluation.report import write_report
from letit_dist.evaluation.scoring import score_translations


class Perfect(Translator):
    """Knows the counterpart of every image."""

    def __init__(self, answers, noise_scale=0.0):
        autoencoder = Pixels(64)
        energy = build_energy(MLPEnergyConfig(layers=0), autoencoder.latent_shape)
        config = LangevinConfig(steps=1, step_size=1.0, noise_scale=noise_scale)
        super().__init__(autoencoder, energy, LangevinSampler(config))
        self.answers = answers

    def transport(self, latents, **settings):
        result = super().transport(latents, **settings)
        if self.answers is None:
            return result
        found = [self.answers[row.numpy().tobytes()] for row in latents]
        return replace(result, latents=torch.stack(found))


def by_method(scores):
    return {row["method"]: row for row in scores.rows}


def test_a_perfect_translator(judge, examples, fruit64, fruit64_images, tmp_path):
    shared = contents(40, 9)
    paired = pack(tmp_path / "paired", "orange", shared, seed=8)
    answers = {
        one.contiguous().numpy().tobytes(): two
        for one, two in zip(fruit64_images["test"], to_images(read_pixels(paired)), strict=True)
    }
    scores = score_translations(Perfect(answers), judge, examples, fruit64["test"], paired, batch=16)
    rows = by_method(scores)
    assert list(rows) == ["real", "reconstruction", "mean shift", "latent energy"]
    assert rows["latent energy"]["target_accuracy"] > 0.9 and rows["latent energy"]["content_error"] < 0.16
    assert rows["latent energy"]["pair_error"] == 0
    assert rows["real"]["target_accuracy"] < 0.2
    shared_keys = ("target_accuracy", "content_error", "content_correlation", "pair_error")
    assert [rows["real"][key] for key in shared_keys] == [rows["reconstruction"][key] for key in shared_keys]
    expected = (fruit64_images["test"] - to_images(read_pixels(paired))).square().mean().sqrt()
    assert rows["real"]["pair_error"] == pytest.approx(expected.item(), rel=1e-5)
    domains = [to_images(examples.pixels[examples.domain == d]) for d in (0, 1)]
    moved = MeanShift.fit(*domains).translate(fruit64_images["test"]).clamp(-1, 1)
    assert rows["mean shift"]["target_accuracy"] == judge_images(judge, moved, None)["target_accuracy"]
    assert torch.equal(scores.images["latent energy"], scores.images["counterpart"])
    # Latents are pixels here.
    answer = to_images(read_pixels(paired))
    way = (answer - fruit64_images["test"]).double()
    assert rows["latent energy"]["displacement"] == pytest.approx(float(way.square().mean().sqrt()), rel=1e-5)
    assert rows["latent energy"]["l2_to_source"] == pytest.approx(
        float(way.flatten(1).norm(dim=1).mean() / 2), rel=1e-5
    )
    assert rows["latent energy"]["latent_kernel"] == pytest.approx(kernel_distance(answer, domains[1]), rel=1e-6)
    assert rows["latent energy"]["latent_frechet"] == pytest.approx(frechet_distance(answer, domains[1]), rel=1e-6)
    assert rows["reconstruction"]["displacement"] == 0 and "displacement" not in rows["real"]
    assert rows["mean shift"]["fit_seconds"] >= 0 and "fit_seconds" not in rows["latent energy"]
    assert all(len(images) == 10 for images in scores.images.values())
    assert all(row["samples"] == 40 for row in scores.rows)
    shown, columns = (
        [cell.strip() for cell in scores.table(whole=whole).splitlines()[0].split("|")[1:-1]] for whole in (False, True)
    )
    few = ["method", "target_accuracy", "content_error", "kept_accuracy", "pair_error", "latent_kernel", "l2_to_source"]
    assert shown == few
    assert columns == [
        "method",
        "target_accuracy",
        "content_error",
        "content_correlation",
        "kept_accuracy",
        "pair_error",
        "latent_frechet",
        "latent_kernel",
        "displacement",
        "l2_to_source",
        "fit_seconds",
        "seconds",
        "mib",
        "samples",
    ]
    write_report(scores, tmp_path / "out")
    write_report(scores, tmp_path / "out")
    lines = (tmp_path / "out/translation.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == scores.rows
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("translation.jsonl", "translation.md", "translation.png")
    ]
    assert (tmp_path / "out/translation.md").read_text() == f"{scores.table(whole=True)}\n"


def test_an_absurd_translator(judge, examples, fruit64, fruit64_images):
    """One and the same orange for everybody: the right domain, and all content lost."""
    orange = fruit64_images["pairs"][0]
    answers = {image.contiguous().numpy().tobytes(): orange for image in fruit64_images["test"]}
    rows = by_method(score_translations(Perfect(answers), judge, examples, fruit64["test"]))
    assert rows["latent energy"]["target_accuracy"] == 1.0
    assert rows["latent energy"]["content_error"] > 2 * rows["real"]["content_error"]
    assert "pair_error" not in rows["latent energy"]


def test_seconds_are_those_of_the_method(judge, examples, fruit64, monkeypatch):
    """Not of the judge, which is slow here."""
    import time

    slow = attributes.judge_images
    monkeypatch.setattr("letit_dist.evaluation.scoring.judge_images", lambda *given: (time.sleep(0.2), slow(*given))[1])
    rows = by_method(score_translations(Perfect(None), judge, examples, fruit64["test"]))
    assert rows["real"]["seconds"] < 0.2


def test_noisy_chains_are_scored_by_place_and_seed(judge, examples, fruit64):
    def images(batch, seed):
        torch.manual_seed(3)  # of the energy
        translator = Perfect(None, noise_scale=0.2)
        return score_translations(translator, judge, examples, fruit64["test"], batch=batch, seed=seed).images

    first, again, other = images(40, 0), images(7, 0), images(40, 1)
    torch.testing.assert_close(first["latent energy"], again["latent energy"])
    assert (first["latent energy"] - other["latent energy"]).abs().mean() > 0.05
    assert torch.equal(first["reconstruction"], other["reconstruction"])


def test_pairs_are_matched_by_key(judge, examples, fruit64, tmp_path):
    """In another order of the shards the same pairs are found; a missing one is named."""
    shared = contents(40, 9)
    with ShardWriter(tmp_path / "backwards", meta={"resolution": 64}) as writer:
        for number in reversed(range(40)):
            pixels = fruit64["test"].pixels(number)
            writer.write(f"fruit-{number}", {"png": encode(pixels)})
    rows = by_method(
        score_translations(Perfect(None), judge, examples, fruit64["test"], ShardDataset([tmp_path / "backwards"]))
    )
    assert rows["real"]["pair_error"] == 0
    few = pack(tmp_path / "few", "orange", shared[:38])
    with pytest.raises(UserError, match=r"--pairs: 2 of 40 test images have no counterpart, e\.g\. 'fruit-38'"):
        score_translations(Perfect(None), judge, examples, fruit64["test"], few)


def test_scores_need_the_factors_of_the_judge(judge, examples, tmp_path):
    plain = pack(tmp_path / "plain", "apple", contents(3, 0), factors=False)
    with pytest.raises(UserError, match="--test has the factors none, --train has background_brightness, "):
        score_translations(Perfect(None), judge, examples, plain)


def test_scores_need_images_of_the_right_size(judge, examples, fruit64, tmp_path):
    small = pack(tmp_path / "small", "apple", contents(3, 0), side=32)
    with pytest.raises(UserError) as error:
        score_translations(Perfect(None), judge, examples, small, small)
    line = "holds images of 32x32, the autoencoder takes 64x64"
    assert str(error.value).splitlines() == [f"--test {line}", f"--pairs {line}"]
