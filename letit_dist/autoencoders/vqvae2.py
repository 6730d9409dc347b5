"""VQ-VAE-2 with two levels (1906.00446), in the published architecture and with LETIT's changes as options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from letit_dist.autoencoders.base import Autoencoder, AutoencoderConfig
from letit_dist.autoencoders.convolution import ConvTranspose2d, JoinedConv2d
from letit_dist.autoencoders.layers import StridedDecoder, StridedEncoder
from letit_dist.autoencoders.quantize import BatchPlace, CodebookStats, Quantizer
from letit_dist.autoencoders.recompute import recomputed
from letit_dist.errors import UserError
from letit_dist.registry import AUTOENCODERS


class VQVAE2Config(AutoencoderConfig):
    """The defaults are the paper's latent, two maps of 32 (LETIT, section 4); rosinality's are 64 and 512."""

    kind: Literal["vqvae2"] = "vqvae2"
    resolution: int = Field(256, gt=0, description="side of the images in pixels, divisible by 8")
    channels: int = Field(128, gt=0)
    residual_blocks: int = Field(2, ge=1)
    residual_channels: int = Field(32, gt=0)
    code_dim: int = Field(32, gt=0, description="channels of each quantised map")
    codes: int = Field(256, gt=1, description="codebook size of each level")
    decay: float = Field(0.99, gt=0, lt=1, description="of the codebook's running means, per update")
    noise: bool = Field(False, description="layer noise in the bottom decoder (LETIT's paper; off in its script)")
    relu_skip: bool = Field(
        False, description="skips of residual blocks carry ReLU(x) (LETIT's code) instead of x (rosinality's)"
    )
    restart_below: float = Field(
        0.0,
        ge=0,
        description="codes used less often than this per update are restarted; 0 = never, as published",
    )
    restart_every: int = Field(50, gt=0, description="updates between two restarts")

    @field_validator("resolution")
    @classmethod
    def _divisible(cls, resolution: int) -> int:
        if resolution % 8:
            near = max(8, round(resolution / 8) * 8)
            raise ValueError(f"must be divisible by 8 (the top level has stride 8), e.g. {near}")
        return resolution

    @field_validator("channels")
    @classmethod
    def _even(cls, channels: int) -> int:
        if channels % 2:
            raise ValueError("must be even (the outer layers have half as many)")
        return channels


class TrainingOutput(NamedTuple):
    """What the loss of VQ-VAE-2 needs: reconstruction + weight * (commitment_top + commitment_bottom)."""

    reconstruction: Tensor  # (B, 3, H, W)
    commitment_top: Tensor  # scalar
    commitment_bottom: Tensor  # scalar


@AUTOENCODERS.register("vqvae2")
class VQVAE2(Autoencoder):
    """Two levels of codes: top (B, H/8, W/8) and bottom (B, H/4, W/4).

    Latents are cat[upsample(top), bottom] (B, 2 * code_dim, H/4, W/4): what enters the bottom decoder, and
    what LETIT's energy moves.
    """

    config_class: ClassVar[type] = VQVAE2Config
    tiny: ClassVar[VQVAE2Config] = VQVAE2Config(
        resolution=16, channels=8, residual_blocks=1, residual_channels=4, code_dim=4, codes=16, noise=True
    )
    stores_codes: ClassVar[bool] = True
    # No weight depends on the size of an image, and the others are settings of the codebooks' training.
    retrainable: ClassVar[frozenset[str]] = frozenset({"resolution", "decay", "restart_below", "restart_every"})
    config: VQVAE2Config
    _recompute = False

    def __init__(self, config: VQVAE2Config):
        super().__init__(config)
        width, depth, skip = config.channels, config.code_dim, config.relu_skip
        block = (width, config.residual_blocks, config.residual_channels)
        book: dict[str, Any] = {
            "decay": config.decay,
            "restart_below": config.restart_below,
            "restart_every": config.restart_every,
        }
        self.latent_shape = (2 * depth, config.resolution // 4, config.resolution // 4)
        self.bottom_encoder = StridedEncoder(3, *block, stride=4, relu_skip=skip)
        self.top_encoder = StridedEncoder(width, *block, stride=2, relu_skip=skip)
        self.top_projection = nn.Conv2d(width, depth, 1)
        self.top_quantizer = Quantizer(config.codes, depth, name="top", **book)
        self.top_decoder = StridedDecoder(depth, depth, *block, stride=2, relu_skip=skip)
        self.bottom_projection = JoinedConv2d(depth + width, depth, 1)
        self.bottom_quantizer = Quantizer(config.codes, depth, name="bottom", **book)
        self.top_upsample = ConvTranspose2d(depth, depth, 4, stride=2, padding=1)
        self.decoder = StridedDecoder(2 * depth, 3, *block, stride=4, relu_skip=skip, noise=config.noise)

    def recompute(self, side: int | None) -> None:
        """See `Autoencoder.recompute`: the bottom encoder and the decoder, whole, at `side` pixels and above."""
        self._recompute = side is not None and self.config.resolution >= side

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to quantised latents (B, 2 * code_dim, H/4, W/4); no gradient to the images."""
        return self.latents_from_codes(self.encode_codes(images))

    @property
    def codebook_size(self) -> int:
        return self.config.codes

    def encode_codes(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to {"top": (B, H/8, W/8), "bottom": (B, H/4, W/4)}."""
        self.check_images(images)
        bottom = self.bottom_encoder(images)
        top = self.top_quantizer.lookup(self.top_projection(self.top_encoder(bottom)))
        context = self.top_decoder(self.top_quantizer.embed_codes(top))
        bottom = self.bottom_quantizer.lookup(self.bottom_projection(context, bottom))
        return {"top": top, "bottom": bottom}

    def latents_from_codes(self, codes: dict[str, Tensor]) -> Tensor:
        """{"top": (B, H/8, W/8), "bottom": (B, H/4, W/4)} to latents (B, 2 * code_dim, H/4, W/4).

        Raises UserError for missing maps, other shapes, and codes that the codebook does not have.
        """
        for name, side in (("top", self.config.resolution // 8), ("bottom", self.config.resolution // 4)):
            if name not in codes:
                raise UserError(f"vqvae2: no {name!r} codes (found: {', '.join(codes) or 'nothing'})")
            found = codes[name]
            if found.ndim != 3 or found.shape[1:] != (side, side):
                raise UserError(f"vqvae2: expected {name} codes of shape (B, {side}, {side}), got {tuple(found.shape)}")
            # A tensor of another type, as an estimate of memory has it, has a shape and no numbers to ask for.
            asked = type(found) is Tensor and found.numel() > 0
            if asked and not 0 <= int(found.min()) <= int(found.max()) < self.config.codes:
                raise UserError(
                    f"vqvae2: {name} codes reach from {int(found.min())} to {int(found.max())}, "
                    f"the codebook has 0 to {self.config.codes - 1}: they come from another autoencoder"
                )
        top = self.top_quantizer.embed_codes(codes["top"])
        bottom = self.bottom_quantizer.embed_codes(codes["bottom"])
        return torch.cat([self.top_upsample(top), bottom], 1)

    def decode(
        self,
        latents: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents (B, 2 * code_dim, H/4, W/4) to images (B, 3, H, W), about in [-1, 1].

        With `config.noise`: `noise` holds the maps of `noise_shapes`, each with a batch in front; or they are
        drawn from `generator`; with neither the noise terms are left out (the mean image of the layer noise).
        """
        self.check_latents(latents)
        return self.decoder(latents, self._noise_for(latents, noise, generator))

    def noise_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each noise map of one sample, in the order of use; empty without layer noise."""
        if not self.config.noise:
            return []
        side = self.config.resolution // 4
        shapes: list[tuple[int, ...]] = [(1, side, side)] * (2 * self.config.residual_blocks)
        return [*shapes, (1, 2 * side, 2 * side)]

    def _noise_for(
        self, latents: Tensor, noise: Sequence[Tensor] | None, generator: torch.Generator | None
    ) -> Iterator[Tensor] | None:
        expected = [(len(latents), *shape) for shape in self.noise_shapes()]
        if noise is None and generator is not None:
            # Drawn in float32 where the generator lives, so that the dtype of the model changes no draw.
            noise = [
                torch.randn(shape, generator=generator, device=generator.device).to(latents.device)
                for shape in expected
            ]
        if noise is None:
            return None
        found = [tuple(item.shape) for item in noise]
        if found != expected:
            raise UserError(f"vqvae2: expected noise maps of shapes {expected}, got {found}")
        return iter(noise)

    def forward_training(
        self,
        images: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        place: BatchPlace | None = None,
    ) -> TrainingOutput:
        """Reconstruct images (B, 3, H, W) through both quantisers, with straight-through gradients.

        In training mode the batch enters the codebook statistics: call `update_codebooks` once a global batch,
        or `discard_statistics`. `place` allows restarts of dead codes (see `Quantizer`); `noise` and
        `generator` as in `decode`.
        """
        self.check_images(images)
        bottom = recomputed(self.bottom_encoder, images, when=self._recompute)
        top = self.top_projection(self.top_encoder(bottom))
        top, commitment_top, _ = self.top_quantizer(top, collect=self.training, place=place)
        bottom = self.bottom_projection(self.top_decoder(top), bottom)
        bottom, commitment_bottom, _ = self.bottom_quantizer(bottom, collect=self.training, place=place)
        latents = torch.cat([self.top_upsample(top), bottom], 1)
        drawn = self._noise_for(latents, noise, generator)
        maps = None if drawn is None else list(drawn)

        def decode(latents: Tensor) -> Tensor:
            return self.decoder(latents, None if maps is None else iter(maps))

        reconstruction = recomputed(decode, latents, when=self._recompute)
        return TrainingOutput(reconstruction, commitment_top, commitment_bottom)

    def codebook_sums(self) -> list[Tensor]:
        """What `update_codebooks` goes by, to be summed over the ranks before it (see `Quantizer.sums`)."""
        return [self.top_quantizer.sums(), self.bottom_quantizer.sums()]

    def update_codebooks(self) -> dict[str, CodebookStats]:
        """Move both codebooks by the collected global batch (see `Quantizer.update`)."""
        return {"top": self.top_quantizer.update(), "bottom": self.bottom_quantizer.update()}

    def discard_statistics(self) -> None:
        """Forget the batch collected since the last `update_codebooks`."""
        self.top_quantizer.discard()
        self.bottom_quantizer.discard()
