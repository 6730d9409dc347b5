"""One training iteration of VQ-VAE-2 as it was published, written plainly: one side of `throughput.py vqvae2`.

The quantiser makes the whole matrix of distances and one-hot rows of all codes, and sums by a product with the latter;
maps are row-major, and the optimiser loops over parameters. It shares no code with `letit_dist`, so that agreement
means something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from letit_dist.autoencoders.vqvae2 import VQVAE2

COMMITMENT, EPS = 0.25, 1e-5
LEVELS = ("top", "bottom")


class NaiveVQVAE2:
    """A letit VQ-VAE-2 without layer noise, as functions of copies of its weights under the same names."""

    def __init__(self, network: VQVAE2, *, rate: float, eps: float = 1e-8):
        self.config = network.config
        plain = {"memory_format": torch.contiguous_format}
        self.weights = {n: p.detach().clone(**plain).requires_grad_() for n, p in network.named_parameters()}
        self.books = {name: buffer.clone() for name, buffer in network.named_buffers()}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=rate, eps=eps, foreach=False)
        self.precision = "fp32"

    def loss(self, images: Tensor) -> Tensor:
        """Of (B, 3, H, W); moves the codebooks."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            latents, commitment = self._latents(images, moving=True)
            return F.mse_loss(self.decode(latents).to(images.dtype), images) + COMMITMENT * commitment

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to latents (B, 2 * code_dim, H/4, W/4)."""
        return self._latents(images, moving=False)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 2 * code_dim, H/4, W/4) to images (B, 3, H, W)."""
        return self._decode("decoder", latents)

    def _latents(self, images: Tensor, *, moving: bool) -> tuple[Tensor, Tensor]:
        """Latents and the sum of both commitments; codebooks follow if they are `moving`."""
        bottom = self._encode("bottom_encoder", images)
        top = self._convolve("top_projection", self._encode("top_encoder", bottom))
        top, commitment_top = self._quantise("top", top, moving)
        context = self._decode("top_decoder", top)
        bottom = self._convolve("bottom_projection", torch.cat([context, bottom], 1))
        bottom, commitment_bottom = self._quantise("bottom", bottom, moving)
        latents = torch.cat([self._upsample("top_upsample", top), bottom], 1)
        return latents, commitment_top + commitment_bottom

    def _convolve(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = 0 if weight.shape[-1] == 1 else 1
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], stride=stride, padding=padding)

    def _upsample(self, name: str, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride=2, padding=1)

    def _blocks(self, name: str, x: Tensor) -> Tensor:
        for number in range(self.config.residual_blocks):
            start = F.relu(x)
            y = F.relu(self._convolve(f"{name}.blocks.{number}.conv1", start))
            y = self._convolve(f"{name}.blocks.{number}.conv2", y)
            x = y + (start if self.config.relu_skip else x)
        return F.relu(x)

    def _encode(self, name: str, x: Tensor) -> Tensor:
        last = 2 if name == "bottom_encoder" else 1
        for number in range(last):
            x = F.relu(self._convolve(f"{name}.convs.{number}", x, stride=2))
        return self._blocks(name, self._convolve(f"{name}.convs.{last}", x))

    def _decode(self, name: str, x: Tensor) -> Tensor:
        x = self._blocks(name, self._convolve(f"{name}.conv", x))
        x = self._upsample(f"{name}.ups.0", x)
        return self._upsample(f"{name}.ups.1", F.relu(x)) if name == "decoder" else x

    def _quantise(self, level: str, x: Tensor, moving: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            embed, size, average = (
                self.books[f"{level}_quantizer.{name}"] for name in ("embed", "cluster_size", "embed_avg")
            )
            x = x.to(embed.dtype).permute(0, 2, 3, 1)
            rows = x.reshape(-1, x.shape[-1])
            distances = rows.pow(2).sum(1, keepdim=True) - 2 * rows @ embed.t() + embed.pow(2).sum(1)
            nearest = distances.min(1)[1]
            quantised = F.embedding(nearest.view(x.shape[:-1]), embed)
            if not moving:
                return quantised.permute(0, 3, 1, 2), rows.new_zeros(())
            chosen = F.one_hot(nearest, len(embed)).to(rows.dtype)
            with torch.no_grad():
                decay = self.config.decay
                size.mul_(decay).add_(chosen.sum(0), alpha=1 - decay)
                average.mul_(decay).add_(chosen.t() @ rows, alpha=1 - decay)
                total = size.sum()
                embed.copy_(average / ((size + EPS) / (total + len(embed) * EPS) * total)[:, None])
            commitment = (quantised.detach() - x).pow(2).mean()
            return (x + (quantised - x).detach()).permute(0, 3, 1, 2), commitment

    def iteration(self, images: Tensor) -> float:
        """The loss, after a step of the optimiser."""
        self.forget_gradients()
        loss = self.loss(images)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def held(self) -> list[Tensor]:
        """What lives between two iterations."""
        slots = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [*self.weights.values(), *self.books.values(), *slots]

    def forget_gradients(self) -> None:
        """As zero_grad."""
        self.optimizer.zero_grad(set_to_none=True)
