"""Reading indexed shards: a map over samples, the endless training stream, and one pass in order."""

from __future__ import annotations

import bisect
import copy
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from letit_dist import rng
from letit_dist.data import transforms
from letit_dist.data.batch import BadSamples, ImageBatch, augment, stack
from letit_dist.data.index import Index
from letit_dist.data.loading import Failure, loader, unwrap
from letit_dist.data.order import rank_positions, sample_at
from letit_dist.data.remote import BlockCache, RemoteShard, is_url, read_index
from letit_dist.data.sizes import choose, choose_file, images_of
from letit_dist.data.transforms import UnreadableImage
from letit_dist.errors import UserError

if TYPE_CHECKING:
    from letit_dist.data.foreign import ForeignStream

OPEN_FILES = 256  # a process: well below the usual limit of 1024, several streams included
REPLACEMENTS = 32


class ShardDataset:
    """The samples of one or more shard folders, one folder after another. Safe to fork and to pickle.

    A folder on a server (https://, s3://, ...) is read through `cache`, or the usual one.

    With `resolution`, images are of that size: the stored one where a sample has it, or else the next larger one
    reduced by the box filter. Raises UserError for shards that are smaller. With `scaled_decode`, a JPEG of 2, 4 or 8
    times the size is decoded at that size, which is faster and gives slightly other pixels (`decode_reduced`).
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        resolution: int | None = None,
        *,
        scaled_decode: bool = False,
        cache: BlockCache | None = None,
    ):
        if isinstance(paths, (str, Path)):
            paths = [paths]
        if not paths:
            raise UserError("no shard folder was given")
        if any(map(is_url, paths)):
            cache = cache or BlockCache()
        self.indexes = [
            read_index(str(path), cache) if cache is not None and is_url(path) else Index.read(path) for path in paths
        ]
        self._ends = np.cumsum([len(index) for index in self.indexes]).tolist()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._asked = resolution
        self._scaled = scaled_decode
        sizes = {index.meta["resolution"]: index.folder for index in self.indexes if "resolution" in index.meta}
        if resolution is not None:
            if (smallest := min(sizes, default=resolution)) < resolution:
                raise UserError(f"{sizes[smallest]} holds images of {smallest}, not {resolution}: pack it again")
        elif len(sizes) > 1:
            found = ", ".join(f"{folder} has {size}" for size, folder in sizes.items())
            raise UserError(f"shards of different resolution in one data set: {found}: pack them at one --resolution")
        self.resolution: int | None = resolution or next(iter(sizes), None)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for handle in getattr(self, "_open", {}).values():
            os.close(handle)

    def _locate(self, sample: int) -> tuple[Index, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        at = bisect.bisect_right(self._ends, sample)
        return self.indexes[at], sample - (self._ends[at - 1] if at else 0)

    def key(self, sample: int) -> str:
        index, local = self._locate(sample)
        return index.key(local)

    @property
    def domain(self) -> str:
        """What these are of: as the packer was told, or the folder's name."""
        return self.indexes[0].meta.get("domain") or self.indexes[0].folder.name

    @property
    def split(self) -> str | None:
        return self.indexes[0].meta.get("split")

    def stamp(self) -> list[str]:
        """What identifies the files: the same names packed anew are others."""
        return [shard.sha256 for index in self.indexes for shard in index.shards]

    def place(self, sample: int) -> str:
        """`folder/shard.tar: key`, for messages."""
        index, local = self._locate(sample)
        return f"{index.path_of(local)}: {index.key(local)}"

    def read(self, sample: int, extensions: Sequence[str] | None = None) -> dict[str, bytes]:
        """Extension -> bytes, all of them or those asked for; raises UserError when the shard is not whole."""
        index, local = self._locate(sample)
        files = index.files(local)
        wanted = files if extensions is None else extensions
        return {name: self._pread(index.path_of(local), *files[name]) for name in wanted}

    def _pread(self, path: Path | RemoteShard, offset: int, size: int) -> bytes:
        if isinstance(path, RemoteShard):
            return path.read(offset, size)
        try:
            handle = self._open.get(path)
            if handle is None:
                if len(self._open) >= OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                handle = self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._open.move_to_end(path)
            # Positioned reads: a handle inherited by a forked worker shares nothing that matters.
            data = os.pread(handle, size, offset)
            while 0 < len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise UserError(
                f"{path}: cannot read {size} bytes at offset {offset}: {error.strerror}: "
                "restore the shard, then the same command continues"
            ) from None
        if len(data) != size:
            raise UserError(
                f"{path}: expected {size} bytes at offset {offset}, got {len(data)}: "
                "the shard was truncated or replaced while in use; restore it and run again"
            )
        return data

    def json(self, sample: int) -> dict[str, Any]:
        """The sample's `json` file, or {} if it has none."""
        index, local = self._locate(sample)
        if "json" not in index.files(local):
            return {}
        try:
            return json.loads(self.read(sample, ["json"])["json"])
        except ValueError as error:
            raise UserError(f"{self.place(sample)}.json is not JSON: {error}") from None

    def images(self, sample: int) -> dict[int | None, str]:
        """Side (None: not stated) -> extension of each stored size; raises UserError for anything but one image."""
        index, local = self._locate(sample)
        images = images_of(index.extensions(local))
        if images is None:
            raise self._not_one_image(sample, index.extensions(local))
        return images

    def _not_one_image(self, sample: int, files: Sequence[str]) -> UserError:
        return UserError(f"{self.place(sample)}: one image a sample was expected, its files are: {', '.join(files)}")

    def decode(self, sample: int, extension: str) -> Tensor:
        """One stored image as it is, uint8 (3, H, W); raises UnreadableImage."""
        index, local = self._locate(sample)
        data = self._pread(index.path_of(local), *index.file(local, extension))
        return transforms.decode(data, trusted=index.well_formed)

    def pixels(self, sample: int, resolution: int | None = None, *, size: tuple[int, int] | None = None) -> Tensor:
        """The sample's image, uint8 (3, H, W), box-filtered to `resolution` if that is given; no more is read than
        that needs. Raises UnreadableImage; with `size`, UserError where the stored one is neither the size that is
        stated for it nor, where none is stated, `size` (H, W)."""
        wanted = resolution or self._asked
        index, local = self._locate(sample)
        chosen = choose_file(index.extensions(local), wanted)
        if chosen is None:
            raise self._not_one_image(sample, index.extensions(local))
        side, extension = chosen
        data = self._pread(index.path_of(local), *index.file(local, extension))
        stated = side or index.meta.get("resolution")
        if self._scaled and wanted and stated:
            pixels = transforms.decode_reduced(data, stated, wanted)
            if pixels is not None:
                return pixels
        pixels = transforms.decode(data, trusted=index.well_formed)
        if size is not None:
            _check_size(self, sample, pixels, (stated, stated) if stated else size)
        return transforms.resize_crop(pixels, wanted) if wanted else pixels

    def stored_size(self) -> tuple[int, int]:
        """(H, W) of every image in the largest stored size: the stated resolution, or the first readable image's."""
        stated = self.indexes[0].meta.get("resolution")
        if stated is not None:
            return stated, stated
        for sample in range(min(len(self), REPLACEMENTS)):
            try:
                images = self.images(sample)
                height, width = self.decode(sample, images[choose(images, None)]).shape[1:]
                return height, width
            except UnreadableImage as error:
                reason = error
        raise UserError(f"{self.place(0)} and the samples after it cannot be decoded: {reason}")

    def at(self, resolution: int) -> ShardDataset:
        """The same samples with images of `resolution` pixels a side."""
        other = copy.copy(self)
        other.resolution = other._asked = resolution
        return other

    def stores(self, resolution: int) -> bool:
        """Whether every folder has images of this size beside a larger one."""
        return all(resolution in index.meta.get("resolutions", ()) for index in self.indexes)

    def matching(self, resolution: int) -> ShardDataset:
        """The same samples at `resolution` where they hold it beside a larger one; otherwise as they are."""
        return self.at(resolution) if self.stores(resolution) else self

    def require_side(self, side: int) -> ShardDataset:
        """`matching(side)`, for an autoencoder of that resolution.

        Raises UserError for shards without images, and for images of another size.
        """
        for index in self.indexes:
            if index.kind != "images":
                raise UserError(f"{index.folder} holds {index.kind}, not images")
        if not len(self):
            raise UserError(f"{self.indexes[0].folder}: no images in it")
        dataset = self.matching(side)
        if (size := dataset.image_size()) != (side, side):
            raise UserError(
                f"{self.indexes[0].folder} holds images of {size[1]}x{size[0]}, the autoencoder takes {side}x{side}: "
                f"pack them with shards/pack.py --resolution {side}"
            )
        return dataset

    def image_size(self) -> tuple[int, int]:
        """(H, W) of every image that `pixels` returns."""
        return (self._asked, self._asked) if self._asked else self.stored_size()


class _Batches:
    """For the loader: stream positions -> ImageBatch."""

    def __init__(self, dataset: ShardDataset, seed: int, flip: bool, grayscale: float, resolution: int | None):
        self.dataset, self.seed, self.flip, self.grayscale = dataset, seed, flip, grayscale
        self.resolution = resolution
        self.size = dataset.stored_size()

    def __getitem__(self, positions: np.ndarray[Any, Any]) -> ImageBatch | Failure:
        try:
            bad: list[tuple[str, str]] = []
            samples = sample_at(positions, self.seed, len(self.dataset)).tolist()
            pixels = [self._pixels(sample, int(p), bad) for sample, p in zip(samples, positions, strict=True)]
            where = torch.from_numpy(positions)
            return ImageBatch(augment(stack(pixels), where, self.seed, self.flip, self.grayscale), where, bad)
        except UserError as error:
            return Failure(str(error))

    def _pixels(self, sample: int, position: int, bad: list[tuple[str, str]]) -> Tensor:
        # A bad sample is replaced, not left out: lengths must not differ between ranks.
        for attempt in range(REPLACEMENTS):
            try:
                return self.dataset.pixels(sample, self.resolution, size=self.size)
            except UnreadableImage as error:
                bad.append((self.dataset.key(sample), str(error)))
                sample = rng.seed_for(self.seed, f"replacement {attempt}", position) % len(self.dataset)
        raise UserError(
            f"{REPLACEMENTS} samples in a row cannot be decoded, the last: {self.dataset.place(sample)} ({bad[-1][1]})"
        )


def _check_size(dataset: ShardDataset, sample: int, pixels: Tensor, size: tuple[int, int]) -> None:
    if tuple(pixels.shape[1:]) != size:
        found, expected = (f"{w}x{h}" for h, w in (pixels.shape[1:], size))
        raise UserError(
            f"{dataset.place(sample)}: the image is {found}, the others are {expected}: pack with one --resolution"
        )


class _Positions:
    """Endless: one rank's stream positions, batch after batch."""

    def __init__(self, start: int, batch: int, rank: int, world: int):
        self.start, self.batch, self.rank, self.world = start, batch, rank, world

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        for images_seen in count(self.start, self.batch):
            yield rank_positions(images_seen, self.batch, self.rank, self.world)


class ImageStream:
    """Endless iterator over one rank's ImageBatches, from images_seen = `start` on.

    The pixels at a stream position depend on (shards, seed, position) alone: any number of ranks and workers
    gives the same global batches. A resumed run passes its images_seen as `start`. Images are box-filtered to
    `resolution` if that is given, from the smallest stored size that is large enough.

    `bad` counts against `max_bad_fraction`; the trainer feeds it with sums over all ranks, because a rank that
    stopped by itself would leave the others waiting.
    """

    notice: str | None = None

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        flip: bool = False,
        grayscale: float = 0.0,
        max_bad_fraction: float = 0.01,
        start: int = 0,
        resolution: int | None = None,
    ):
        rank_positions(start, batch, rank, world)
        self.bad = BadSamples(max_bad_fraction)
        batches = _Batches(dataset, seed, flip, grayscale, resolution)
        self.size = dataset.image_size()
        self._loader = loader(batches, _Positions(start, batch, rank, world), workers, pin=True)

    def __iter__(self) -> Iterator[ImageBatch]:
        return unwrap(iter(self._loader))


class Readable(Protocol):
    """Images by number: shards, or folders of files."""

    def stored_size(self) -> tuple[int, int]: ...

    def pixels(self, sample: int, *, size: tuple[int, int] | None = None) -> Tensor: ...

    def place(self, sample: int) -> str: ...


class _InOrder:
    def __init__(self, dataset: Readable):
        self.dataset, self.size = dataset, dataset.stored_size()

    def __getitem__(self, samples: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor] | Failure:
        try:
            pixels = []
            for sample in samples.tolist():
                try:
                    pixels.append(self.dataset.pixels(sample, size=self.size))
                except UnreadableImage as error:
                    raise UserError(f"{self.dataset.place(sample)}: {error}") from None
            return torch.stack(pixels), torch.from_numpy(samples)
        except UserError as error:
            return Failure(str(error))


def batches(
    dataset: ShardDataset, batch_size: int, *, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Once through, in order: (pixels (B, 3, H, W), sample indices (B,)) of this rank's contiguous share.

    Nothing is replaced here: an image that cannot be decoded is a UserError, since it would be missing from a score.
    """
    samples = np.arange(rank * len(dataset) // world, (rank + 1) * len(dataset) // world, dtype=np.int64)
    if not len(samples):
        return iter(())
    cuts = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    return chunks(dataset, cuts, workers)


def chunks(
    dataset: Readable, cuts: Sequence[np.ndarray[Any, Any]], workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of each cut, as `batches`."""
    return unwrap(iter(loader(_InOrder(dataset), cuts, workers)))


def open_stream(
    paths: Sequence[str | Path], *, scaled_decode: bool = False, cache: BlockCache | None = None, **options: Any
) -> ImageStream | ForeignStream:
    """ImageStream over indexed folders, ForeignStream over tars without an index; the same options and batches."""
    from letit_dist.data.foreign import ForeignStream, is_foreign

    foreign = [path for path in paths if is_foreign(path)]
    if not foreign:
        return ImageStream(ShardDataset(paths, scaled_decode=scaled_decode, cache=cache), **options)
    if scaled_decode:
        raise UserError(f"data.scaled_decode has no effect on {foreign[0]}, which has no index.json: leave it out")
    if len(foreign) < len(paths):
        other = next(path for path in paths if path not in foreign)
        raise UserError(
            f"{foreign[0]} has no index.json and {other} has one: they cannot be mixed in one stream "
            "(python shards/check.py FOLDER --write-index indexes local tars)"
        )
    return ForeignStream(paths, **options)
