"""ALAE (2004.04467): a style generator, an encoder into its intermediate latent space, and a critic there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from letit_dist.autoencoders.base import Autoencoder, AutoencoderConfig
from letit_dist.autoencoders.recompute import recomputed
from letit_dist.autoencoders.style_layers import (
    SLOPE,
    EncoderBlock,
    EqualizedConv,
    EqualizedLinear,
    GeneratorBlock,
    double,
    halve,
)
from letit_dist.errors import UserError
from letit_dist.registry import AUTOENCODERS


class ALAEConfig(AutoencoderConfig):
    """The defaults are the published network for FFHQ at 1024 pixels."""

    kind: Literal["alae"] = "alae"
    resolution: int = Field(1024, description="side of the images in pixels: 8, 16, 32, ... 1024")
    start_channels: int = Field(16, gt=0, description="channels at the highest resolution; they double downwards")
    max_channels: int = Field(512, gt=0)
    latent_dim: int = Field(512, gt=1, description="of z and w")
    mapping_layers: int = Field(8, ge=1)

    @field_validator("resolution")
    @classmethod
    def _power_of_two(cls, resolution: int) -> int:
        if resolution < 8 or resolution & (resolution - 1):
            near = max(8, 1 << round(max(resolution, 8)).bit_length() - 1)
            raise ValueError(f"must be a power of two from 8 on (the network doubles from 4 pixels), e.g. {near}")
        return resolution

    @property
    def levels(self) -> int:
        """Resolutions from 4 pixels up to `resolution`; level l works at 4 * 2^l pixels."""
        return self.resolution.bit_length() - 2

    @property
    def style_inputs(self) -> int:
        """Places at which the generator takes w: two a level."""
        return 2 * self.levels

    def channels(self, level: int) -> int:
        """Width of the maps at `level`; -1 is what the encoder ends with."""
        return min(self.max_channels, self.start_channels << (self.levels - 1 - level))


class Encoder(nn.Module):
    """E: images to w, the sum of linear reads of (mean, std) at every resolution."""

    recompute_level: float = inf  # from this level on

    def __init__(self, config: ALAEConfig):
        super().__init__()
        widths = [config.channels(level) for level in range(-1, config.levels)]
        self.from_rgb = nn.ModuleList(EqualizedConv(3, width, 1, bias=True) for width in widths[1:])
        self.blocks = nn.ModuleList(
            EncoderBlock(widths[level + 1], widths[level], config.latent_dim, level) for level in range(config.levels)
        )

    def _from_rgb(self, images: Tensor, level: int) -> Tensor:
        # The published code applies LeakyReLU twice here.
        return F.leaky_relu(self.from_rgb[level](images), SLOPE * SLOPE, inplace=True)

    def _block(self, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return recomputed(self.blocks[level], x, when=level >= self.recompute_level)

    def forward(self, images: Tensor, level: int, blend: float = 1.0) -> Tensor:
        """Images (B, 3, 4 * 2^level, ...) to w (B, latent_dim); `blend` < 1 fades the level in."""
        x, w = self._block(level, self._from_rgb(images, level))
        if blend < 1:
            w = w * blend
            x = torch.lerp(self._from_rgb(halve(images), level - 1), x, blend)
        for below in range(level - 1, -1, -1):
            x, styles = self._block(below, x)
            w = w + styles
        return w


class Generator(nn.Module):
    """G: styles and noise to images, from a learnt constant of 4x4."""

    recompute_level: float = inf  # from this level on

    def __init__(self, config: ALAEConfig):
        super().__init__()
        widths = [config.channels(level) for level in range(config.levels)]
        self.const = nn.Parameter(torch.ones(1, widths[0], 4, 4))
        self.blocks = nn.ModuleList(
            GeneratorBlock(widths[max(level - 1, 0)], widths[level], config.latent_dim, level)
            for level in range(config.levels)
        )
        self.to_rgb = nn.ModuleList(EqualizedConv(width, 3, 1, bias=True, gain=0.03) for width in widths)

    def forward(self, styles: Tensor, level: int, blend: float = 1.0, noise: Iterator[Tensor] | None = None) -> Tensor:
        """Styles (B, >= 2 * (level + 1), latent_dim) to images (B, 3, 4 * 2^level, ...)."""
        x = below = self.const
        for index in range(level + 1):
            maps = None if noise is None else [next(noise), next(noise)]
            styled = (x, styles[:, 2 * index : 2 * index + 2], maps)
            below, x = x, recomputed(self.blocks[index], *styled, when=index >= self.recompute_level)
        images = self.to_rgb[level](x)
        if blend < 1:
            images = torch.lerp(double(self.to_rgb[level - 1](below)), images, blend)
        return images


class Mapping(nn.Module):
    """F: z to w."""

    def __init__(self, latent_dim: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(EqualizedLinear(latent_dim, latent_dim, lrmul=0.1) for _ in range(layers))

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) of N(0, 1) to w (B, latent_dim)."""
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            w = F.leaky_relu(layer(w), SLOPE)
        return w


class Critic(nn.Module):
    """D: w to a logit, high for w of real images. Without activations, as published."""

    def __init__(self, latent_dim: int):
        super().__init__()
        sizes = [latent_dim, latent_dim, 2 * latent_dim]
        self.layers = nn.ModuleList(EqualizedLinear(latent_dim, size, lrmul=0.1) for size in sizes)

    def forward(self, w: Tensor) -> Tensor:
        """w (B, latent_dim) to logits (B,)."""
        for layer in self.layers:
            w = layer(w)
        # Only one entry of the last layer is used; the others are kept because the checkpoints hold them.
        return w[:, w.shape[1] // 2]


@AUTOENCODERS.register("alae")
class ALAE(Autoencoder):
    """Latents are w (B, latent_dim). Encoding and decoding are at the full resolution; growing uses the parts."""

    config_class: ClassVar[type] = ALAEConfig
    tiny: ClassVar[ALAEConfig] = ALAEConfig(
        resolution=16, start_channels=4, max_channels=8, latent_dim=8, mapping_layers=2
    )
    decodes_with_noise: ClassVar[bool] = True
    config: ALAEConfig
    w_mean: Tensor

    def __init__(self, config: ALAEConfig):
        super().__init__(config)
        self.latent_shape = (config.latent_dim,)
        self.encoder = Encoder(config)
        self.critic = Critic(config.latent_dim)
        self.generator = Generator(config)
        self.mapping = Mapping(config.latent_dim, config.mapping_layers)
        self.register_buffer("w_mean", torch.zeros(config.style_inputs, config.latent_dim))

    def recompute(self, side: int | None) -> None:
        """See `Autoencoder.recompute`: the blocks of the encoder and the generator at `side` pixels and above."""
        level = inf if side is None else max(0, (side - 1).bit_length() - 2)
        self.encoder.recompute_level = self.generator.recompute_level = level

    @property
    def top(self) -> int:
        """The highest level."""
        return self.config.levels - 1

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to w (B, latent_dim)."""
        return self.encode_at(images, self.top)

    def encode_at(self, images: Tensor, level: int, blend: float = 1.0) -> Tensor:
        """`encode` at a level of growing: images (B, 3, 4 * 2^level, ...); `blend` in [0, 1] fades the level in."""
        self.check_level(level, blend)
        side = 4 << level
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise UserError(f"alae: expected images of shape (B, 3, {side}, {side}), got {tuple(images.shape)}")
        return self.encoder(images, level, blend)

    def decode(
        self,
        latents: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """w (B, latent_dim) to images (B, 3, H, W), without truncation (LETIT decodes so, with noise).

        `noise` holds the maps of `noise_shapes`, each with a batch in front (the first may have a batch of one:
        the published code shares it); or they are drawn from `generator`. With neither, the published
        stand-in for noise is used (a bump added to every activation; see `Styled`).
        """
        self.check_latents(latents)
        if noise is None and generator is not None:
            noise = self._draw(len(latents), generator)
        if noise is not None:
            self._check_noise(len(latents), noise)
        return self.generate(latents, self.top, noise=noise)

    def _draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        shapes = [(count if i else 1, *shape) for i, shape in enumerate(self.noise_shapes())]
        device = self.w_mean.device
        # Drawn in float32 where the generator lives, so that the dtype of the model changes no draw.
        return [
            torch.randn(shape, generator=generator, device=generator.device).to(device, self.w_mean.dtype)
            for shape in shapes
        ]

    def _check_noise(self, count: int, noise: Sequence[Tensor]) -> None:
        expected = [(count, *shape) for shape in self.noise_shapes()]
        found = [tuple(item.shape) for item in noise]
        shared = [(1, *expected[0][1:]), *expected[1:]]
        if found not in (expected, shared):
            raise UserError(f"alae: expected noise maps of shapes {expected}, got {found}")

    def generate(self, w: Tensor, level: int, blend: float = 1.0, *, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Images (B, 3, 4 * 2^level, ...) at a level of growing.

        w is (B, latent_dim), repeated over the style inputs, or (B, style inputs, latent_dim).
        """
        self.check_level(level, blend)
        styles = w if w.ndim == 3 else w[:, None].expand(-1, 2 * (level + 1), -1)
        return self.generator(styles, level, blend, None if noise is None else iter(noise))

    def truncate(self, w: Tensor, psi: float = 0.7, cutoff: int = 8) -> Tensor:
        """w (B, latent_dim) to styles (B, style inputs, latent_dim), the first `cutoff` pulled towards the mean of w
        (psi = 1 changes nothing). For sampling; neither training nor translation truncates."""
        styles = w[:, None].expand(-1, self.config.style_inputs, -1)
        pulled = torch.lerp(self.w_mean[:cutoff].to(w.dtype).expand(len(w), -1, -1), styles[:, :cutoff], psi)
        return torch.cat([pulled, styles[:, cutoff:]], 1)

    def noise_shapes(self, level: int | None = None) -> list[tuple[int, ...]]:
        """Shape of each noise map of one sample, two a level, in the order of use."""
        level = self.top if level is None else level
        return [(1, 4 << index, 4 << index) for index in range(level + 1) for _ in range(2)]

    def check_level(self, level: int, blend: float = 1.0) -> None:
        """Raise UserError for a level that the network does not have, or a blend it cannot have."""
        if not 0 <= level <= self.top:
            raise UserError(
                f"alae: no level {level}: a network of {self.config.resolution} pixels has levels 0 to {self.top} "
                f"(4 to {self.config.resolution} pixels)"
            )
        if not 0 <= blend <= 1 or (level == 0 and blend != 1):
            raise UserError(f"alae: blend must be in [0, 1], and 1 at level 0, got {blend} at level {level}")
