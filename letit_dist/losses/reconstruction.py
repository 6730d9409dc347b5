"""Losses between images and their reconstructions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error over samples, channels and pixels: (B, 3, H, W) twice to a scalar.

    Taken in float32 or wider, so that a bfloat16 reconstruction loses no small errors in the mean.
    """
    wide = torch.promote_types(torch.promote_types(reconstruction.dtype, images.dtype), torch.float32)
    # Copied: torch's scalar keeps hold of the memory in which it summed, as large as the images.
    return F.mse_loss(reconstruction.to(wide), images.to(wide)).clone()
