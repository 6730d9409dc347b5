"""One rank's share of a batch of images: put together, augmented, and what could not be read counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from letit_dist import rng
from letit_dist.data import transforms
from letit_dist.errors import UserError


@dataclass
class ImageBatch:
    """One rank's share of a global batch."""

    pixels: Tensor  # uint8 (B, 3, H, W)
    positions: Tensor  # int64 (B,): global stream positions, the index of all randomness of these samples
    bad: list[tuple[str, str]]  # (key, reason) of samples that were replaced

    def pin_memory(self) -> ImageBatch:
        return ImageBatch(self.pixels.pin_memory(), self.positions, self.bad)


class BadSamples:
    """Counts replaced samples against a stated share."""

    def __init__(self, max_fraction: float):
        self.max_fraction = max_fraction
        self.count = self.seen = 0
        self.first: list[str] = []

    def add(self, count: int, seen: int, names: Sequence[tuple[str, str]] = ()) -> None:
        """`count` more bad ones among `seen` more samples (over all ranks); raises UserError past the share.

        The share is taken of 1000 samples at least: one bad image in the first batch proves nothing.
        """
        self.count += count
        self.seen += seen
        self.first += [f"{key} ({reason})" for key, reason in names][: 5 - len(self.first)]
        if self.count > self.max_fraction * max(self.seen, 1000):
            raise UserError(
                f"{self.count} of {self.seen} samples could not be read, more than data.max_bad_fraction = "
                f"{self.max_fraction:g} allows; the first: {', '.join(self.first) or 'on another rank'}"
            )


def augment(pixels: Tensor, positions: Tensor, seed: int, flip: bool, grayscale: float) -> Tensor:
    """Flip half of the samples and turn a share grey, in place, by (seed, purpose, position)."""
    if flip:
        transforms.flip_(pixels, rng.uniform(seed, "flip", positions) < 0.5)
    if grayscale:
        transforms.grayscale_(pixels, rng.uniform(seed, "grayscale", positions) < grayscale)
    return pixels


def stack(pixels: Sequence[Tensor]) -> Tensor:
    """(3, H, W) each -> (B, 3, H, W), in memory as they are: reordering colours costs more than copying them."""
    interleaved = [p.permute(1, 2, 0) for p in pixels]
    if all(p.is_contiguous() for p in interleaved):
        return torch.stack(interleaved).permute(0, 3, 1, 2)
    return torch.stack(list(pixels))
