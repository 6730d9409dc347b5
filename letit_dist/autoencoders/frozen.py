"""What other people's autoencoders need to be ours: latents brought to a common scale, and large images in tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from letit_dist.autoencoders.base import Autoencoder, AutoencoderConfig
from letit_dist.errors import UserError

TILED_FROM, TILE = 1024, 512  # pixels: what `tile: auto` means


class FrozenConfig(AutoencoderConfig):
    """Latents are (the network's - shift) * scale, by channel; images are taken whole or in overlapping tiles."""

    scale: tuple[PositiveFloat, ...] = Field((1.0,), min_length=1, description="one for all channels, or one for each")
    shift: tuple[float, ...] = Field((0.0,), min_length=1, description="one for all channels, or one for each")
    tile: Literal["auto"] | int = Field(
        "auto",
        description="side in pixels of the tiles that images are encoded and decoded in; 0 = whole; auto = 512 from "
        "1024 pixels on. Tiles bound the memory, and see less of the image than the whole network does",
    )

    @property
    def tile_pixels(self) -> int:
        """Side of a tile, or of the whole image."""
        tile = (TILE if self.resolution >= TILED_FROM else 0) if self.tile == "auto" else self.tile
        return tile if 0 < tile < self.resolution else self.resolution

    @model_validator(mode="after")
    def _not_negative(self) -> FrozenConfig:
        if self.tile != "auto" and self.tile < 0:
            raise ValueError("tile: a side in pixels, 0 or auto")
        return self


class Frozen(Autoencoder):
    """Base of other people's autoencoders, whose latents are maps (C, H/f, W/f) or, without tiles, any shape.

    A subclass gives `_encode`, images (B, 3, h, w) in [-1, 1] to the network's latents, and `_decode`, back; it calls
    `_set_shape` in its __init__.
    """

    config: FrozenConfig

    def _encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def _set_shape(self, latent_shape: Sequence[int]) -> None:
        """Take the shape of one image's latents, and refuse settings that do not fit it."""
        config, shape = self.config, tuple(latent_shape)
        self.latent_shape = shape
        problems = [
            f"{config.kind}.{name}: {len(values)} numbers for {shape[0]} channels"
            for name, values in (("scale", config.scale), ("shift", config.shift))
            if len(values) not in (1, shape[0])
        ]
        if config.tile_pixels < config.resolution:
            factor = config.resolution // shape[1] if len(shape) == 3 else 0
            if factor == 0 or shape[1:] != (config.resolution // factor,) * 2 or config.resolution % factor:
                problems.append(f"{config.kind}.tile: latents {shape} are no map of an image, give tile 0")
            elif config.tile_pixels % (4 * factor):
                problems.append(
                    f"{config.kind}.tile: a multiple of {4 * factor} is needed, a cell of the latents is "
                    f"{factor} pixels wide, got {config.tile_pixels}"
                )
        if problems:
            raise UserError("\n".join(problems))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, *latent_shape)."""
        self.check_images(images)
        latents = self._in_tiles(self._encode, images, self.config.tile_pixels)
        return (latents - self._by_channel(self.config.shift, latents)) * self._by_channel(self.config.scale, latents)

    def decode(
        self,
        latents: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents (B, *latent_shape) to images (B, 3, H, W); there is no decoder noise."""
        self.check_latents(latents)
        raw = latents / self._by_channel(self.config.scale, latents) + self._by_channel(self.config.shift, latents)
        if self.config.tile_pixels == self.config.resolution:
            return self._decode(raw)
        tile = self.config.tile_pixels * latents.shape[-1] // self.config.resolution
        return self._in_tiles(self._decode, raw, tile)

    @staticmethod
    def _by_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        shape = (-1, *[1] * (like.ndim - 2))  # (C, 1, 1) for maps, (C,) for vectors
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(shape)

    def _in_tiles(self, function: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
        return function(x) if tile >= x.shape[-1] else in_tiles(function, x, tile)


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """`function` of maps (B, C, S, S), applied to overlapping tiles of side `tile` and blended: (B, C', S', S').

    Neighbours share a quarter of a tile. The outer quarter of that strip is left out, because a cut edge disturbs it,
    and the two fade into each other over the middle half: where `function` reaches no further than the strip's outer
    quarter the result is that of the whole, elsewhere near it and without seams.
    """
    side, shared = x.shape[-1], tile // 4
    # The last tile ends where the image ends, and so may share more.
    starts = sorted({*range(0, side - tile, tile - shared), side - tile})
    total: Tensor | None = None
    weights: Tensor | None = None
    for top, left in product(starts, starts):
        part = function(x[..., top : top + tile, left : left + tile])
        # A cell of latents is several pixels: one of the two numbers is 1.
        up, down = max(1, part.shape[-1] // tile), max(1, tile // part.shape[-1])
        if total is None or weights is None:
            total = part.new_zeros(*part.shape[:2], side * up // down, side * up // down, dtype=torch.float32)
            weights = part.new_zeros(side * up // down, side * up // down, dtype=torch.float32)
        size, strip = part.shape[-1], shared * up // down
        rows, columns = (
            _fade(size, strip, cut_before=start > 0, cut_after=start + tile < side).to(part.device)
            for start in (top, left)
        )
        weight = rows[:, None] * columns
        place = (
            ...,
            slice(top * up // down, top * up // down + size),
            slice(left * up // down, left * up // down + size),
        )
        total[place] += part * weight
        weights[place] += weight
    assert total is not None and weights is not None
    return total / weights


def _fade(size: int, strip: int, *, cut_before: bool, cut_after: bool) -> Tensor:
    """Weights (size,) of a tile along one side: 1, falling to 0 towards the edges where it was cut."""
    ramp = ((torch.arange(size) + 0.5 - strip / 4) / (strip / 2)).clamp(0, 1)
    ones = torch.ones(size)
    return (ramp if cut_before else ones) * (ramp.flip(0) if cut_after else ones)
