"""The dial against closed forms: linear energies on pixels move everything by the same vector."""

import pytest
import torch
from plain_autoencoders import Pixels

from letit_dist.data.transforms import to_images
from letit_dist.energy.classifier import LatentClassifier
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.strength import turn_dial

SIDE, STEPS, STEP = 8, 8, 0.1
UNIT = 0.5


def translator(sign: float) -> Translator:
    """Every chain adds -sign * STEPS * STEP / 2 * UNIT in the energy's unit, 0.2 in all, to every entry."""
    autoencoder = Pixels(SIDE)
    energy = build_energy(MLPEnergyConfig(layers=0, latent_unit=UNIT), autoencoder.latent_shape)
    with torch.no_grad():
        energy.layers[0].weight.fill_(sign)
    return Translator(autoencoder, energy, LangevinSampler(LangevinConfig(steps=STEPS, step_size=STEP)))


@pytest.fixture
def pixels():
    return torch.randint(60, 120, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_dial_moves_in_proportion(pixels):
    dial = turn_dial(translator(-1.0), pixels, [0.0, 0.3, 1.0])
    assert [row["moved"] for row in dial.strengths] == pytest.approx([0.0, 0.3 * 0.4, 0.4], abs=1e-6)
    assert "target_share" not in dial.strengths[0] and dial.cycle is None and dial.steps == []
    assert list(dial.rows) == ["source", "reconstruction", "0%", "30%", "100%"]
    for name in ("source", "reconstruction", "0%"):
        assert torch.equal(dial.rows[name], pixels)
    expected = ((to_images(pixels) + 0.2 + 1) * 127.5).round()
    assert (dial.rows["100%"].float() - expected).abs().max() <= 1


def test_arriving_and_the_share_of_the_target(pixels):
    # The mean of an image decides; they start 0.05, 0.15 and 0.3 below the border, and a step moves them by 0.025.
    images = to_images(pixels)
    weight = torch.full((images[0].numel(),), 1 / images[0].numel())
    for image, gap in zip(pixels, (0.05, 0.15, 0.3), strict=True):
        image.fill_(round((1 - gap) * 127.5))
    classifier = LatentClassifier(weight, torch.zeros_like(weight), 1.0)
    dial = turn_dial(translator(-1.0), pixels, [0.0, 0.5, 1.0], classifier=classifier)
    assert dial.arrived == [True, True, False] and dial.steps == [3, 7, 8]
    assert [row["target_share"] for row in dial.strengths] == pytest.approx([0, 1 / 3, 2 / 3])
    arrived = dial.rows["on arrival"].float().mean((1, 2, 3))
    started = pixels.float().mean((1, 2, 3))
    assert (arrived - started).tolist() == pytest.approx([127.5 * 0.025 * n for n in dial.steps], abs=1)


def test_there_and_back(pixels):
    home = turn_dial(translator(-1.0), pixels, [1.0], back=translator(1.0))
    assert home.cycle["latent_error"] < 1e-5 and home.cycle["image_error"] == 0
    assert home.cycle["image_change"] == pytest.approx(0.1, abs=3e-3)
    # Going on in the same direction leads twice as far from home.
    lost = turn_dial(translator(-1.0), pixels, [1.0], back=translator(-1.0))
    assert lost.cycle["latent_error"] == pytest.approx(2, abs=1e-4)
    assert torch.equal(home.rows["there and back"], home.rows["reconstruction"])


def test_bad_strengths(pixels):
    with pytest.raises(UserError, match=r"strengths lie in \[0, 1\], got 0.5, 1.5"):
        turn_dial(translator(1.0), pixels, [0.5, 1.5])
    with pytest.raises(UserError, match="got none"):
        turn_dial(translator(1.0), pixels, [])
