"""The tiny autoencoders of the TAESD family (Ollin Boer Bohan; MIT): taesd, taesdxl, taesd3, taef1, taef2.

Written from their list of layers. Each stands in for the large autoencoder of a diffusion model, at 1.2 M parameters
a side and eight pixels a cell.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from letit_dist.autoencoders.frozen import Frozen, FrozenConfig
from letit_dist.registry import AUTOENCODERS


class TAESDConfig(FrozenConfig):
    """Layers by level, in the order of computation: one level more than there are halvings."""

    kind: Literal["taesd"] = "taesd"
    latent_channels: PositiveInt = Field(4, description="4 taesd, taesdxl; 16 taesd3, taef1; 32 taef2")
    width: PositiveInt = 64
    encoder_blocks: tuple[PositiveInt, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[PositiveInt, ...] = (3, 3, 3, 1)
    encoder_branches: tuple[bool, ...] = Field(
        (False, False, False, False), description="levels whose blocks have the branch with a group norm (taef2: last)"
    )
    decoder_branches: tuple[bool, ...] = Field((False, False, False, False), description="likewise (taef2: first)")

    @model_validator(mode="after")
    def _levels(self) -> TAESDConfig:
        counts = {name: len(getattr(self, name)) for name in ("encoder_blocks", "decoder_blocks")}
        counts |= {name: len(getattr(self, name)) for name in ("encoder_branches", "decoder_branches")}
        if len(set(counts.values())) > 1:
            raise ValueError("one number for each level: " + ", ".join(f"{k} has {n}" for k, n in counts.items()))
        if self.resolution % self.factor:
            raise ValueError(f"resolution {self.resolution} is no multiple of {self.factor}, the pixels of a cell")
        return self

    @property
    def factor(self) -> int:
        """Pixels along the side of a cell of the latents."""
        return 2 ** (len(self.encoder_blocks) - 1)


class Block(nn.Module):
    """Residual block (B, width, H, W) -> same; with a branch it adds a group-normed 1x1 path to its input first."""

    def __init__(self, width: int, branch: bool):
        super().__init__()
        self.conv = nn.Sequential(
            *[nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)],
            *[nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)],
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.pool = None
        if branch:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                *[nn.GroupNorm(4, 4 * width), nn.ReLU(inplace=True)],
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu_(self.conv(x) + x)


class _Bound(nn.Module):
    """Latents of any size to (-3, 3), nearly unchanged up to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _ordered(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) in the memory format in which these layers, all but a few of them 3x3 convolutions of 64
    channels, are a fifth faster on a CPU; convolutions hand it on."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


@AUTOENCODERS.register("taesd")
class TAESD(Frozen):
    """Latents (B, latent_channels, H/8, W/8). Layers are numbered as in the published files."""

    config_class: ClassVar[type] = TAESDConfig
    tiny: ClassVar[TAESDConfig] = TAESDConfig(
        resolution=32,
        width=8,
        encoder_blocks=(1, 1, 1),
        decoder_blocks=(1, 1, 1),
        encoder_branches=(False, False, True),
        decoder_branches=(True, False, False),
        scale=(0.5,),
        shift=(0.1, -0.2, 0.3, 0.0),
    )
    config: TAESDConfig

    def __init__(self, config: TAESDConfig):
        super().__init__(config)
        side = config.resolution // config.factor
        self._set_shape((config.latent_channels, side, side))
        width = config.width
        self.encoder = nn.Sequential()
        for level, (blocks, branch) in enumerate(zip(config.encoder_blocks, config.encoder_branches, strict=True)):
            first = nn.Conv2d(3, width, 3, padding=1)
            self.encoder.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False) if level else first)
            self.encoder.extend(Block(width, branch) for _ in range(blocks))
        self.encoder.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        start = [_Bound(), nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        self.decoder = nn.Sequential(*start)
        for level, (blocks, branch) in enumerate(zip(config.decoder_blocks, config.decoder_branches, strict=True)):
            if level:
                self.decoder.extend([nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)])
            self.decoder.extend(Block(width, branch) for _ in range(blocks))
        self.decoder.append(nn.Conv2d(width, 3, 3, padding=1))

    def _encode(self, images: Tensor) -> Tensor:
        return self.encoder(_ordered((images + 1) / 2)).contiguous()

    def _decode(self, latents: Tensor) -> Tensor:
        return (self.decoder(_ordered(latents)) * 2 - 1).contiguous()
