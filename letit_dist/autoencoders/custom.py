"""Any torch module with `encode` and `decode`, by its name in Python: `package.module:Class`."""

from __future__ import annotations

import importlib
import math
import re
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from letit_dist.autoencoders.frozen import Frozen, FrozenConfig
from letit_dist.errors import UserError
from letit_dist.registry import AUTOENCODERS


class CustomConfig(FrozenConfig):
    """The class, what it is called with, and the range of the images that it takes and gives."""

    kind: Literal["custom"] = "custom"
    module: str = Field(description="package.module:Class, on the PYTHONPATH of whoever opens the folder")
    arguments: dict[str, Any] = Field({}, description="keyword arguments of the class, plain values")
    images: Literal["signed", "unit"] = Field("signed", description="signed = in [-1, 1]; unit = in [0, 1]")
    latent_shape: tuple[PositiveInt, ...] | None = Field(None, description="null = found by encoding a grey image")


class Patches(nn.Module):
    """An image's patches as channels, and back without loss: the pattern of such a class, and what tests use."""

    def __init__(self, side: int = 2):
        super().__init__()
        self.down = nn.Conv2d(3, 3 * side**2, side, stride=side, bias=False)
        self.up = nn.PixelShuffle(side)
        with torch.no_grad():
            self.down.weight.copy_(torch.eye(3 * side**2).view_as(self.down.weight))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 side^2, H / side, W / side)"""
        return self.down(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3 side^2, H / side, W / side) -> (B, 3, H, W)"""
        return self.up(latents)


def find_class(name: str) -> type[nn.Module]:
    """The class of `package.module:Class`; raises UserError unless it is a torch module.

    That is asked before it is called: a folder from elsewhere must not be able to name just any function.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:\w+", name):
        raise UserError(f"{name!r}: expected package.module:Class")
    place, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(place)
    except Exception as error:  # somebody's module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name}: cannot import {place} ({reason}); is its folder on the PYTHONPATH?") from None
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{name}: {place} has no torch module (a class) of that name")
    missing = [f"`{method}`" for method in ("encode", "decode") if not callable(getattr(found, method, None))]
    if missing:
        raise UserError(f"{name} has no {' and no '.join(missing)}, which letit_dist would call")
    return found


@AUTOENCODERS.register("custom")
class CustomAutoencoder(Frozen):
    """Latents are what `encode` gives, of any shape (B, *L); `decode` must take them back to images."""

    config_class: ClassVar[type] = CustomConfig
    tiny: ClassVar[CustomConfig] = CustomConfig(
        resolution=16, module="letit_dist.autoencoders.custom:Patches", images="unit", shift=(0.5,), scale=(2.0,)
    )
    config: CustomConfig

    def __init__(self, config: CustomConfig):
        super().__init__(config)
        made_by = find_class(config.module)
        try:
            self.network = made_by(**config.arguments)
        except Exception as error:
            raise UserError(f"{config.module} refuses arguments {config.arguments}: {error}") from None
        if next(self.network.parameters(), None) is None:
            # Says where the model is, as the parameters of the others do.
            self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        self._set_shape(config.latent_shape or self._measured_shape())

    def _measured_shape(self) -> tuple[int, ...]:
        name, side = self.config.module, self.config.resolution
        training, grey = self.network.training, torch.zeros(1, 3, side, side)
        self.network.eval()
        try:
            with torch.no_grad():
                latents = self._encode(grey)
                again = self._decode(latents)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{name} fails on a grey image of {side} pixels: {type(error).__name__}: {error}") from None
        finally:
            self.network.train(training)
        if again.shape != grey.shape:
            raise UserError(f"{name}.decode gives {tuple(again.shape)} for an image of {tuple(grey.shape)}")
        if latents.ndim < 2 or len(latents) != 1 or math.prod(latents.shape) == 0:
            raise UserError(f"{name}.encode gives {tuple(latents.shape)}, expected latents (B, ...) with B = 1")
        return tuple(latents.shape[1:])

    def _encode(self, images: Tensor) -> Tensor:
        return self._tensor("encode", (images + 1) / 2 if self.config.images == "unit" else images)

    def _decode(self, latents: Tensor) -> Tensor:
        images = self._tensor("decode", latents)
        return images * 2 - 1 if self.config.images == "unit" else images

    def _tensor(self, method: str, x: Tensor) -> Tensor:
        result = getattr(self.network, method)(x)
        if not isinstance(result, Tensor):
            raise UserError(
                f"{self.config.module}.{method} gives a {type(result).__name__}, expected a tensor: wrap it in a class "
                "whose methods give tensors"
            )
        return result
