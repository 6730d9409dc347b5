"""No autoencoder at all: the latents are the images, so that an energy works in pixels (CF-EBM's setting, which the
paper compares itself with)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from letit_dist.autoencoders.base import Autoencoder, AutoencoderConfig
from letit_dist.registry import AUTOENCODERS


class IdentityConfig(AutoencoderConfig):
    """Nothing but the side of the images."""

    kind: Literal["identity"] = "identity"


@AUTOENCODERS.register("identity")
class Identity(Autoencoder):
    """Latents (B, 3, H, W) are the images themselves."""

    config_class: ClassVar[type] = IdentityConfig
    tiny: ClassVar[IdentityConfig] = IdentityConfig(resolution=16)

    def __init__(self, config: IdentityConfig):
        super().__init__(config)
        self.latent_shape = (3, config.resolution, config.resolution)
        # Says where the model is, as the parameters of the others do.
        self.place = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as they are."""
        self.check_images(images)
        return images

    def decode(
        self,
        latents: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents (B, 3, H, W) as they are."""
        self.check_latents(latents)
        return latents
