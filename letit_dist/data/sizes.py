"""Several resolutions of one image in one sample: `key.1024.jpg`, `key.256.jpg`. Which file to read for a size.

A WebDataset key ends at the first dot, so these are one sample whose extensions are `1024.jpg` and `256.jpg`. A
sample with one image has no number: `key.jpg`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from letit_dist.data.transforms import IMAGE_EXTENSIONS


def sized(side: int, extension: str) -> str:
    """The extension of the image of `side` pixels: (256, "jpg") -> "256.jpg"."""
    return f"{side}.{extension}"


def images_of(extensions: Iterable[str]) -> dict[int | None, str] | None:
    """Side (None where it is not stated) -> extension of a sample's images; None if that is not one image, in one or
    several stated sizes."""
    names = [name for name in extensions if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if len(names) == 1:
        return {_side(names[0]): names[0]}
    by_side = {_side(name): name for name in names}
    return by_side if names and None not in by_side and len(by_side) == len(names) else None


def choose(images: dict[int | None, str], resolution: int | None) -> int | None:
    """The side to read for `resolution`: the smallest that is not smaller, else (and for None) the largest."""
    sides = sorted(side for side in images if side is not None)
    if not sides:
        return None
    return next((side for side in sides if resolution is not None and side >= resolution), sides[-1])


@functools.cache
def choose_file(extensions: tuple[str, ...], resolution: int | None) -> tuple[int | None, str] | None:
    """(side, extension) of the file to read for `resolution`, as `images_of` and `choose` say; None without an image.

    Kept, because nearly all samples of a data set have files of the same names.
    """
    images = images_of(extensions)
    if images is None:
        return None
    side = choose(images, resolution)
    return side, images[side]


def _side(extension: str) -> int | None:
    number = extension.rpartition(".")[0]
    return int(number) if number.isdecimal() and not number.startswith("0") else None
