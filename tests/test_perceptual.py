"""The LPIPS loss from a local backbone file equals stock lpips with the same weights."""

import sys

import pytest
import torch
import torchvision

from letit_dist.errors import UserError
from letit_dist.losses.perceptual import PerceptualLoss
from letit_dist.losses.reconstruction import mse

lpips = pytest.importorskip("lpips")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder laid out like torch's cache, so that stock lpips finds these weights and downloads nothing."""
    folder = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(state, folder / "squeezenet1_1-b8a52dc0.pth")
    return folder


@pytest.fixture
def weights(hub):
    return hub / "squeezenet1_1-b8a52dc0.pth"


def test_equals_stock(hub, weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(hub.parents[1]))
    stock = lpips.LPIPS(net="squeeze", verbose=False)
    state = torch.get_rng_state()
    ours = PerceptualLoss(weights, net="squeeze")
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    a = (images + 0.2 * torch.randn(images.shape)).requires_grad_()
    b = a.detach().clone().requires_grad_()
    expected = stock(b, images).mean()
    found = ours(a, images)
    expected.backward()
    found.backward()
    assert found.item() == expected.item() > 0
    assert a.grad.abs().max() > 0
    assert torch.equal(a.grad, b.grad)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(module.training for module in ours.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(a, images).item() == expected.item()


def test_errors(weights, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        PerceptualLoss(tmp_path / "no.pth", net="squeeze")
    with pytest.raises(UserError, match=r"as the alex backbone: .*missing features\.8\.weight"):
        PerceptualLoss(weights, net="alex")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        PerceptualLoss(damaged, net="squeeze")
    torch.save([1, 2], damaged)
    with pytest.raises(UserError, match="state dict"):
        PerceptualLoss(damaged, net="squeeze")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install"):
        PerceptualLoss(weights, net="squeeze")


def test_mse_is_not_taken_in_bfloat16():
    a, b = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert mse(a.double(), b.double()).dtype == torch.float64
    half = mse(a.bfloat16(), b)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(((a.bfloat16().float() - b) ** 2).mean().item())
