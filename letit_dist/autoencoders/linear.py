"""The autoencoder of the proof of concept (LETIT, section 4.2): points of the plane, linear both ways."""

from __future__ import annotations

from torch import Tensor, nn


class LinearAutoencoder(nn.Module):
    """Points (B, inputs) to latents (B, latent_dim) and back. It sees no images, so it is of no registered kind."""

    def __init__(self, inputs: int = 2, latent_dim: int = 8):
        super().__init__()
        self.latent_shape = (latent_dim,)
        self.encoder = nn.Linear(inputs, latent_dim)
        self.decoder = nn.Linear(latent_dim, inputs)

    def encode(self, points: Tensor) -> Tensor:
        """(B, inputs) to (B, latent_dim)."""
        return self.encoder(points)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, latent_dim) to (B, inputs)."""
        return self.decoder(latents)
