"""Images to work on, wherever they lie: one file, a folder, or shards."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from letit_dist.data.index import INDEX_NAME
from letit_dist.data.reader import ShardDataset
from letit_dist.data.source_base import walk
from letit_dist.data.transforms import IMAGE_EXTENSIONS, UnreadableImage, decode, fast_decoders, resize_crop
from letit_dist.errors import UserError

T = TypeVar("T")


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items in the same order; a thread makes up to `count` of them beforehand.

    Whatever making one raises comes where the item would have come.
    """

    def make() -> list[T]:
        return list(islice(items, 1))  # none at the end

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting = deque(thread.submit(make) for _ in range(count))
        try:
            while made := waiting.popleft().result():
                waiting.append(thread.submit(make))
                yield from made
        finally:
            for future in waiting:
                future.cancel()


class Images:
    """Names and pixels (3, R, R) in a fixed order; unreadable images are left out, counted and listed.

    No two names are equal, and none has a slash. `bad` holds (where it lies, reason) of what was left out.
    """

    def __init__(self, resolution: int, names: list[str], max_bad_fraction: float):
        self.resolution = resolution
        self.names = _distinct(names)
        self.bad: list[tuple[str, str]] = []
        self._limit = max_bad_fraction
        fast_decoders()  # now, so that a plan of memory, which is made before anything is read, counts them

    def __len__(self) -> int:
        """How many there are, unreadable ones included."""
        return len(self.names)

    def _load(self, position: int) -> Tensor:
        raise NotImplementedError

    def place(self, position: int) -> str:
        """Where an image lies, for messages."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for position, name in enumerate(self.names):
            try:
                pixels = self._load(position)
            except UnreadableImage as error:
                self.bad.append((self.place(position), str(error)))
                self._stop_past_limit()
                continue
            yield name, resize_crop(pixels, self.resolution)

    def _stop_past_limit(self) -> None:
        listed = ", ".join(f"{place} ({reason})" for place, reason in self.bad[:5])
        if len(self) == 1:
            raise UserError(f"cannot be read: {listed}")
        # The share is taken of 20 images at least: one bad image in a small folder proves nothing.
        if len(self.bad) > self._limit * max(len(self), 20):
            raise UserError(
                f"{len(self.bad)} of {len(self)} images cannot be read, more than --max-bad-fraction {self._limit:g} "
                f"allows; the first: {listed}"
            )


def _distinct(names: list[str]) -> list[str]:
    """Slashes become dashes; where that makes two names equal, the later one gets a number."""
    distinct: dict[str, None] = {}
    for name in names:
        flat = unique = name.replace("/", "-")
        number = 1
        while unique in distinct:
            number += 1
            unique = f"{flat}-{number}"
        distinct[unique] = None
    return list(distinct)


class _Files(Images):
    def __init__(self, paths: list[Path], root: Path, resolution: int, max_bad_fraction: float):
        names = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
        twice = {name for name, count in Counter(names).items() if count > 1}
        # a.png and a.jpg would both become a: they keep their endings.
        names = [n + p.suffix.replace(".", "-") if n in twice else n for n, p in zip(names, paths, strict=True)]
        super().__init__(resolution, names, max_bad_fraction)
        self._paths = paths

    def place(self, position: int) -> str:
        return str(self._paths[position])

    def _load(self, position: int) -> Tensor:
        try:
            data = self._paths[position].read_bytes()
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from None
        return decode(data)


class _Shards(Images):
    def __init__(self, dataset: ShardDataset, count: int, resolution: int, max_bad_fraction: float):
        super().__init__(resolution, [dataset.key(position) for position in range(count)], max_bad_fraction)
        self._dataset = dataset

    def place(self, position: int) -> str:
        return self._dataset.place(position)

    def _load(self, position: int) -> Tensor:
        return self._dataset.pixels(position, self.resolution)


def open_images(path: Path, resolution: int, limit: int | None = None, max_bad_fraction: float = 0.05) -> Images:
    """The images of a file, a folder (subfolders and linked ones included, hidden folders and files not, sorted by
    name) or a shard folder, at most `limit`.

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
    paths = sorted(path / name for name in walk(path)[0])
    if not paths:
        raise UserError(f"{path} holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))}) and is no shard folder")
    return _Files(paths[:limit], path, resolution, max_bad_fraction)
