"""How far images are from others that they stand for: MSE, PSNR, SSIM and L2, one number an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Gaussian window of 11 pixels, sigma 1.5; K1 = 0.01, K2 = 0.03 (Wang et al. 2004, section III.C).
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over channels and pixels: (B, 3, H, W) twice to (B,), in float64."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor, *, peak: float = 1.0) -> Tensor:
    """Decibels, (B,); `peak` is the range of values. Infinite where the images are equal."""
    return 10 * torch.log10(peak**2 / squared_error(a, b))


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean norm of the difference over all channels and pixels: (B,)."""
    return (a.double() - b.double()).flatten(1).norm(dim=1)


def ssim(a: Tensor, b: Tensor, *, peak: float = 1.0) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13), of each channel, averaged over the places where the whole
    window fits: (B, C, H, W) twice to (B,), in float64. Images smaller than 11 pixels get a window of their size."""
    a, b = a.double(), b.double()
    size = min(_WINDOW, *a.shape[-2:])
    at = torch.arange(size, dtype=torch.float64, device=a.device) - (size - 1) / 2
    row = torch.exp(-at.square() / (2 * _SIGMA**2))
    row = row / row.sum()

    def mean(x: Tensor) -> Tensor:
        # The window is a product of two rows: one after the other is many times faster.
        planes = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(planes, row.view(1, 1, 1, -1)), row.view(1, 1, -1, 1)).view(*x.shape[:2], -1)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    found = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return found.flatten(1).mean(1)


def faithfulness(source: Tensor, output: Tensor) -> dict[str, Tensor]:
    """L2, PSNR and SSIM between pixels uint8 (B, 3, H, W), as images in [0, 1]."""
    a, b = source.double() / 255, output.double() / 255
    return {"l2_to_source": l2(a, b), "psnr_to_source": psnr(a, b), "ssim_to_source": ssim(a, b)}
