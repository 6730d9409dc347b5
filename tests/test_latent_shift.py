"""The latent shift against closed forms and against chains walked by hand, and the command that draws it."""

import json
import shutil
import sys

import pytest
import torch
from figure_runs import make_runs, opened
from PIL import Image
from plain_autoencoders import Flat
from programs import run

from letit_dist.data.encoding import EncodeOptions, encode_domain
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import to_pixels
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation import latent_shift
from letit_dist.evaluation.latent_shift import LatentShift, correlation, measure_shift
from letit_dist.evaluation.shift_figure import shift_figure

STEPS, UNIT = 5, 2.5


@pytest.fixture(scope="module")
def flat(fruit_shards, tmp_path_factory):
    """An autoencoder with 16 flat latents, and the apples in them: 48."""
    torch.manual_seed(0)
    autoencoder, folder = Flat(32), tmp_path_factory.mktemp("flat")
    encode_domain(autoencoder, ShardDataset([fruit_shards / "apple/train"]), folder, EncodeOptions(flip=True))
    return autoencoder, LatentSet.open(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, fruit_latents):
    return make_runs(tmp_path_factory.mktemp("runs"), fruit_latents)


def translator_of(autoencoder, *, noise_scale=0.0, step_size=0.3, **energy):
    torch.manual_seed(1)
    model = build_energy(MLPEnergyConfig(latent_unit=UNIT, **energy), autoencoder.latent_shape).requires_grad_(False)
    chain = LangevinConfig(steps=STEPS, step_size=step_size, noise_scale=noise_scale)
    return Translator(autoencoder, model, LangevinSampler(chain))


def test_a_linear_energy_shifts_by_steps_times_its_slope(flat):
    """dE/dz = w / unit everywhere, and the shift is in units of the energy: steps * unit * |w / unit|."""
    autoencoder, side = flat
    translator = translator_of(autoencoder, layers=0)
    slope = translator.energy.layers[0].weight[0].double() / UNIT
    found = measure_shift(translator, side)
    torch.testing.assert_close(found.mean, STEPS * UNIT * slope.abs(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.rows, found.mean.float().expand(48, 16), rtol=1e-5, atol=0)
    assert found.stored == 48 and found.vector is found.mean and found.noun == "dimension" and not found.examples
    order = slope.abs().argsort().tolist()
    assert found.least_moved() == order[:10] and found.most_moved(3) == order[::-1][:3]


def test_the_mean_is_that_of_single_chains(flat, monkeypatch):
    autoencoder, side = flat
    translator = translator_of(autoencoder, hidden=32)
    rows = []
    for place in (0, 9, 19, 28, 38):  # five of 48, evenly
        z, shift = side.take([place])["latent"], torch.zeros(1, 16)
        for _ in range(STEPS):
            z = z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(translator.energy(z).sum(), z)
            z, shift = z - 0.3 / 2 * UNIT**2 * gradient, shift + UNIT * gradient.abs()
        rows.append(shift)
    found = measure_shift(translator, side, count=5)
    torch.testing.assert_close(found.rows, torch.cat(rows), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.mean, torch.cat(rows).double().mean(0), rtol=1e-4, atol=1e-6)
    assert found.rows.std(0).min() > 0, "a shift that does not depend on the sample shows nothing here"
    monkeypatch.setattr(latent_shift, "_CHUNK", 2)
    torch.testing.assert_close(measure_shift(translator, side, count=5).mean, found.mean, rtol=1e-5, atol=1e-7)


def test_noise_belongs_to_the_sample_and_the_seed(flat, monkeypatch):
    autoencoder, side = flat
    translator = translator_of(autoencoder, hidden=32, noise_scale=0.5)
    found, other = (measure_shift(translator, side, seed=seed).mean for seed in (0, 1))
    assert not torch.allclose(found, other, rtol=1e-3)
    monkeypatch.setattr(latent_shift, "_CHUNK", 7)
    torch.testing.assert_close(measure_shift(translator, side).mean, found, rtol=1e-4, atol=1e-6)


def test_maps_by_channel_and_by_position(runs, fruit_latents):
    """Of maps: the mean over positions, the mean over channels, and a few decoded samples."""
    translator = opened(runs).translator
    side = LatentSet.open(fruit_latents / "apple")
    found = measure_shift(translator, side, examples=3)
    latents = translator.autoencoder.latents_from_codes(side.take(range(24)))
    chain = translator.transport(latents)
    expected = chain.shift.double()
    torch.testing.assert_close(found.mean, expected.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.vector, expected.mean((0, 2, 3)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.positions, expected.mean((0, 1)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.rows.double(), expected.mean((2, 3)), rtol=1e-5, atol=1e-7)
    assert found.noun == "channel" and found.is_map and len(found.examples) == 3
    for example, row in zip(found.examples, (0, 8, 16), strict=True):
        before, after = (to_pixels(translator.decode(z[row : row + 1]))[0].int() for z in (latents, chain.latents))
        assert (example.source.int() - before).abs().max() <= 1
        assert (example.translated.int() - after).abs().max() <= 1 < (before - after).abs().max()
        torch.testing.assert_close(example.shift, chain.shift[row].mean(0), rtol=1e-5, atol=1e-7)


def shift_of(*values):
    return LatentShift(torch.tensor(values, dtype=torch.float64), torch.tensor([values]), 1)


def test_most_and_least_moved():
    found = shift_of(3.0, 1.0, 2.0, 1.0)
    assert found.most_moved() == [0, 2, 1, 3] and found.least_moved() == [1, 3, 2, 0]
    assert found.most_moved(1) == [0] and found.least_moved(2) == [1, 3]


def test_correlation_of_two_directions():
    one = shift_of(1.0, 2.0, 4.0)
    assert correlation(one, shift_of(10.0, 20.0, 40.0)) == pytest.approx(1)
    assert correlation(one, shift_of(4.0, 3.0, 1.0)) == pytest.approx(-1)
    # Deviations (-4, -1, 5) / 3 and (-1, 2, -1) / 3: -3 / sqrt(42 * 6).
    assert correlation(one, shift_of(0.0, 1.0, 0.0)) == pytest.approx(-3 / 252**0.5)
    assert correlation(one, shift_of(0.1, 0.1, 0.1)) is None


def test_a_chain_that_leaves_the_finite_numbers(flat):
    autoencoder, side = flat
    translator = translator_of(autoencoder, layers=0)
    translator.energy.layers[0].weight.fill_(float("inf"))
    with pytest.raises(UserError, match="leaves the finite numbers"):
        measure_shift(translator, side)


def test_many_dimensions_are_drawn_by_the_most_and_the_least_moved():
    pytest.importorskip("matplotlib")
    values = torch.arange(100, dtype=torch.float64)
    figure = shift_figure({"title": LatentShift(values, values.float()[None], 1)}, "heading")
    [column] = figure.subfigs
    bars, strip, samples = column.axes[:3]
    ticks = [int(label.get_text()) for label in bars.get_xticklabels()]
    assert ticks == [*range(99, 67, -1), *range(31, -1, -1)]
    assert [patch.get_height() for patch in bars.patches] == ticks  # dimension i moves by i
    assert strip.images[0].get_array().shape == samples.images[0].get_array().shape == (1, 100)


# The command


def shift(*arguments):
    return run("eval/paper.py", "shift", *arguments)


def test_the_command_writes_both_directions(runs, fruit_latents, tmp_path):
    pytest.importorskip("matplotlib")
    forth, back = runs / "apple2orange", runs / "orange2apple"
    done = shift("--energy", forth, "--back", back, "--out", tmp_path, "--count", 10)
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shift.json", "shift.png"]
    assert Image.open(tmp_path / "shift.png").width > 1500
    record = json.loads((tmp_path / "shift.json").read_text())
    shifts = []
    for part, name, source in ((record, "apple2orange", "apple"), (record["back"], "orange2apple", "orange")):
        side = LatentSet.open(fruit_latents / source)
        shifts.append(measure_shift(opened(runs, name).translator, side, count=10))
        assert part["mean_shift"] == pytest.approx(shifts[-1].vector.tolist(), rel=1e-4)
        assert part["most_moved"] == shifts[-1].most_moved() and part["least_moved"] == shifts[-1].least_moved()
        facts = {key: part[key] for key in ("run", "source", "images_seen", "seed", "samples", "stored", "of")}
        assert list(facts.values()) == [name, source, 1234, 0, 10, 24, "channel"]
    assert record["correlation"] == pytest.approx(correlation(*shifts), rel=1e-6)
    lines = done.out.splitlines()
    assert lines[0] == "apple2orange, apple to orange: 10 of 24 latents"
    first = record["most_moved"][0]
    assert lines[1].startswith(f"  most moved channels: {first} ({record['mean_shift'][first]:.3g}), ")
    assert lines[-2] == f"latent shift of both directions, correlation {record['correlation']:.3f}"


def test_latents_may_be_named(runs, fruit_latents, tmp_path):
    pytest.importorskip("matplotlib")
    [export] = (runs / "apple2orange/export").iterdir()
    where = ("--energy", export, "--autoencoder", runs / "autoencoder")
    done = shift(*where, "--latents", fruit_latents / "orange", "--out", tmp_path / "a")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "a/shift.json").read_text())
    side = LatentSet.open(fruit_latents / "orange")
    expected = measure_shift(opened(runs).translator, side)
    assert record["mean_shift"] == pytest.approx(expected.vector.tolist(), rel=1e-4)
    assert record["run"] == "apple2orange" and record["back"] is None and record["correlation"] is None
    done = shift(*where, "--out", tmp_path / "b")
    assert done.code == 2 and "name its latents with --latents" in done.err and not (tmp_path / "b").exists()


def test_bad_input_gets_one_line(runs, fruit_latents, fruit_shards, tmp_path):
    forth = ("--energy", runs / "apple2orange", "--out", tmp_path / "out")
    (tmp_path / "file").touch()
    for arguments, message in (
        ((*forth, "--count", 0), "--count must be at least 1"),
        ((*forth, "--back", runs / "apple2orange"), "none of the energies goes there, they go: apple to orange"),
        ((*forth, "--back", runs / "nowhere"), "--back: no such energy"),
        ((*forth, "--latents", fruit_latents / "apple", fruit_latents / "orange"), "2 folders: give one, or with"),
        ((*forth, "--latents", fruit_shards / "apple/test"), "holds images, not latents"),
        ((*forth, "--latents", tmp_path / "nowhere"), "nowhere"),
        (("--energy", runs / "nowhere", "--out", tmp_path / "out"), "no such energy"),
        (("--energy", runs / "apple2orange", "--out", tmp_path / "file"), "is a file, expected a folder"),
        (("--energy", runs / "apple2orange", "--out", tmp_path / "file/inside"), "cannot write to"),
    ):
        done = shift(*arguments)
        assert done.code == 2 and len(done.errors) == 1 and message in done.err, (message, done.err)
    assert not (tmp_path / "out").exists()


def test_other_autoencoders_latents_are_refused(runs, flat, tmp_path):
    _, side = flat
    done = shift("--energy", runs / "apple2orange", "--latents", side.folder, "--out", tmp_path / "out")
    assert done.code == 2 and "encoded by autoencoder" in done.err


def test_data_that_are_gone(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "apple2orange", copy)
    for data, message in (
        ("", "no data.source: name its latents with --latents"),
        ("data: {source: gone}\n", "its data.source gone is not there: name it with --latents"),
    ):
        (copy / "config.yaml").write_text(f"autoencoder: {runs / 'autoencoder'}\n{data}")
        done = shift("--energy", copy, "--out", tmp_path / "out")
        assert done.code == 2 and len(done.errors) == 1 and message in done.err


def test_an_energy_between_several_domains(runs, fruit_latents, tmp_path):
    """Its run names the domains' latents, not a source: --to and --from choose, and --back is the same run."""
    pytest.importorskip("matplotlib")
    forth = opened(runs).translator
    torch.manual_seed(7)
    conditions = ("apple", "orange")
    config = MLPEnergyConfig(hidden=16, condition_on="target")
    energy = build_energy(config, forth.energy.latent_shape, conditions=conditions)
    extra = {key: forth.energy.extra[key] for key in ("autoencoder_fingerprint", "langevin")}
    energy.save_pretrained(tmp_path / "many/export/images-000000000064", **extra, images_seen=64)
    domains = ", ".join(str(fruit_latents / style) for style in conditions)
    text = f"autoencoder: {runs / 'autoencoder'}\ndata: {{domains: [{domains}]}}\n"
    (tmp_path / "many/config.yaml").write_text(text)
    command = ("--energy", tmp_path / "many", "--out", tmp_path / "out", "--to", "orange")
    done = shift(*command, "--from", "apple", "--back", tmp_path / "many")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "many, apple to orange: 24 of 24 latents"
    record = json.loads((tmp_path / "out/shift.json").read_text())
    for part, source, target in ((record, "apple", "orange"), (record["back"], "orange", "apple")):
        translator = Translator(forth.autoencoder, energy.at(target), forth.sampler)
        expected = measure_shift(translator, LatentSet.open(fruit_latents / source)).vector
        assert part["mean_shift"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert (part["source"], part["target"]) == (source, target)
    for arguments, message in ((command, "give --from"), (command[:4], "several energies fit")):
        done = shift(*arguments)
        assert done.code == 2 and len(done.errors) == 1 and message in done.err


def test_without_matplotlib_nothing_is_begun(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = shift("--energy", runs / "apple2orange", "--out", tmp_path)
    assert done.code == 2 and done.errors == ["error: figures need matplotlib: pip install matplotlib"]
