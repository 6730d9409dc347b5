"""One training iteration of a beta-VAE as it was published, written plainly: one side of `throughput.py beta_vae`.

Gaussian reconstruction and divergence as 1Konny's code has them, on row-major maps, with an optimiser that loops over
parameters. It shares no code with `letit_dist`, so that agreement means something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from letit_dist.autoencoders.beta_vae import BetaVAE


class NaiveBetaVAE:
    """A letit beta-VAE with a sigmoid at its end, as functions of copies of its weights under the same names."""

    def __init__(self, network: BetaVAE, *, rate: float, beta: float = 10.0):
        self.beta = beta
        plain = {"memory_format": torch.contiguous_format}
        self.weights = {n: p.detach().clone(**plain).requires_grad_() for n, p in network.named_parameters()}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=rate, foreach=False)
        self.precision = "fp32"

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [-1, 1] to means and log variances (B, 2 * latent_dim)."""
        x = images
        for layer in (0, 2, 4, 6):
            x = F.relu(F.conv2d(x, *self._layer("encoder", layer), stride=2, padding=1))
        x = F.relu(F.conv2d(x, *self._layer("encoder", 8)))
        return F.linear(x.view(len(x), -1), *self._layer("encoder", 11))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, latent_dim) to logits (B, 3, 64, 64)."""
        x = F.relu(F.linear(latents, *self._layer("decoder", 0)).view(len(latents), -1, 1, 1))
        x = F.relu(F.conv_transpose2d(x, *self._layer("decoder", 3)))
        for layer in (5, 7, 9):
            x = F.relu(F.conv_transpose2d(x, *self._layer("decoder", layer), stride=2, padding=1))
        return F.conv_transpose2d(x, *self._layer("decoder", 11), stride=2, padding=1)

    def _layer(self, side: str, number: int) -> tuple[Tensor, Tensor]:
        return self.weights[f"{side}.{number}.weight"], self.weights[f"{side}.{number}.bias"]

    def loss(self, images: Tensor, eps: Tensor) -> Tensor:
        """Of (B, 3, 64, 64) in [-1, 1], with draws (B, latent_dim) of N(0, 1)."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.encode(images).to(eps.dtype)
            mean, log_variance = found[:, : eps.shape[1]], found[:, eps.shape[1] :]
            decoded = torch.sigmoid(self.decode(mean + torch.exp(log_variance / 2) * eps)).to(eps.dtype)
        error = F.mse_loss(decoded, (images + 1) / 2, reduction="sum") / len(images)
        divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp())
        return error + self.beta * divergence.sum(1).mean(0)

    def iteration(self, images: Tensor, eps: Tensor) -> float:
        """The loss, after a step of the optimiser."""
        self.forget_gradients()
        loss = self.loss(images, eps)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def held(self) -> list[Tensor]:
        """What lives between two iterations."""
        slots = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [*self.weights.values(), *slots]

    def forget_gradients(self) -> None:
        """As zero_grad."""
        self.optimizer.zero_grad(set_to_none=True)
