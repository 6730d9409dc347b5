"""Images to work on, wherever they lie: one file, a folder, or shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from letit_dist.data.index import INDEX_NAME
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import IMAGE_EXTENSIONS, UnreadableImage, decode, resize_crop
from letit_dist.errors import UserError


class Images:
    """Names and pixels (3, R, R) in a fixed order; unreadable images are left out, counted and listed."""

    def __init__(self, resolution: int, count: int, max_bad_fraction: float):
        self.resolution = resolution
        self.count = count
        self.bad: list[tuple[str, str]] = []
        self._limit = max_bad_fraction

    def __len__(self) -> int:
        """How many there are, unreadable ones included."""
        return self.count

    def _load(self, position: int) -> tuple[str, Tensor]:
        raise NotImplementedError

    def name(self, position: int) -> str:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for position in range(self.count):
            try:
                pixels = self._load(position)
            except UnreadableImage as error:
                self.bad.append((self.name(position), str(error)))
                if self.count == 1 or len(self.bad) > self._limit * max(self.count, 20):
                    listed = ", ".join(f"{name} ({reason})" for name, reason in self.bad[:5])
                    raise UserError(f"{len(self.bad)} of {self.count} images cannot be read: {listed}") from None
                continue
            yield self.name(position), resize_crop(pixels, self.resolution)


class _Files(Images):
    def __init__(self, paths: list[Path], root: Path, resolution: int, max_bad_fraction: float):
        super().__init__(resolution, len(paths), max_bad_fraction)
        self._paths = paths
        names = [str(path.relative_to(root).with_suffix("")).replace("/", "-") for path in paths]
        twice = {name for name, count in Counter(names).items() if count > 1}
        # a.png and a.jpg would both become a: they keep their endings.
        self._names = [n + p.suffix.replace(".", "-") if n in twice else n for n, p in zip(names, paths, strict=True)]

    def name(self, position: int) -> str:
        return self._names[position]

    def _load(self, position: int) -> Tensor:
        try:
            data = self._paths[position].read_bytes()
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from None
        return decode(data)


class _Shards(Images):
    def __init__(self, dataset: ShardDataset, count: int, resolution: int, max_bad_fraction: float):
        super().__init__(resolution, count, max_bad_fraction)
        self._dataset = dataset

    def name(self, position: int) -> str:
        return self._dataset.key(position).replace("/", "-")

    def _load(self, position: int) -> Tensor:
        return self._dataset.pixels(position)


def open_images(path: Path, resolution: int, limit: int | None = None, max_bad_fraction: float = 0.05) -> Images:
    """The images of a file, a folder (subfolders included, sorted by name) or a shard folder, at most `limit`.

    Each is cropped to its centred square and resized to `resolution`. Raises UserError for a missing path and
    a folder without images.
    """
    if (path / INDEX_NAME).is_file():
        dataset = ShardDataset([path])
        return _Shards(dataset, min(len(dataset), limit or len(dataset)), resolution, max_bad_fraction)
    if path.is_file():
        return _Files([path], path.parent, resolution, max_bad_fraction)
    if not path.is_dir():
        raise UserError(f"no such image or folder: {path}")
    paths = sorted(p for p in path.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and p.is_file())
    if not paths:
        raise UserError(f"{path} holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))}) and is no shard folder")
    return _Files(paths[:limit], path, resolution, max_bad_fraction)
