"""The adversarial terms of ALAE (2004.04467, section 4): non-saturating losses and R1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits (B,) of real and of generated samples to the losses (B,) of the side that tells them apart."""
    return F.softplus(fake) + F.softplus(-real)


def generator_loss(fake: Tensor) -> Tensor:
    """Logits (B,) of generated samples to the non-saturating losses (B,) of the generator."""
    return F.softplus(-fake)


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 (1801.04406, section 4): |d logit / d image|^2 (B,), summed over pixels; differentiable once more.

    `images` (B, 3, H, W) must require gradients and have led to `logits` (B,).
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().sum((1, 2, 3))
