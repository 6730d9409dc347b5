"""Sets of images that metrics compare: folders, shards, and what a trained energy makes of a source on the fly."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from letit_dist.config import as_tree
from letit_dist.data.index import INDEX_NAME
from letit_dist.data.reader import ShardDataset
from letit_dist.data.source_base import fingerprint, images_below
from letit_dist.data.transforms import UnreadableImage, decode, to_images, to_pixels
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.extractors import resize_pixels

Columns = dict[str, Tensor]
Beside = Callable[[Tensor, Tensor], Columns]  # pixels of sources and of outputs (B, 3, H, W) -> numbers (B,)


class ImageSet:
    """Images in a fixed order. `read` gives any rows of them; `stamp` identifies the bytes they come from."""

    label: str
    stamp: str
    split: str | None = None
    snapshot: dict[str, Any] | None = None  # of the energy, where one made these

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def pixels(self) -> tuple[int, int]:
        """(H, W) of what `read` gives."""
        raise NotImplementedError

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Columns]:
        """pixels uint8 (B, 3, H, W), and numbers (B,) that were found on the way."""
        raise NotImplementedError


class _Real(ImageSet):
    """Images that exist, resized to `side` if that is given; otherwise all of one size."""

    def __init__(self, label: str, side: int | None):
        self.label, self.side = label, side
        self.size: tuple[int, int] | None = None  # (H, W) of the images, once known

    def _image(self, row: int) -> Tensor:
        raise NotImplementedError

    def _place(self, row: int) -> str:
        raise NotImplementedError

    @property
    def pixels(self) -> tuple[int, int]:
        if self.side is not None:
            return self.side, self.side
        if self.size is None:
            self.read([0])
        assert self.size is not None
        return self.size

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Columns]:
        return torch.stack([self._one(row) for row in rows]), {}

    def _one(self, row: int) -> Tensor:
        try:
            pixels = self._image(row)
        except UnreadableImage as error:
            raise UserError(f"{self._place(row)}: {error}: it would be missing from the score") from None
        if self.side is not None:
            return resize_pixels(pixels[None], self.side)[0] if pixels.shape[1:] != (self.side,) * 2 else pixels
        height, width = pixels.shape[1:]
        self.check_size((height, width), row)
        return pixels

    def check_size(self, size: tuple[int, int], row: int) -> None:
        """UserError if this (H, W) is not that of the others."""
        self.size = self.size or size
        if self.side is None and size != self.size:
            found, expected = (f"{w}x{h}" for h, w in (size, self.size))
            raise UserError(
                f"{self._place(row)} is {found}, others in {self.label} are {expected}: give one --resize for all"
            )


class FolderImages(_Real):
    """The images of a folder and of those in it, by name."""

    def __init__(self, folder: Path, side: int | None = None):
        super().__init__(str(folder), side)
        self.paths = [folder / path for path in images_below(folder)]
        parts = []
        # All of it is read once before the work: two sizes after an hour would be a bad surprise.
        for row, path in enumerate(self.paths):
            data = path.read_bytes()
            parts.append(f"{path.relative_to(folder)} {hashlib.sha256(data).hexdigest()}")
            if side is None:
                self.check_size(_size(data, path), row)
        self.stamp = fingerprint(parts)

    def __len__(self) -> int:
        return len(self.paths)

    def _image(self, row: int) -> Tensor:
        return decode(self.paths[row].read_bytes())

    def _place(self, row: int) -> str:
        return str(self.paths[row])


def _size(data: bytes, path: Path) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations that swap the sides
    except Exception as error:
        raise UserError(f"{path}: not an image that can be read ({type(error).__name__})") from None
    return (width, height) if turned else (height, width)


class ShardImages(_Real):
    """The images of a shard folder."""

    def __init__(self, folder: Path, side: int | None = None):
        super().__init__(str(folder), side)
        self.dataset = ShardDataset([folder])
        index = self.dataset.indexes[0]
        if index.kind != "images":
            raise UserError(f"{folder} holds {index.kind}, not images")
        if not len(self.dataset):
            raise UserError(f"{folder}: no images in it")
        self.split = index.meta.get("split")
        self.stamp = fingerprint(shard.sha256 for shard in index.shards)

    def __len__(self) -> int:
        return len(self.dataset)

    def _image(self, row: int) -> Tensor:
        return self.dataset.pixels(row)

    def _place(self, row: int) -> str:
        return self.dataset.place(row)


def open_image_set(path: str | Path, side: int | None = None) -> FolderImages | ShardImages:
    """The images of a folder or a shard folder; UserError for a path without images."""
    path = Path(path)
    if (path / INDEX_NAME).is_file():
        return ShardImages(path, side)
    if not path.is_dir():
        raise UserError(f"no such folder: {path}" if not path.exists() else f"{path} is a file, expected a folder")
    if any(path.glob("*.tar")):
        return ShardImages(path, side)  # which says what is missing
    return FolderImages(path, side)


class TranslatedImages(ImageSet):
    """What `translator` makes of every image of `source`, `outputs` times over with other noise each time.

    Output k of source image i is row k * len(source) + i, and its noise belongs to that row, so nothing depends on
    batches or ranks. `beside` adds numbers of each image and its source.
    """

    def __init__(
        self,
        translator: Translator,
        source: FolderImages | ShardImages,
        *,
        outputs: int = 1,
        seed: int = 0,
        batch: int = 16,
        side: int | None = None,
        beside: Beside | None = None,
    ):
        if outputs < 1 or batch < 1:
            raise UserError("--outputs and --batch must be at least 1")
        noisy = translator.sampler.config.noise_scale > 0 or translator.autoencoder.decodes_with_noise
        if outputs > 1 and not noisy:
            raise UserError(f"{outputs} outputs a source: this energy's chain has no noise, they would all be the same")
        resolution = translator.autoencoder.config.resolution
        size = tuple(source.read([0])[0].shape[2:])
        if size != (resolution, resolution):
            raise UserError(
                f"{source.label} holds images of {size[1]}x{size[0]}, the autoencoder takes {resolution}x{resolution}"
            )
        self.translator, self.source, self.outputs = translator, source, outputs
        self.seed, self.batch, self.side, self.beside = seed, batch, side, beside
        energy = translator.energy
        self.label = f"run:{translator.origin}"
        self.split = source.split
        self.snapshot = {
            "run": str(translator.origin),
            "source": energy.extra.get("source"),
            "target": energy.extra.get("target"),
            "images_seen": energy.extra.get("images_seen"),
            "energy": energy.fingerprint(),
            "autoencoder": translator.autoencoder.fingerprint(),
            "chain": as_tree(translator.sampler.config),
            "outputs": outputs,
            "noise_seed": seed,
        }
        self.stamp = fingerprint([source.stamp, str(sorted(self.snapshot.items()))])

    def __len__(self) -> int:
        return len(self.source) * self.outputs

    @property
    def pixels(self) -> tuple[int, int]:
        side = self.side or self.translator.autoencoder.config.resolution
        return side, side

    @torch.no_grad()
    def read(self, rows: Sequence[int]) -> tuple[Tensor, Columns]:
        made, columns = [], []
        for first in range(0, len(rows), self.batch):
            places = list(rows[first : first + self.batch])
            pixels, _ = self.source.read([place % len(self.source) for place in places])
            result = self.translator.translate(
                to_images(pixels.to(self.translator.device)),
                noise=self.translator.noise(self.seed, places),
                decoder_noise=self.translator.autoencoder.decoder_noise(self.seed, places),
            )
            output = to_pixels(result.images).cpu()
            columns.append(self.beside(pixels, output) if self.beside else {})
            made.append(output if self.side is None else resize_pixels(output, self.side))
        return torch.cat(made), {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
