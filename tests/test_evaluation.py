"""Kernel distance, unit, judge, scores and tables against what is known."""

import json
from dataclasses import replace

import pytest
import torch
from plain_autoencoders import Flat, Pixels
from programs import STYLES, files, shared_chain

from letit_dist.autoencoders.base import load_autoencoder
from letit_dist.data.encoding import EncodeOptions, encode_domain
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.data.synthetic import CONTENT_FACTORS, FruitFactors, render, sample_factors
from letit_dist.data.transforms import encode, to_images
from letit_dist.data.writer import ShardWriter
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.models import MLPEnergyConfig, build_energy
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation import attributes
from letit_dist.evaluation.attributes import (
    judge_images,
    load_or_train_judge,
    read_examples,
    read_factors,
    read_pixels,
    train_judge,
)
from letit_dist.evaluation.frechet import frechet_distance
from letit_dist.evaluation.latents import all_latents, compare, kernel_distance, measure_unit
from letit_dist.evaluation.report import write_report
from letit_dist.evaluation.rivals import NAMES, Nearness, fit_rivals
from letit_dist.evaluation.scoring import score_translations
from letit_dist.evaluation.tables import markdown
from letit_dist.pretrained import find_folder


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Latents


def naive_kernel_distance(a, b):
    a, b = ([list(map(float, row)) for row in x.flatten(1).double()] for x in (a, b))

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(rows):
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in a for y in b]
    return within(a) + within(b) - 2 * sum(between) / len(between)


def test_kernel_distance_is_its_definition():
    a, b = draw(7, 2, 3), draw(5, 2, 3, seed=1) + 0.3
    assert kernel_distance(a, b) == pytest.approx(naive_kernel_distance(a, b), rel=1e-12)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-12)


def test_kernel_distance_is_unbiased():
    """Between samples of one distribution it is 0 on average, and of either sign."""
    found = torch.tensor([kernel_distance(draw(12, 4, seed=2 * i), draw(9, 4, seed=2 * i + 1)) for i in range(2000)])
    assert abs(found.mean()) < 4 * found.std() / len(found) ** 0.5
    assert (found < 0).float().mean() > 0.3
    # With the diagonal it would be positive: by what it adds, far beyond the bound above.
    assert found.std() / len(found) ** 0.5 < 0.02
    assert kernel_distance(draw(200, 4), draw(200, 4, seed=1) + 1) > 1


@pytest.fixture(scope="module")
def flat():
    torch.manual_seed(0)
    return Flat(32)


@pytest.fixture(scope="module")
def sides(flat, fruit_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    for style in STYLES:
        shards = ShardDataset([fruit_shards / style / "train"])
        encode_domain(flat, shards, folder / style, EncodeOptions(flip=True))
    return [LatentSet.open(folder / style) for style in STYLES]


def test_all_latents(flat, sides, monkeypatch):
    whole = sides[0].take(range(48))["latent"]
    assert torch.equal(torch.cat(list(all_latents(flat, sides[0]))), whole)
    spread = torch.cat(list(all_latents(flat, sides[0], most=5)))
    assert torch.equal(spread, whole[[0, 9, 19, 28, 38]])
    assert torch.equal(torch.cat(list(all_latents(flat, sides[0], most=99))), whole)
    monkeypatch.setattr("letit_dist.evaluation.latents._CHUNK", 10)
    parts = list(all_latents(flat, sides[0]))
    assert [len(part) for part in parts] == [10, 10, 10, 10, 8] and torch.equal(torch.cat(parts), whole)


def test_latents_come_in_the_precision_of_the_autoencoder(flat, sides):
    """The trainer moves it; stored latents follow."""
    double = Flat(32).double()
    assert {part.dtype for part in all_latents(double, sides[0])} == {torch.float64}
    assert {part.device for part in all_latents(double.to("meta"), sides[0])} == {torch.device("meta")}


def test_latents_from_codes(tmp_path_factory):
    chain = shared_chain(tmp_path_factory)
    autoencoder = load_autoencoder(find_folder(chain.autoencoder))
    side = LatentSet.open(chain.latents("apple"))
    latents = torch.cat(list(all_latents(autoencoder, side)))
    assert torch.equal(latents, autoencoder.latents_from_codes(side.take(range(72))))


def test_the_unit_is_the_standard_deviation_of_all_entries(flat, sides):
    everything = torch.cat([side.take(range(48))["latent"] for side in sides])
    assert measure_unit(flat, *sides) == pytest.approx(everything.std().item(), rel=5e-3)
    assert measure_unit(flat, *sides) == float(f"{everything.double().std(correction=0).item():.3g}")
    few = torch.cat([side.take([0, 24])["latent"] for side in sides])
    assert measure_unit(flat, *sides, most=2) == float(f"{few.double().std(correction=0).item():.3g}")


def test_a_unit_of_zero_is_refused(flat, sides, monkeypatch):
    monkeypatch.setattr(sides[0], "fields", {"latent": torch.full((48, 16), 0.3)})
    with pytest.raises(UserError, match="has not learnt anything yet"):
        measure_unit(flat, sides[0])


def test_comparison_of_methods():
    """Energy |z - 2|^2 / 2, and a target at 2: whoever moves there is as near as the target itself."""
    source, target = draw(120, 4), draw(120, 4, seed=1) + 2
    methods = {"source": lambda z: z, "shifted": lambda z: z + 2}
    rows = compare(
        lambda z: (z - 2).square().sum(1) / 2, methods, iter(source.split(50)), iter(target.split(7)), unit=2.0
    )
    by_name = {row["method"]: row for row in rows}
    assert list(by_name) == ["source", "shifted", "target itself"]
    assert [row["samples"] for row in rows] == [120, 120, 60]
    assert by_name["source"]["energy"] == pytest.approx(10, abs=1) and by_name["shifted"]["energy"] < 2.5
    expected = kernel_distance(source / 2, target[::2] / 2)
    assert by_name["source"]["kernel_distance"] == pytest.approx(expected, rel=1e-6)
    expected = kernel_distance(target[1::2] / 2, target[::2] / 2)
    assert by_name["target itself"]["kernel_distance"] == pytest.approx(expected, rel=1e-6)
    assert abs(by_name["shifted"]["kernel_distance"]) < 0.1 * by_name["source"]["kernel_distance"]


# The judge


def pack(folder, style, contents, seed=0, key="fruit", side=64, factors=True):
    """Shards of one picture for each content, with the look drawn for this style."""
    with ShardWriter(folder, meta={"resolution": side, "domain": style}) as writer:
        for number, content in enumerate(contents):
            look = sample_factors(style, seed, number).look
            drawn = FruitFactors(style, content, look)
            pixels = torch.from_numpy(render(drawn, side)).permute(2, 0, 1)
            note = {"factors": drawn.as_json()} if factors else {"file": "x"}
            writer.write(f"{key}-{number}", {"png": encode(pixels), "json": json.dumps(note).encode()})
    return ShardDataset([folder])


def contents(count, seed):
    return [sample_factors("apple", seed, number).content for number in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Real images at 64 pixels: 200 for training, and 40 contents as apples and as oranges."""
    folder = tmp_path_factory.mktemp("fruit64")
    shared = contents(40, 9)
    return {
        "train": [pack(folder / f"{s}-train", s, contents(100, i), seed=i) for i, s in enumerate(STYLES)],
        "test": pack(folder / "test", "apple", shared, seed=5),
        "pairs": pack(folder / "pairs", "orange", shared[::-1], seed=6),
    }


@pytest.fixture(scope="module")
def examples(data):
    return read_examples(*data["train"])


@pytest.fixture(scope="module")
def judge(examples):
    return train_judge(examples, steps=80, batch=32)


@pytest.fixture(scope="module")
def test_images(data):
    return {name: to_images(read_pixels(data[name])) for name in ("test", "pairs")}


def test_examples(data, examples):
    assert examples.pixels.shape == (200, 3, 64, 64) and examples.pixels.dtype == torch.uint8
    assert examples.domain.tolist() == [0] * 100 + [1] * 100
    assert examples.names == tuple(sorted(CONTENT_FACTORS))
    source = data["train"][0]
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


def test_the_judge_reads_images_it_has_not_seen(judge, data, test_images):
    factors, names = read_factors(data["test"])
    assert names == judge.names
    apples = judge_images(judge, test_images["test"], factors)
    oranges = judge_images(judge, test_images["pairs"], factors.flip(0))
    assert 0.5 * (1 - apples["target_accuracy"] + oranges["target_accuracy"]) > 0.9
    for scores in (apples, oranges):
        # Guessing the mean of uniform factors is wrong by 0.25.
        assert scores["content_error"] < 0.16
        assert max(scores["error_x"], scores["error_y"], scores["error_size"]) < 0.15
        errors = [scores[f"error_{name}"] for name in names]
        assert scores["content_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        seen = judge.factors(test_images["test" if scores is apples else "pairs"]).T
        truth = (factors if scores is apples else factors.flip(0)).T
        pairs = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(seen, truth, strict=True)]
        assert scores["content_correlation"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    swapped = judge_images(judge, test_images["pairs"], factors)  # the contents in the wrong order
    assert swapped["content_correlation"] < 0.5 * oranges["content_correlation"]
    assert swapped["content_error"] > 2 * oranges["content_error"]


def test_chunks_change_no_score(judge, data, test_images):
    factors, _ = read_factors(data["test"])
    whole = judge_images(judge, test_images["test"], factors)
    assert judge_images(judge, test_images["test"], factors, chunk=7) == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_the_judge_sees_other_sizes(judge, test_images):
    large = torch.nn.functional.interpolate(test_images["pairs"], scale_factor=2)
    assert judge.domain(large).gt(0.5).float().mean() > 0.9


def test_blur_as_an_autoencoder_makes_decides_nothing(judge, test_images):
    blurred = attributes._degrade(test_images["test"], torch.ones(40))
    assert (blurred - test_images["test"]).abs().mean() > 0.005
    assert judge.domain(blurred).gt(0.5).float().mean() < 0.25
    assert torch.equal(attributes._degrade(test_images["test"], torch.full((40,), 0.4)), test_images["test"])


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


def test_without_factors_there_is_no_regressor(tmp_path, data):
    plain = pack(tmp_path / "plain", "orange", contents(4, 0), factors=False)
    examples = read_examples(data["train"][0], plain)
    assert examples.factors is None and examples.names == ()
    judge = train_judge(examples, steps=1, batch=4)
    images = to_images(examples.pixels[:3])
    assert set(judge_images(judge, images, torch.zeros(3, 8))) == {"target_accuracy"}
    with pytest.raises(ValueError, match="no factors"):
        judge.factors(images)


def test_a_kept_judge_is_used_for_the_same_data_and_settings_only(examples, data, tmp_path, monkeypatch):
    def state(examples=examples, **settings):
        judge = load_or_train_judge(examples, tmp_path / "judge", **{"steps": 1, **settings})
        assert not judge.training and not any(p.requires_grad for p in judge.parameters())
        return judge.state_dict()

    first, kept = state(), files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(attributes, "train_judge", pytest.fail)  # not trained again
        again = state()
    assert all(torch.equal(first[name], again[name]) for name in first) and files(tmp_path) == kept
    exchanged = read_examples(*data["train"][::-1])
    assert exchanged.stamp != examples.stamp
    for changed in ({"seed": 1}, {"steps": 2}, {"examples": exchanged}):
        other = state(**changed)
        assert not torch.equal(other["classifier.0.weight"], first["classifier.0.weight"])
        again = state()
        assert all(torch.equal(first[name], again[name]) for name in first)


# Scores


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


def test_a_perfect_translator(judge, examples, data, test_images, tmp_path):
    shared = contents(40, 9)
    paired = pack(tmp_path / "paired", "orange", shared, seed=8)
    answers = {
        one.contiguous().numpy().tobytes(): two
        for one, two in zip(test_images["test"], to_images(read_pixels(paired)), strict=True)
    }
    scores = score_translations(Perfect(answers), judge, examples, data["test"], paired, batch=16)
    rows = by_method(scores)
    assert list(rows) == ["real", "reconstruction", "mean shift", "translation"]
    assert rows["translation"]["target_accuracy"] > 0.9 and rows["translation"]["content_error"] < 0.16
    assert rows["translation"]["pair_error"] == 0
    assert rows["real"]["target_accuracy"] < 0.2
    shared_keys = ("target_accuracy", "content_error", "content_correlation", "pair_error")
    assert [rows["real"][key] for key in shared_keys] == [rows["reconstruction"][key] for key in shared_keys]
    expected = (test_images["test"] - to_images(read_pixels(paired))).square().mean().sqrt()
    assert rows["real"]["pair_error"] == pytest.approx(expected.item(), rel=1e-5)
    domains = [to_images(examples.pixels[examples.domain == d]) for d in (0, 1)]
    moved = MeanShift.fit(*domains).translate(test_images["test"]).clamp(-1, 1)
    assert rows["mean shift"]["target_accuracy"] == judge_images(judge, moved, None)["target_accuracy"]
    assert torch.equal(scores.images["translation"], scores.images["counterpart"])
    # Latents are pixels here.
    answer = to_images(read_pixels(paired))
    way = (answer - test_images["test"]).double()
    assert rows["translation"]["displacement"] == pytest.approx(float(way.square().mean().sqrt()), rel=1e-5)
    assert rows["translation"]["l2_to_source"] == pytest.approx(float(way.flatten(1).norm(dim=1).mean() / 2), rel=1e-5)
    assert rows["translation"]["latent_kernel"] == pytest.approx(kernel_distance(answer, domains[1]), rel=1e-6)
    assert rows["translation"]["latent_frechet"] == pytest.approx(frechet_distance(answer, domains[1]), rel=1e-6)
    assert rows["reconstruction"]["displacement"] == 0 and "displacement" not in rows["real"]
    assert rows["mean shift"]["fit_seconds"] >= 0 and "fit_seconds" not in rows["translation"]
    assert all(len(images) == 10 for images in scores.images.values())
    assert all(row["samples"] == 40 for row in scores.rows)
    columns = [cell.strip() for cell in scores.table().splitlines()[0].split("|")[1:-1]]
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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["translation.jsonl", "translation.png"]


def test_an_absurd_translator(judge, examples, data, test_images):
    """One and the same orange for everybody: the right domain, and all content lost."""
    orange = test_images["pairs"][0]
    answers = {image.contiguous().numpy().tobytes(): orange for image in test_images["test"]}
    rows = by_method(score_translations(Perfect(answers), judge, examples, data["test"]))
    assert rows["translation"]["target_accuracy"] == 1.0
    assert rows["translation"]["content_error"] > 2 * rows["real"]["content_error"]
    assert "pair_error" not in rows["translation"]


def test_seconds_are_those_of_the_method(judge, examples, data, monkeypatch):
    """Not of the judge, which is slow here."""
    import time

    slow = attributes.judge_images
    monkeypatch.setattr("letit_dist.evaluation.scoring.judge_images", lambda *given: (time.sleep(0.2), slow(*given))[1])
    rows = by_method(score_translations(Perfect(None), judge, examples, data["test"]))
    assert rows["real"]["seconds"] < 0.2


def test_noisy_chains_are_scored_by_place_and_seed(judge, examples, data):
    def images(batch, seed):
        torch.manual_seed(3)  # of the energy
        translator = Perfect(None, noise_scale=0.2)
        return score_translations(translator, judge, examples, data["test"], batch=batch, seed=seed).images

    first, again, other = images(40, 0), images(7, 0), images(40, 1)
    torch.testing.assert_close(first["translation"], again["translation"])
    assert (first["translation"] - other["translation"]).abs().mean() > 0.05
    assert torch.equal(first["reconstruction"], other["reconstruction"])


def test_pairs_are_matched_by_key(judge, examples, data, tmp_path):
    """In another order of the shards the same pairs are found; a missing one is named."""
    shared = contents(40, 9)
    with ShardWriter(tmp_path / "backwards", meta={"resolution": 64}) as writer:
        for number in reversed(range(40)):
            pixels = data["test"].pixels(number)
            writer.write(f"fruit-{number}", {"png": encode(pixels)})
    rows = by_method(
        score_translations(Perfect(None), judge, examples, data["test"], ShardDataset([tmp_path / "backwards"]))
    )
    assert rows["real"]["pair_error"] == 0
    few = pack(tmp_path / "few", "orange", shared[:38])
    with pytest.raises(UserError, match=r"--pairs: 2 of 40 test images have no counterpart, e\.g\. 'fruit-38'"):
        score_translations(Perfect(None), judge, examples, data["test"], few)


def test_scores_need_the_factors_of_the_judge(judge, examples, tmp_path):
    plain = pack(tmp_path / "plain", "apple", contents(3, 0), factors=False)
    with pytest.raises(UserError, match="--test has the factors none, --train has background_brightness, "):
        score_translations(Perfect(None), judge, examples, plain)


def test_scores_need_images_of_the_right_size(judge, examples, data, tmp_path):
    small = pack(tmp_path / "small", "apple", contents(3, 0), side=32)
    with pytest.raises(UserError) as error:
        score_translations(Perfect(None), judge, examples, small, small)
    line = "holds images of 32x32, the autoencoder takes 64x64"
    assert str(error.value).splitlines() == [f"--test {line}", f"--pairs {line}"]


# Baselines on the same latents


def test_rivals_move_the_source_to_the_target():
    """Gaussians of other means and spreads: the shift finds the mean, transport and bridge the spread as well."""
    spread = torch.tensor([0.5, 1.0, 2.0])
    source, target = draw(400, 3), draw(300, 3, seed=1) * spread + 3
    lines = []
    rivals = fit_rivals(NAMES, source, target, say=lines.append)
    assert list(rivals) == list(NAMES) and not lines
    nearness, places = Nearness(source, target, 1.0), torch.arange(400)
    found = {name: nearness.of(rival.move(source, places)) for name, rival in rivals.items()}
    found["reconstruction"] = nearness.of(source)
    frechet = {name: row["latent_frechet"] for name, row in found.items()}
    assert frechet["Gaussian transport"] < 1e-3 and frechet["light bridge"] < 0.1
    assert frechet["mean shift"] == pytest.approx(float((spread - 1).square().sum()), rel=0.2)
    assert frechet["reconstruction"] > 26 and found["reconstruction"]["displacement"] == 0
    assert found["mean shift"]["displacement"] == pytest.approx(3, rel=0.05)
    assert found["Gaussian transport"]["latent_kernel"] < 0.1 * found["reconstruction"]["latent_kernel"]
    assert Nearness(source, target, 2.0).of(source + 1)["displacement"] == pytest.approx(0.5)


def test_rivals_that_do_not_fit_are_left_out_with_a_line(monkeypatch):
    lines = []
    monkeypatch.setattr("letit_dist.energy.gaussian.LIMIT", 4)
    monkeypatch.setattr("letit_dist.energy.light_bridge.LIMIT", 5)
    assert list(fit_rivals(NAMES, draw(9, 6), draw(9, 6), say=lines.append)) == ["mean shift"]
    assert lines == [
        "without Gaussian transport: latents of 6 numbers, it takes at most 4",
        "without light bridge: latents of 6 numbers, it takes at most 5",
    ]
    # The Gaussian of maps is diagonal, and of any size.
    maps = fit_rivals(NAMES[:2], draw(9, 2, 3, 3), draw(9, 2, 3, 3), say=lines.append)
    assert list(maps) == list(NAMES[:2]) and len(lines) == 2
    assert list(fit_rivals(NAMES, draw(1, 3), draw(9, 3), say=lines.append)) == ["mean shift"]
    assert lines[2] == "without Gaussian transport: 1 and 9 training images, it takes at least 2 a side"
    monkeypatch.setattr("letit_dist.evaluation.rivals._MOST_NUMBERS", 20)
    assert set(Nearness(draw(9, 3), draw(9, 3), 1.0, say=lines.append).of(draw(9, 3))) == {"displacement"}
    assert lines[-1] == "without distances of latents: 27 numbers on a side, at most 20"


# Tables


def test_tables():
    rows = [{"method": "a", "value": 0.123456, "count": 3}, {"method": "longer", "value": None}]
    assert markdown(rows).splitlines() == [
        "| method | value  | count |",
        "| ------ | ------ | ----- |",
        "| a      | 0.1235 | 3     |",
        "| longer | -      | -     |",
    ]
    assert markdown(rows, ["count"]).splitlines() == ["| count |", "| ----- |", "| 3     |", "| -     |"]
    assert "1.235e-05" in markdown([{"x": 0.0000123456}])
