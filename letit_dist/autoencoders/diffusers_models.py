"""diffusers' autoencoders of images (optional extra `diffusers`): AutoencoderKL, -DC, -Tiny and VQModel."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from letit_dist.autoencoders.frozen import Frozen, FrozenConfig
from letit_dist.errors import UserError
from letit_dist.registry import AUTOENCODERS

MODELS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "VQModel")
# What tells how often each halves an image.
_LEVELS = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    "AutoencoderTiny": "encoder_block_out_channels",
    "VQModel": "block_out_channels",
}


class DiffusersConfig(FrozenConfig):
    """`settings` are those of the class in diffusers; `scale` and `shift` are filled in from them on import."""

    kind: Literal["diffusers"] = "diffusers"
    model: Literal["AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "VQModel"]
    settings: dict[str, Any] = Field({}, description="its arguments in diffusers, as in its config.json")


def diffusers_class(name: str) -> type[Any]:
    """The class in diffusers; raises UserError where diffusers is missing."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"{name} needs the library diffusers, which cannot be imported ({error}): "
            "pip install 'letit_dist[diffusers]'"
        ) from None
    return getattr(diffusers, name)


@AUTOENCODERS.register("diffusers")
class DiffusersAutoencoder(Frozen):
    """Latents (B, C, H/f, W/f): of AutoencoderKL the posterior's means.

    Of a VQModel they are its codebook's vectors, and `decode` takes what lies between those as it is, as our VQ-VAE-2
    does: an energy could not move latents that snap back.
    """

    config_class: ClassVar[type] = DiffusersConfig
    needs: ClassVar[str] = "diffusers"
    tiny: ClassVar[DiffusersConfig] = DiffusersConfig(
        resolution=16,
        model="AutoencoderKL",
        settings={
            "block_out_channels": [4, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 2,
            "layers_per_block": 1,
        },
        scale=(0.18215,),
    )
    config: DiffusersConfig

    def __init__(self, config: DiffusersConfig):
        super().__init__(config)
        made_by, settings = diffusers_class(config.model), config.settings
        known = set(inspect.signature(made_by).parameters)
        if unknown := sorted(set(settings) - known):
            raise UserError(
                f"diffusers.settings: this version's {config.model} has no {', '.join(unknown)} "
                f"(known: {', '.join(sorted(known))})"
            )
        try:
            self.network = made_by(**settings)
        except Exception as error:
            raise UserError(f"diffusers.settings: {config.model} refuses them: {error}") from None
        self.factor = 2 ** (len(self.network.config[_LEVELS[config.model]]) - 1)
        if config.resolution % self.factor:
            raise UserError(f"resolution {config.resolution} is no multiple of {self.factor}, the pixels of a cell")
        side = config.resolution // self.factor
        found = self.network.config
        channels = (found.get("vq_embed_dim") if config.model == "VQModel" else None) or found["latent_channels"]
        self._set_shape((channels, side, side))

    def _encode(self, images: Tensor) -> Tensor:
        found = self.network.encode(images)
        if self.config.model == "AutoencoderKL":
            return found.latent_dist.mode()
        if self.config.model == "AutoencoderDC":
            return found.latent
        if self.config.model == "VQModel":
            return self.network.quantize(found.latents)[0]
        return found.latents

    def _decode(self, latents: Tensor) -> Tensor:
        if self.config.model == "VQModel":
            return self.network.decode(latents, force_not_quantize=True).sample
        return self.network.decode(latents).sample
