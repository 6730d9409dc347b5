"""The convolutions of a VQ-VAE-2 one by one: how fast each direction is, against products of large matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from letit_dist.autoencoders.vqvae2 import VQVAE2
from letit_dist.evaluation.benchmark import Fact, core_seconds
from speed.naive_vqvae2 import NaiveVQVAE2

DIRECTIONS = ("forward", "input", "weights")
# How a layer is computed: memory format of its maps and weights, and by whom.
Convolution = nn.Conv2d | nn.ConvTranspose2d
WAYS: dict[str, tuple[torch.memory_format, Callable[[Convolution, Tensor], Tensor]]] = {
    "row-major": (torch.contiguous_format, lambda layer, x: _plain(layer, x)),
    "channels_last": (torch.channels_last, lambda layer, x: _plain(layer, x)),
    "ours": (torch.channels_last, lambda layer, x: layer(x)),
}


def _plain(layer: Convolution, x: Tensor) -> Tensor:
    if isinstance(layer, nn.ConvTranspose2d):
        return nn.ConvTranspose2d.forward(layer, x)
    return nn.Conv2d.forward(layer, x)


def _convolution(network: VQVAE2, name: str) -> Convolution:
    layer = network.get_submodule(name)
    assert isinstance(layer, Convolution)
    return layer


@dataclass(frozen=True)
class Layer:
    """Convolutions of equal shapes: the first one's name, how many there are, and the shape of what goes in."""

    name: str
    count: int
    shape: torch.Size

    def operations(self, network: VQVAE2) -> int:
        """Additions and multiplications of one direction of one of them, written out."""
        layer = _convolution(network, self.name)
        positions = self.shape[0] * self.shape[2] * self.shape[3]
        if not isinstance(layer, nn.ConvTranspose2d):
            positions //= layer.stride[0] ** 2
        return 2 * positions * layer.weight.numel()


def layers_of(network: VQVAE2, batch: int) -> list[Layer]:
    """The convolutions of a training iteration on `batch` images, in their order."""
    naive = NaiveVQVAE2(network, rate=0.0)
    seen: dict[tuple[Any, ...], list[str]] = {}

    def recording(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(name: str, x: Tensor, *stride: int, **options: int) -> Tensor:
            seen.setdefault((x.shape, naive.weights[f"{name}.weight"].shape, *options.values()), []).append(name)
            return call(name, x, *stride, **options)

        return run

    for name in ("_convolve", "_upsample"):
        setattr(naive, name, recording(getattr(naive, name)))
    side = network.config.resolution
    with torch.no_grad():
        naive.loss(torch.zeros(batch, 3, side, side))
    return [Layer(names[0], len(names), shape) for (shape, *_), names in seen.items()]


def seconds_of(layer: Convolution, shape: torch.Size, way: str, repeats: int) -> dict[str, float]:
    """Direction -> the least seconds of `repeats` runs: of cores, so that other work disturbs less."""
    memory_format, call = WAYS[way]
    layer.to(memory_format=memory_format)
    taken: dict[str, list[float]] = {direction: [] for direction in DIRECTIONS}
    for repeat in range(repeats + 1):  # the first one warms up
        for direction in DIRECTIONS:
            x = torch.randn(shape).contiguous(memory_format=memory_format)
            x.requires_grad_(direction == "input")
            layer.requires_grad_(direction == "weights")
            if direction == "forward":
                took = core_seconds(partial(call, layer, x))
            else:
                y = call(layer, x)
                wanted, gradient = [x] if direction == "input" else list(layer.parameters()), torch.randn_like(y)
                took = core_seconds(partial(torch.autograd.grad, y, wanted, gradient))
            if repeat:
                taken[direction].append(took)
    return {direction: min(all_taken) for direction, all_taken in taken.items()}


def rates(network: VQVAE2, batch: int, repeats: int) -> Iterator[Fact]:
    """A line for each layer, and what all of them come to."""
    large = torch.randn(512, 512)
    total = {way: 0.0 for way in WAYS}
    peak = 2 * 512**3 / min(core_seconds(lambda: large @ large) for _ in range(50))
    operations, best = 0, 0.0
    images = network.bottom_encoder.convs[0]
    for layer in layers_of(network, batch):
        module = _convolution(network, layer.name)
        one = layer.operations(network)
        found = {way: seconds_of(module, layer.shape, way, repeats) for way in WAYS}
        # Images want no gradient.
        directions = [d for d in DIRECTIONS if module is not images or d != "input"]
        operations += one * layer.count * len(directions)
        for way, taken in found.items():
            total[way] += layer.count * sum(taken[d] for d in directions)
        best += layer.count * sum(min(taken[d] for taken in found.values()) for d in directions)
        shown = "; ".join(
            f"{d} {' / '.join(f'{one / taken[d] / 1e9:.0f}' for taken in found.values())}" for d in directions
        )
        kind = f"{'x'.join(map(str, module.weight.shape))} on {layer.shape[2]} x {layer.shape[3]}"
        yield Fact(f"{layer.count} x {layer.name} ({kind}), {one / 1e9:.2f} GFLOP", f"{shown} GFLOP/s")
    yield Fact("order of the rates", " / ".join(WAYS))
    yield Fact("products of 512 x 512", f"{peak / 1e9:.0f} GFLOP/s")
    sums = ", ".join(f"{way} {seconds * 1e3:.0f} ms" for way, seconds in total.items())
    floor = f"{operations / 1e9:.1f} GFLOP at the rate of products {operations / peak * 1e3:.0f} ms"
    yield Fact("all convolutions of an iteration", f"{sums}, the best of each {best * 1e3:.0f} ms, {floor}")
