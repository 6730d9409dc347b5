"""Folders of images read as shards of them would be: the same keys, the same order, the same pixels."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from letit_dist.data.index import INDEX_NAME, JOURNAL_NAME
from letit_dist.data.packing import too_small
from letit_dist.data.reader import ShardDataset
from letit_dist.data.remote import is_url
from letit_dist.data.source_base import FileSource, Part, Request, walk
from letit_dist.data.sources import find, open_source
from letit_dist.data.transforms import UnreadableImage, decode, resize_crop
from letit_dist.data.writer import distinct_key
from letit_dist.errors import UserError


class FolderDataset:
    """What encoding needs of a data set, over files: `shards/pack.py --resolution SIDE` would give these pixels.

    Nothing is left out: an image that cannot be read, or is smaller, raises UserError.
    """

    def __init__(self, parts: Sequence[Part], names: Sequence[str]):
        self.domain, self.split = parts[0].domain or names[0], parts[0].split
        self.sources: list[FileSource] = []
        for part in parts:
            assert isinstance(part.source, FileSource)
            self.sources.append(part.source)
        self.side: int | None = None
        self._ends = list(accumulate(map(len, self.sources)))
        self._keys: list[str] = []
        for source in self.sources:
            used: set[str] = set()
            self._keys += [distinct_key(source.key(number), used) for number in range(len(source))]

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, sample: int) -> tuple[FileSource, int]:
        at = bisect.bisect_right(self._ends, sample)
        return self.sources[at], sample - (self._ends[at - 1] if at else 0)

    def key(self, sample: int) -> str:
        """The key that a shard would have for it."""
        return self._keys[sample]

    def place(self, sample: int) -> str:
        """Where an image lies, for messages."""
        source, number = self._locate(sample)
        return str(source.folder / source.name(number))

    def json(self, sample: int) -> dict[str, Any]:
        """What is known of the file beside its pixels."""
        source, number = self._locate(sample)
        return source.metadata(number)

    def stamp(self) -> list[str]:
        """What identifies the images: names and sizes of the files."""
        return [json.dumps(source.settings(), sort_keys=True) for source in self.sources]

    def require_side(self, side: int) -> FolderDataset:
        """These images at `side` pixels."""
        self.side = side
        return self

    def stored_size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        assert self.side is not None, "ask for a side first: require_side"
        return self.side, self.side

    def pixels(self, sample: int, *, size: tuple[int, int] | None = None) -> Tensor:
        """The centred square, box-filtered, uint8 (3, side, side); raises UnreadableImage."""
        assert self.side is not None, "ask for a side first: require_side"
        source, number = self._locate(sample)
        try:
            pixels = decode(source.item(number).content)
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror or error}") from None
        height, width = pixels.shape[1:]
        if min(height, width) < self.side:
            raise UserError(too_small(self.place(sample), (height, width), self.side, "the autoencoder's"))
        return resize_crop(pixels, self.side)


def _is_shards(path: str) -> bool:
    folder = Path(path)
    return is_url(path) or (folder / INDEX_NAME).exists() or (folder / JOURNAL_NAME).exists()


def open_images_of(paths: Sequence[str]) -> ShardDataset | FolderDataset:
    """Shard folders, or folders (lists, tables) of images, as one data set; raises UserError for what is neither.

    A folder that holds several domains or splits is refused with their names: they would become one.
    """
    folders = [path for path in paths if not _is_shards(path) and (Path(path).is_file() or walk(path)[0])]
    if not folders:
        return ShardDataset(paths)
    if len(folders) < len(paths):
        other = next(path for path in paths if path not in folders)
        raise UserError(f"{folders[0]} is a folder of images and {other} is not: give shards, or folders of images")
    return FolderDataset([_only_part(path) for path in paths], [Path(path).resolve().name for path in paths])


def _only_part(path: str) -> Part:
    found = find(path)
    parts = open_source(path, Request())
    if len(parts) > 1:
        inside = ", ".join(part.subfolder for part in parts)
        raise UserError(f"{path}: taken for {found.layout.name}, with {inside}: pack it (shards/pack.py), or name one")
    if not isinstance(parts[0].source, FileSource):
        raise UserError(f"{path}: taken for {found.layout.name}, no files of images: pack it first (shards/pack.py)")
    return parts[0]
