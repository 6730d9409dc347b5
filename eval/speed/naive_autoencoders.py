"""Frozen autoencoders written plainly: row-major, one operation for each formula, nothing in place, no tiles.

ALAE, VQ-VAE-2 and beta-VAE are those of the training iterations; TAESD's layers stand here. It shares no code with
`letit_dist`, so that agreement means something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speed.naive_alae import NaiveALAE
from speed.naive_beta_vae import NaiveBetaVAE
from speed.naive_vqvae2 import NaiveVQVAE2

if TYPE_CHECKING:
    from letit_dist.autoencoders.base import Autoencoder
    from letit_dist.autoencoders.taesd import TAESD


class NaiveAutoencoder:
    """A letit autoencoder as functions of copies of its weights; `precision` as there.

    `encode` and `decode` give what its own do, of images in [-1, 1]; `noise` is that of ALAE's decoder.
    """

    def __init__(self, network: Autoencoder):
        self.precision = "fp32"
        self.network: Any = _MAKE[network.config.kind](network)
        for weight in self.network.weights.values():
            weight.requires_grad_(False)
        self.encode_with, self.decode_with = _PASSES[network.config.kind]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to latents (B, *L)"""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.encode_with(self.network, images).to(images.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Latents (B, *L) to (B, 3, H, W)"""
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.decode_with(self.network, latents, noise).to(latents.dtype)

    def held(self) -> list[Tensor]:
        """What lives between two calls."""
        return [*self.network.weights.values(), *getattr(self.network, "books", {}).values()]


class NaiveTAESD:
    """TAESD's layers in the order of its files, as functions of copies of the weights under the same names."""

    def __init__(self, network: TAESD):
        self.config = network.config
        plain = {"memory_format": torch.contiguous_format}
        self.weights = {name: weight.detach().clone(**plain) for name, weight in network.named_parameters()}

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H/8, W/8), scaled"""
        x, config = self._convolve("encoder.0", (images + 1) / 2), self.config
        at = 1
        for level, blocks in enumerate(config.encoder_blocks):
            if level:
                x, at = self._convolve(f"encoder.{at}", x, stride=2), at + 1
            for _ in range(blocks):
                x, at = self._block(f"encoder.{at}", x), at + 1
        x = self._convolve(f"encoder.{at}", x)
        return (x - self._column(config.shift, x)) * self._column(config.scale, x)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H/8, W/8), scaled, to (B, 3, H, W)"""
        config = self.config
        x = latents / self._column(config.scale, latents) + self._column(config.shift, latents)
        x = F.relu(self._convolve("decoder.1", torch.tanh(x / 3) * 3))
        at = 3
        for level, blocks in enumerate(config.decoder_blocks):
            if level:
                x = self._convolve(f"decoder.{at + 1}", F.interpolate(x, scale_factor=2, mode="nearest"))
                at += 2
            for _ in range(blocks):
                x, at = self._block(f"decoder.{at}", x), at + 1
        return self._convolve(f"decoder.{at}", x) * 2 - 1

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]

    def _block(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.pool.0.weight" in self.weights:
            y = F.conv2d(x, self.weights[f"{name}.pool.0.weight"])
            y = F.group_norm(y, 4, self.weights[f"{name}.pool.1.weight"], self.weights[f"{name}.pool.1.bias"])
            x = x + F.conv2d(F.relu(y), self.weights[f"{name}.pool.3.weight"])
        y = F.relu(self._convolve(f"{name}.conv.0", x))
        y = F.relu(self._convolve(f"{name}.conv.2", y))
        return F.relu(self._convolve(f"{name}.conv.4", y) + x)

    def _convolve(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), stride=stride, padding=1)


_MAKE: dict[str, Callable[[Any], Any]] = {
    "alae": lambda network: NaiveALAE(network, rate=1.0, half_life=1.0),
    "vqvae2": lambda network: NaiveVQVAE2(network, rate=1.0),
    "beta_vae": lambda network: NaiveBetaVAE(network, rate=1.0),
    "taesd": NaiveTAESD,
}


def _encode_alae(network: NaiveALAE, images: Tensor) -> Tensor:
    return network.encode(images, network.config.levels - 1)


def _decode_alae(network: NaiveALAE, latents: Tensor, noise: Sequence[Tensor]) -> Tensor:
    top = network.config.levels - 1
    return network.generate(latents[:, None].repeat(1, 2 * (top + 1), 1), noise, top)


_PASSES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor, Any], Tensor]]] = {
    "alae": (_encode_alae, _decode_alae),
    "vqvae2": (NaiveVQVAE2.encode, lambda network, latents, noise: network.decode(latents)),
    "beta_vae": (
        lambda network, images: network.encode(images).chunk(2, 1)[0],
        lambda network, latents, noise: 2 * torch.sigmoid(network.decode(latents)) - 1,
    ),
    "taesd": (NaiveTAESD.encode, lambda network, latents, noise: network.decode(latents)),
}
