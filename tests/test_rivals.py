"""Baselines on the same latents: how near to the target they come, and when they are left out."""

import pytest
import torch

from letit_dist.evaluation.rivals import NAMES, Nearness, fit_rivals


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
