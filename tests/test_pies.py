"""The proof of concept at a twentieth of its points: what moves, what stays, and the figure."""

import json

import pytest
import torch
from PIL import Image
from programs import run

from letit_dist.autoencoders.linear import LinearAutoencoder
from letit_dist.evaluation.pies import TARGET, PiesConfig, PiesResult, disc, run_pies

SMALL = PiesConfig(points=500, epochs=40, autoencoder_epochs=60, watch=(0, 5), seed=1)


@pytest.fixture(scope="module")
def result() -> PiesResult:
    return run_pies(SMALL)


def test_points_are_uniform_in_their_disc():
    points = disc(20_000, (3.0, -1.0), torch.Generator().manual_seed(0))
    offsets = (points - torch.tensor([3.0, -1.0])).norm(dim=1)
    assert offsets.max() <= 1
    assert points.mean(0).tolist() == pytest.approx([3.0, -1.0], abs=0.02)
    assert float((offsets < 0.5).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_style_moves_into_the_target_disc_and_content_stays(result):
    assert sorted(result.translated) == sorted(result.shift) == [0, 5, 40]
    assert result.inside(40) > max(0.9, result.inside(0) + 0.3)
    assert result.content_correlation(40) > 0.98
    assert result.style_correlation(40) > 0.95  # what moves is what carries style
    moved = result.translated[40] - result.source
    assert moved[:, 1].mean() > 0.5 > 5 * moved[:, 0].mean().abs()
    assert all(shift.shape == (500, 8) and shift.min() >= 0 for shift in result.shift.values())


def test_the_same_seed_gives_the_same_points_and_another_others(result):
    short = PiesConfig(points=64, epochs=1, autoencoder_epochs=1, watch=(), seed=1)
    torch.manual_seed(5)
    one = run_pies(short)
    torch.manual_seed(6)
    assert torch.equal(one.translated[1], run_pies(short).translated[1])
    assert not torch.equal(one.source, run_pies(PiesConfig(points=64, epochs=1, watch=(), seed=2)).source)


def test_numbers_behind_the_figure():
    source = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    shift = torch.tensor([[0.1, 2.0, 1.0, 4.0]]).expand(3, 4)
    moved = source + torch.tensor([0.0, 1.5])
    found = PiesResult(source, source, torch.tensor([0.0, 0.5, 0.25, 1.0]), {3: moved}, {3: shift})
    assert found.inside(3) == pytest.approx(1 / 3)  # only (0, 1.5) is within 1 of (0, 1)
    assert TARGET == (0.0, 1.0) and found.content_correlation(3) == pytest.approx(1)
    assert found.still_dimensions(3) == [0, 2]  # below half of 4; 2.0 is not
    assert found.style_correlation(3) == pytest.approx(1, abs=1e-3)
    model = LinearAutoencoder(3, 5)
    assert model.encode(torch.zeros(2, 3)).shape == (2, *model.latent_shape)
    assert model.decode(torch.zeros(2, 5)).shape == (2, 3)


def test_the_command_writes_the_figure_and_its_numbers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "pies"
    done = run("eval/paper.py", "pies", "--out", out, "--points", 64, "--epochs", 5, "--steps", 2)
    assert done.code == 0
    record = json.loads((out / "pies.json").read_text())
    assert json.loads(done.out.splitlines()[0]) == record
    assert 0 <= record["inside"] <= 1 and len(record["mean_shift"]) == 8 and record["seed"] == 0
    assert Image.open(out / "pies.png").size[0] > 1000


def test_bad_numbers_get_one_line(tmp_path):
    done = run("eval/paper.py", "pies", "--out", tmp_path / "pies", "--epochs", 0)
    assert (done.code, done.errors) == (2, ["error: --epochs must be at least 1"])
    (tmp_path / "file").write_text("")
    done = run("eval/paper.py", "pies", "--out", tmp_path / "file")
    assert done.code == 2 and "is a file, expected a folder" in done.err
