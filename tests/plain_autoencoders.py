"""Two autoencoders without codes, so small that every number of theirs can be checked."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from letit_dist.autoencoders.base import Autoencoder, AutoencoderConfig


class FlatConfig(AutoencoderConfig):
    kind: Literal["flat"] = "flat"


class Flat(Autoencoder):
    """Sixteen numbers an image: linear both ways."""

    config_class: ClassVar[type] = FlatConfig

    def __init__(self, resolution: int):
        super().__init__(FlatConfig(resolution=resolution))
        self.latent_shape = (16,)
        self.down = torch.nn.Linear(3 * resolution**2, 16)
        self.up = torch.nn.Linear(16, 3 * resolution**2)
        self.eval().requires_grad_(False)

    def encode(self, images):
        self.check_images(images)
        return self.down(images.flatten(1))

    def decode(self, latents, *, noise=None, generator=None):
        self.check_latents(latents)
        return self.up(latents).unflatten(1, (3, self.config.resolution, self.config.resolution))


class Pixels(Autoencoder):
    """Loses nothing: latents are the images."""

    config_class: ClassVar[type] = FlatConfig

    def __init__(self, resolution: int):
        super().__init__(FlatConfig(resolution=resolution))
        self.latent_shape = (3, resolution, resolution)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.eval().requires_grad_(False)

    def encode(self, images):
        self.check_images(images)
        return images * self.scale

    def decode(self, latents, *, noise=None, generator=None):
        self.check_latents(latents)
        return latents / self.scale
