"""Convolutions by Winograd's filtering, against torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from letit_dist import winograd
from letit_dist.autoencoders import convolution
from letit_dist.autoencoders.convolution import Conv2d, ConvTranspose2d, JoinedConv2d

# As many channels as take every path.
LAYERS = {
    "narrow": lambda: Conv2d(20, 24, 3, padding=1),
    "wide": lambda: Conv2d(64, 72, 3, padding=1),
    "pointwise": lambda: Conv2d(20, 24, 1),
    "thin strided": lambda: Conv2d(3, 16, 4, stride=2, padding=1),
    "strided": lambda: Conv2d(16, 20, 4, stride=2, padding=1),
    "wide strided": lambda: Conv2d(64, 128, 4, stride=2, padding=1),
    "thin transposed": lambda: ConvTranspose2d(16, 3, 4, stride=2, padding=1),
    "transposed": lambda: ConvTranspose2d(20, 16, 4, stride=2, padding=1),
    "wide transposed": lambda: ConvTranspose2d(128, 64, 4, stride=2, padding=1),
}


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch):
    monkeypatch.setattr(convolution, "_LEAST", 0)


def ours(layer: nn.Module, x: Tensor, **options) -> Tensor:
    return layer(x, **options)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return (nn.ConvTranspose2d if layer.transposed else nn.Conv2d).forward(layer, x)


@pytest.fixture(params=LAYERS)
def layer(request) -> Conv2d | ConvTranspose2d:
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def maps(layer: nn.Module, side: tuple[int, int], batch: int = 3) -> Tensor:
    """Inputs of which the smaller of what goes in and comes out is of this size."""
    scale = 1 if layer.transposed else layer.stride[0]
    shape = (batch, layer.in_channels, scale * side[0], scale * side[1])
    return torch.randn(shape, dtype=layer.weight.dtype, generator=torch.Generator().manual_seed(1))


def gradients(layer: nn.Module, x: Tensor, run) -> list[Tensor]:
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
    assert apart(gradients(layer, x, ours), gradients(layer, x, plain)) < 1e-12


def test_memory_format_is_no_matter(layer):
    x = maps(layer, (8, 8))
    last = x.contiguous(memory_format=torch.channels_last)
    expected = gradients(layer, x, plain)
    assert apart(gradients(layer, last, ours), expected) < 1e-12
    layer.to(memory_format=torch.channels_last)
    assert apart(gradients(layer, last, ours), expected) < 1e-12


@pytest.mark.parametrize("overwrite", [False, True])
def test_relu_before_it(layer, overwrite):
    x = maps(layer, (8, 8))

    def expected(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return plain(layer, F.relu(x)), F.relu(x)

    def found(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        before = x.detach().clone()
        result = layer.after_relu(x, overwrite=overwrite)
        assert torch.equal(x.detach(), before.relu() if overwrite else before)
        return result

    assert apart(gradients(layer, x, found), gradients(layer, x, expected)) < 1e-12
    # Without a gradient of ReLU(x) itself.
    first, expected_first = (
        gradients(layer, x, lambda layer, x, run=run: run(layer, x)[0]) for run in (found, expected)
    )
    assert apart(first, expected_first) < 1e-12


def test_input_computed_again_instead_of_kept(layer):
    x, calls = maps(layer, (8, 8)), []

    def again() -> Tensor:
        calls.append(1)
        return x.clone()

    found = gradients(layer, x, lambda layer, x: layer.after_relu(x, overwrite=True, again=again)[0])
    assert apart(found, gradients(layer, x, lambda layer, x: plain(layer, F.relu(x)))) < 1e-12
    assert len(calls) == (layer.kernel_size != (1, 1))


def test_rounding_in_float32():
    torch.manual_seed(0)
    exact = Conv2d(128, 128, 3, padding=1).double()
    x = torch.randn(2, 128, 32, 32, dtype=torch.float64)
    expected = gradients(exact, x, plain)
    found = gradients(exact.float(), x.float(), ours)
    assert apart(found, expected) < 1e-5


def test_number_of_threads_stays():
    """numba starts its threads in torch's pool, as many as there are cores."""
    program = """
import torch
torch.set_num_threads(1)
from letit_dist.autoencoders.convolution import Conv2d
Conv2d(64, 64, 3, padding=1)(torch.randn(1, 64, 64, 64)).sum().backward()
print(torch.get_num_threads())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "1\n"


def test_torchs_own_without_numba_and_where_nothing_learns(layer, monkeypatch):
    x = maps(layer, (4, 4))
    monkeypatch.setattr(convolution._Convolve, "apply", None)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(layer, x))
    monkeypatch.setattr(convolution, "has_numba", lambda: False)
    assert torch.equal(layer(x), plain(layer, x))
    assert torch.equal(layer.after_relu(x)[0], plain(layer, x.relu()))


def test_every_autoencoder_is_there_without_numba():
    program = """
import sys
sys.modules["numba"] = None
from letit_dist.compiled import has_numba
from letit_dist.registry import AUTOENCODERS
print(has_numba(), AUTOENCODERS.kinds())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("False [") and "vqvae2" in run.stdout


def test_without_data(layer):
    """As the estimate of a run's memory goes through it."""
    winograd.scheme.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(maps(layer, (8, 8)).shape, dtype=torch.float64, requires_grad=True)
        y, _ = layer.after_relu(x)
        y.sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape
    x = maps(layer, (8, 8))
    assert apart(gradients(layer, x, ours), gradients(layer, x, plain)) < 1e-12  # nothing of it was kept


def test_frozen_weights_get_no_gradient(layer):
    layer.requires_grad_(False)
    x = maps(layer, (4, 4)).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_lower_precision_is_torchs(layer, monkeypatch):
    def refuse(*args):
        raise AssertionError("taken by products under autocast")

    monkeypatch.setattr(convolution._Convolve, "apply", refuse)
    layer, x = layer.float(), maps(layer, (4, 4)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer.after_relu(x)[0].dtype == torch.bfloat16
    if layer.kernel_size != (1, 1):
        with pytest.raises(AssertionError, match="by products"):
            layer(x)


def test_several_maps_as_one():
    torch.manual_seed(0)
    layer = JoinedConv2d(12, 5, 1).double()
    x = torch.randn(2, 12, 4, 4, dtype=torch.float64)
    found = gradients(layer, x, lambda layer, x: layer(x[:, :4], x[:, 4:7], x[:, 7:]))
    assert apart(found, gradients(layer, x, nn.Conv2d.forward)) < 1e-12


def test_small_maps_are_torchs(layer, monkeypatch):
    monkeypatch.setattr(convolution, "_LEAST", 10**9)
    monkeypatch.setattr(convolution._Convolve, "apply", None)
    x = maps(layer, (4, 4))
    assert torch.equal(layer(x), plain(layer, x))
