"""Convolutions by Winograd's filtering, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from letit_dist.autoencoders import convolution
from letit_dist.autoencoders.convolution import Convolution, convolve, rectify_and_convolve

# As many channels as take every path.
LAYERS = {
    "narrow": lambda: nn.Conv2d(20, 24, 3, padding=1),
    "wide": lambda: nn.Conv2d(64, 72, 3, padding=1),
    "thin strided": lambda: nn.Conv2d(3, 16, 4, stride=2, padding=1),
    "strided": lambda: nn.Conv2d(16, 20, 4, stride=2, padding=1),
    "wide strided": lambda: nn.Conv2d(64, 128, 4, stride=2, padding=1),
    "thin transposed": lambda: nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(20, 16, 4, stride=2, padding=1),
    "wide transposed": lambda: nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
}


@pytest.fixture(params=LAYERS)
def layer(request) -> Convolution:
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def maps(layer: Convolution, side: tuple[int, int], batch: int = 3) -> Tensor:
    """Inputs of which the smaller of what goes in and comes out is of this size."""
    scale = 1 if layer.transposed else layer.stride[0]
    shape = (batch, layer.in_channels, scale * side[0], scale * side[1])
    return torch.randn(shape, dtype=layer.weight.dtype, generator=torch.Generator().manual_seed(1))


def gradients(layer: Convolution, x: Tensor, run) -> list[Tensor]:
    """What `run(layer, x)` returns, and the gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    # Of a copy, which may be overwritten: leaves may not.
    found = run(layer, x.clone())
    found = found if isinstance(found, tuple) else (found,)
    draws = torch.Generator().manual_seed(2)
    loss = sum((part * torch.randn(part.shape, dtype=torch.float64, generator=draws)).sum() for part in found)
    loss.backward()
    return [*(part.detach() for part in found), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [part.shape for part in found] == [part.shape for part in expected]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


# One tile, several, pieces of a sample, no whole tiles.
@pytest.mark.parametrize("side", [(4, 4), (8, 4), (4, 12), (48, 48), (6, 4)])
def test_results_and_gradients_are_those_of_torch(layer, side):
    x = maps(layer, side)
    assert apart(gradients(layer, x, convolve), gradients(layer, x, lambda layer, x: layer(x))) < 1e-12


def test_memory_format_is_no_matter(layer):
    x = maps(layer, (8, 8))
    last = x.contiguous(memory_format=torch.channels_last)
    expected = gradients(layer, x, convolve)
    assert apart(gradients(layer, last, convolve), expected) < 1e-12
    layer.to(memory_format=torch.channels_last)
    assert apart(gradients(layer, last, convolve), expected) < 1e-12


@pytest.mark.parametrize("overwrite", [False, True])
def test_relu_before_it(layer, overwrite):
    x = maps(layer, (8, 8))

    def plain(layer: Convolution, x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(F.relu(x)), F.relu(x)

    def ours(layer: Convolution, x: Tensor) -> tuple[Tensor, Tensor]:
        before = x.detach().clone()
        found = rectify_and_convolve(layer, x, overwrite=overwrite)
        assert torch.equal(x.detach(), before.relu() if overwrite else before)
        return found

    assert apart(gradients(layer, x, ours), gradients(layer, x, plain)) < 1e-12
    first, plain_first = (
        gradients(layer, x, lambda layer, x, run=run: run(layer, x)[0]) for run in (ours, plain)
    )  # without a gradient of ReLU(x) itself
    assert apart(first, plain_first) < 1e-12


def test_input_computed_again_instead_of_kept(layer):
    x, calls = maps(layer, (8, 8)), []

    def again() -> Tensor:
        calls.append(1)
        return x.clone()

    def ours(layer: Convolution, x: Tensor) -> Tensor:
        return rectify_and_convolve(layer, x, overwrite=True, again=again)[0]

    assert apart(gradients(layer, x, ours), gradients(layer, x, lambda layer, x: layer(F.relu(x)))) < 1e-12
    assert len(calls) == 1


def test_rounding_in_float32():
    torch.manual_seed(0)
    exact = nn.Conv2d(128, 128, 3, padding=1).double()
    x = torch.randn(2, 128, 32, 32, dtype=torch.float64)
    expected = gradients(exact, x, lambda layer, x: layer(x))
    found = gradients(exact.float(), x.float(), convolve)
    assert apart(found, expected) < 1e-5


def test_frozen_weights_get_no_gradient(layer):
    layer.requires_grad_(False)
    x = maps(layer, (4, 4)).requires_grad_()
    convolve(layer, x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_lower_precision_is_torchs(layer, monkeypatch):
    def refuse(*args):
        raise AssertionError("taken by products under autocast")

    monkeypatch.setattr(convolution._Convolve, "apply", refuse)
    layer, x = layer.float(), maps(layer, (4, 4)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(layer, x).dtype == rectify_and_convolve(layer, x)[0].dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="by products"):
        convolve(layer, x)
