"""Are there pictures of one split in another? Equal pixels by a digest, similar ones by a difference hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

NEAR = 4  # bits of 64
_ROWS, _COLUMNS = 256, 1 << 16  # a block of differences: 128 MiB
_COUNTS = np.array([bin(n).count("1") for n in range(1 << 16)], dtype=np.uint8)


def pixel_digest(pixels: Tensor) -> int:
    """64 bits of BLAKE2 over uint8 (3, H, W) and its size: equal for equal pictures, however they are stored."""
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=8)
    digest.update(pixels.contiguous().numpy().data)
    return int.from_bytes(digest.digest(), "little")


def difference_hash(pixels: Tensor) -> int:
    """64 bits of uint8 (3, H, W): for 8 rows of 9 averaged patches, whether each is brighter than its left neighbour.

    Nearly the same for a picture stored anew, resized or slightly brightened; also for unlike pictures that are
    plain in the same places, so that similar is a reason to look and no proof.
    """
    # Whole numbers first, so that a plain area averages to exactly one value; then fractions, because rounded
    # averages would be equal where they are not.
    luma = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).convert("L").convert("F")
    # Pillow weighs pixels that two patches share, so that the hash depends little on the resolution.
    patches = np.asarray(luma.resize((9, 8), Image.Resampling.BOX))
    bits = (patches[:, 1:] > patches[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "little")


def bit_counts(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many bits are set in each uint64; any shape."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(values)
    return _COUNTS[values[..., None].view(np.uint16)].sum(-1, dtype=np.uint8)


def near_pairs(
    first: np.ndarray[Any, Any], second: np.ndarray[Any, Any], most: int = NEAR
) -> Iterator[tuple[int, int]]:
    """(i, j) of all first[i], second[j] (uint64 (N,), (M,)) that differ in at most `most` bits, by j, then i."""
    for row in range(0, len(second), _ROWS):
        rows = second[row : row + _ROWS, None]
        found: list[tuple[int, int]] = []
        for column in range(0, len(first), _COLUMNS):
            differ = bit_counts(rows ^ first[None, column : column + _COLUMNS])
            j, i = np.nonzero(differ <= most)
            found += zip((j + row).tolist(), (i + column).tolist(), strict=True)
        yield from ((i, j) for j, i in sorted(found))


@dataclass
class Pictures:
    """What is compared: samples whose images could be read, their digests and hashes (uint64 (N,))."""

    samples: np.ndarray[Any, Any]
    digests: np.ndarray[Any, Any]
    hashes: np.ndarray[Any, Any]

    @property
    def duplicates(self) -> int:
        """How many are equal to an earlier one."""
        return len(self.digests) - len(np.unique(self.digests))


def shared(first: Pictures, second: Pictures) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(equal, similar) pairs of sample numbers: one pair for each sample of `second` that has a counterpart."""
    where = {digest: i for i, digest in reversed(list(enumerate(first.digests.tolist())))}
    equal = {j: where[digest] for j, digest in enumerate(second.digests.tolist()) if digest in where}
    similar: dict[int, int] = {}
    for i, j in near_pairs(first.hashes, second.hashes):
        if j not in equal:
            similar.setdefault(j, i)
    named = ([(int(first.samples[i]), int(second.samples[j])) for j, i in pairs.items()] for pairs in (equal, similar))
    return next(named), next(named)
