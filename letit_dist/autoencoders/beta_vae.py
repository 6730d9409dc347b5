"""beta-VAE (Higgins et al., ICLR 2017) in the layers of the published BetaVAE_H, for images of 64 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from letit_dist.autoencoders.base import Autoencoder, AutoencoderConfig
from letit_dist.registry import AUTOENCODERS


class BetaVAEConfig(AutoencoderConfig):
    """The defaults are LETIT's (section 4.2): 32 dimensions."""

    kind: Literal["beta_vae"] = "beta_vae"
    resolution: Literal[64] = Field(64, description="side of the images in pixels: the layers are for 64 alone")
    latent_dim: int = Field(32, gt=0)
    inputs: Literal["signed", "unit"] = Field(
        "signed",
        description="what the encoder sees: images in [-1, 1] (LETIT's copy), or in [0, 1] (1Konny's training)",
    )
    output: Literal["sigmoid", "linear"] = Field(
        "sigmoid", description="sigmoid = 1Konny's code; linear = LETIT's copy, whose last layer is the image"
    )


@AUTOENCODERS.register("beta_vae")
class BetaVAE(Autoencoder):
    """Latents are posterior means (B, latent_dim). Layers are numbered as in the published checkpoints."""

    config_class: ClassVar[type] = BetaVAEConfig
    tiny: ClassVar[BetaVAEConfig] = BetaVAEConfig(latent_dim=4)
    config: BetaVAEConfig

    def __init__(self, config: BetaVAEConfig):
        super().__init__(config)
        self.latent_shape = (config.latent_dim,)
        self.encoder = nn.Sequential(
            *[nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 4, 2, 1), nn.ReLU()],
            *[nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 4, 2, 1), nn.ReLU()],
            *[nn.Conv2d(64, 256, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2 * config.latent_dim)],
        )
        self.decoder = nn.Sequential(
            *[nn.Linear(config.latent_dim, 256), nn.Unflatten(1, (256, 1, 1)), nn.ReLU()],
            *[nn.ConvTranspose2d(256, 64, 4), nn.ReLU(), nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.ReLU()],
            *[nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU()],
            nn.ConvTranspose2d(32, 3, 4, 2, 1),
        )
        for layer in self.modules():
            # The published code tests for Conv2d, which a transposed convolution is not: those keep torch's start.
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 64, 64) in [-1, 1] to the mean and the log variance (B, latent_dim) of q(z | x)."""
        self.check_images(images)
        seen = (images + 1) / 2 if self.config.inputs == "unit" else images
        mean, log_variance = self.encoder(seen).chunk(2, 1)
        return mean, log_variance

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) to posterior means (B, latent_dim)."""
        return self.posterior(images)[0]

    def decode(
        self,
        latents: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents (B, latent_dim) to images (B, 3, 64, 64); there is no decoder noise."""
        self.check_latents(latents)
        output = self.decoder(latents)
        return 2 * torch.sigmoid(output) - 1 if self.config.output == "sigmoid" else output
