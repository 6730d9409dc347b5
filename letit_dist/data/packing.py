"""Packing a source of images into shards: decode, crop, resize, encode, write; continue where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from letit_dist.config import differences
from letit_dist.data.index import INDEX_NAME, Index
from letit_dist.data.loading import Failure, loader, unwrap
from letit_dist.data.progress import Progress
from letit_dist.data.sizes import sized
from letit_dist.data.source_base import Item, Part, Source
from letit_dist.data.transforms import (
    FILTERS,
    FORMATS,
    IMAGE_EXTENSIONS,
    UnreadableImage,
    decode,
    default_quality,
    encode,
    image_type,
    resize_crop,
)
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError
from letit_dist.files import write_atomically

UNREADABLE_NAME = "unreadable.txt"
EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
ORIGINAL = "original"
# For the index: what its "filter" did.
RESIZING = {
    "box": "rounded average at whole factors, area average at others; Lanczos where enlarged",
    "lanczos": "Lanczos",
}


@dataclass(frozen=True)
class PackOptions:
    resolution: int | None = None  # None: as they are, all of one size
    smaller: tuple[int, ...] = ()  # stored beside, each reduced from the square of `resolution`
    format: str = "png"  # or "original": the bytes as they are
    quality: int | None = None  # JPEG: by size; WebP: None is lossless
    filter: str = "box"
    shard_bytes: int = 1 << 30
    max_bad_fraction: float = 0.05
    workers: int = 0
    enlarge: bool = False  # False: an image smaller than `resolution` is an error

    def __post_init__(self) -> None:
        problems = []
        if self.resolution is not None and self.resolution < 1:
            problems.append(f"resolution {self.resolution}: a positive number of pixels is needed")
        if self.smaller:
            sides = [self.resolution or 0, *self.smaller]
            if self.resolution is None or any(a <= b for a, b in itertools.pairwise(sides)) or sides[-1] < 1:
                listed = " ".join(map(str, sides))
                problems.append(f"resolutions {listed}: the largest first, each smaller than the one before")
        if self.format == ORIGINAL and self.resolution is not None:
            problems.append("--format original keeps the bytes as they are: leave out --resolution, or choose a format")
        elif self.format not in (*FORMATS, ORIGINAL):
            problems.append(f"format {self.format!r}: choose one of {', '.join((*FORMATS, ORIGINAL))}")
        if self.filter not in FILTERS:
            problems.append(f"filter {self.filter!r}: choose one of {', '.join(FILTERS)}")
        if self.quality is not None and self.format in ("png", ORIGINAL):
            problems.append(f"a quality has no effect on {self.format}: leave it out, or choose --format jpeg or webp")
        elif self.quality is not None and not 1 <= self.quality <= 100:
            problems.append(f"quality {self.quality}: 1 to 100")
        if not 0 <= self.max_bad_fraction <= 1:
            problems.append(f"max-bad-fraction {self.max_bad_fraction}: 0 to 1")
        if self.shard_bytes < 1:
            problems.append(f"shard size {self.shard_bytes} bytes: a positive size is needed")
        if self.workers < 0:
            problems.append(f"workers {self.workers}: 0 or more")
        if problems:
            raise UserError("\n".join(problems))

    def line(self) -> str:
        """What will be stored, for people."""
        if self.format == ORIGINAL:
            return "the files' own bytes; all must have one size"
        quality = "by size" if self.quality is None else self.quality
        lossless = self.format == "png" or (self.format == "webp" and self.quality is None)
        coded = f"{self.format}, {'lossless' if lossless else f'quality {quality}'}"
        if self.resolution is None:
            return f"{coded}, at their own size; all must have one"
        sides = ", ".join(map(str, (self.resolution, *self.smaller)))
        return f"{coded}, squares of {sides} pixels, {self.filter} filter ({RESIZING[self.filter]})"


@dataclass
class PackResult:
    folder: Path
    samples: int
    unreadable: int
    already_done: bool = False
    resumed_at: int = 0
    seconds: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)
    marks: frozenset[str] = frozenset()  # of the source's bytes; empty where nothing was packed now

    def lines(self) -> list[str]:
        """What happened, for people."""
        if self.already_done:
            return [f"{self.folder}: already packed with these settings ({self.samples} samples), nothing to do"]
        packed = f"{self.folder}: {self.samples} samples in {self.seconds:.1f} s"
        packed += f", continued after {self.resumed_at} of the source" if self.resumed_at else ""
        lines = [packed]
        if self.unreadable:
            lines.append(f"  {self.unreadable} left out, see {self.folder / UNREADABLE_NAME}")
        return lines + [f"  {count} x {note}" for note, count in sorted(self.notes.items())]


@dataclass
class _Prepared:
    number: int
    key: str
    files: dict[str, bytes]
    size: tuple[int, int]
    notes: list[str]
    mark: str | None


@dataclass
class _Unreadable:
    number: int
    key: str
    reason: str


class _Prepare:
    """For the loader: source number -> encoded sample."""

    def __init__(self, source: Source, options: PackOptions):
        self.source, self.options = source, options

    def __getitem__(self, number: int) -> _Prepared | _Unreadable | Failure:
        options = self.options
        notes: list[str] = []
        try:
            item = self.source.item(number)
            if isinstance(item.content, bytes):
                pixels = decode(item.content, notes)
                notes += _misnamed(item.content, item.metadata)
            else:
                pixels = torch.from_numpy(item.content).permute(2, 0, 1)
        except UnreadableImage as error:
            return _Unreadable(number, self.source.name(number), str(error))
        except OSError as error:
            return _Unreadable(number, self.source.name(number), f"cannot be read: {error.strerror or error}")
        height, width = pixels.shape[1:]
        if options.resolution is not None:
            if min(height, width) < options.resolution:
                if not options.enlarge:
                    return Failure(too_small(self.source.name(number), (height, width), options.resolution))
                notes.append(f"smaller than {options.resolution}, enlarged")
            pixels = resize_crop(pixels, options.resolution, options.filter)
            height, width = pixels.shape[1:]
        metadata = {**item.metadata, **({"notes": notes} if notes else {})}
        files = {**self._encoded(item, pixels), "json": json.dumps(metadata, sort_keys=True).encode()}
        mark = hashlib.blake2b(item.content, digest_size=8).hexdigest() if isinstance(item.content, bytes) else None
        return _Prepared(number, item.key, files, (height, width), notes, mark)

    def _encoded(self, item: Item, pixels: torch.Tensor) -> dict[str, bytes]:
        """Extension -> bytes of each size."""
        options = self.options
        if options.format == ORIGINAL:
            assert isinstance(item.content, bytes)  # `pack` refuses drawn pictures
            known = image_type(item.content) or item.metadata["file"].rpartition(".")[2].lower()
            return {known: item.content}
        extension = EXTENSIONS[options.format]
        if not options.smaller:
            return {extension: encode(pixels, options.format, options.quality)}
        # From the stored square, not from the source: then a lossless size equals the largest one reduced while
        # reading, and training on either is the same run.
        squares = {side: resize_crop(pixels, side, options.filter) for side in (pixels.shape[1], *options.smaller)}
        return {
            sized(side, extension): encode(square, options.format, options.quality) for side, square in squares.items()
        }


def _misnamed(content: bytes, metadata: dict[str, Any]) -> list[str]:
    """A note where a file's name says another format than its bytes."""
    named = str(metadata.get("file", "")).rpartition(".")[2].lower()
    named = {"jpeg": "jpg", "tiff": "tif"}.get(named, named)
    if named not in IMAGE_EXTENSIONS and named != "tif":
        return []  # it says none: a row of a table has a number, not an ending
    found = image_type(content)
    return [f"{found.upper()} named .{named}"] if found and found != named else []


def _settings(part: Part, options: PackOptions) -> dict[str, Any]:
    quality = options.quality
    if options.format == "jpeg" and quality is None and options.resolution is not None:
        quality = default_quality(options.resolution)
    settings = {
        "domain": part.domain,
        "split": part.split,
        "resolution": options.resolution,
        "filter": options.filter if options.resolution is not None else None,
        "format": options.format,
        "quality": quality,
        "shard_bytes": options.shard_bytes,
        **part.source.settings(),
    }
    if options.smaller:  # absent where there is one size: so were shards written before there was a choice
        settings |= {"smaller": list(options.smaller), "filter": options.filter}
    return settings


def pack(part: Part, out: str | Path, options: PackOptions) -> PackResult:
    """Pack one part into out/part.subfolder, or continue, or find it done.

    Raises UserError when the folder holds something else, when sizes differ and no resolution was asked for, when
    an image is smaller than the resolution and options.enlarge is not set, and when more than max_bad_fraction of
    the source is unreadable (whole shards stay, for another attempt).
    """
    if options.format == ORIGINAL and part.source.drawn:
        raise UserError("--format original: drawn pictures have no bytes to keep; choose another format")
    folder = Path(out) / part.subfolder
    settings = _settings(part, options)
    if (folder / INDEX_NAME).exists():
        return _already(folder, settings)
    begun = time.monotonic()
    meta = {key: settings[key] for key in ("source", "domain", "split", "filter") if settings[key] is not None}
    if settings["filter"] is not None:
        meta["resize"] = RESIZING[settings["filter"]]
    if options.smaller:
        meta["resolutions"] = [options.resolution, *options.smaller]
    meta["pack"] = settings
    source = part.source
    notes: Counter[str] = Counter()
    allowed = int(options.max_bad_fraction * len(source))
    size: tuple[int, int] | None = None
    if options.resolution is not None:
        size = (options.resolution, options.resolution)
    with ShardWriter(folder, meta=meta, settings=settings, shard_bytes=options.shard_bytes) as writer:
        start = writer.resume_at
        if start and size is None:
            size = _first_size(writer)
        label = part.subfolder or folder.name
        prepared = loader(_Prepare(source, options), range(start, len(source)), options.workers)
        with Progress(label, len(source), done=start) as progress:
            for item in unwrap(iter(prepared)):
                if isinstance(item, _Unreadable):
                    writer.skip(item.key, item.reason, position=item.number)
                    _stop_past(allowed, writer, source, options)
                else:
                    size = size or item.size
                    if item.size != size:
                        raise UserError(_sizes_differ(source.name(item.number), item.size, size))
                    writer.write(item.key, item.files, position=item.number, mark=item.mark)
                    notes.update(item.notes)
                progress.step()
        unreadable = writer.all_skipped()
        _list_unreadable(folder, unreadable)
        if unreadable:
            writer.meta["unreadable"] = len(unreadable)
        if size and size[0] == size[1]:
            writer.meta["resolution"] = size[0]
        if writer.renamed:
            notes["key taken by another file after dots were replaced, given a number"] = writer.renamed
        if writer.repeated:
            notes["same bytes as an earlier file, kept"] = writer.meta["duplicates"] = writer.repeated
    samples = len(source) - len(unreadable)
    return PackResult(
        folder, samples, len(unreadable), False, start, time.monotonic() - begun, notes, frozenset(writer.marks)
    )


def leaks(parts: Sequence[Part], results: Sequence[PackResult]) -> list[str]:
    """A line for each two parts of different splits that share equal files, as far as they were packed now."""
    lines = []
    done = [str(result.folder) for result in results if result.already_done]
    if 0 < len(done) < len(results) and len({part.split for part in parts}) > 1:
        lines.append(f"equal files not looked for in what was packed before ({', '.join(done)}): shards/check.py does")
    for number, (part, result) in enumerate(zip(parts, results, strict=True)):
        for other, earlier in zip(parts[:number], results[:number], strict=True):
            shared = len(result.marks & earlier.marks)
            if shared and part.split != other.split:
                lines.append(
                    f"warning: {shared} equal files in {earlier.folder} and {result.folder}: "
                    f"python shards/check.py {earlier.folder} {result.folder} names them"
                )
    return lines


def too_small(name: str, size: tuple[int, int], resolution: int, whose: str = "--resolution") -> str:
    """The message for an image of `size` (H, W)."""
    found = f"{name} is {size[1]}x{size[0]}, smaller than {whose} {resolution}"
    if whose != "--resolution":
        return f"{found}: leave it out, or pack the images with shards/pack.py --resolution {resolution} --enlarge"
    return f"{found}: choose a smaller one, or give --enlarge (Lanczos); finished shards are kept"


def _already(folder: Path, settings: dict[str, Any]) -> PackResult:
    index = Index.read(folder)
    found = index.meta.get("pack")
    if found is None:
        raise UserError(f"{folder} holds shards that another program made: choose another folder")
    if changed := differences(found, settings):
        raise UserError("\n".join([f"{folder} is already packed with other settings: choose another folder", *changed]))
    return PackResult(folder, len(index), index.meta.get("unreadable", 0), already_done=True)


def _first_size(writer: ShardWriter) -> tuple[int, int]:
    """Size of the first image of a continued pack, from its first shard."""
    _, files = writer.first_sample()
    name = next(name for name in files if name != "json")
    height, width = decode(files[name]).shape[1:]
    return height, width


def _sizes_differ(name: str, found: tuple[int, int], expected: tuple[int, int]) -> str:
    (height, width), (h, w) = found, expected
    return f"{name} is {width}x{height}, the images before it are {w}x{h}: give --resolution"


def _stop_past(allowed: int, writer: ShardWriter, source: Source, options: PackOptions) -> None:
    unreadable = writer.all_skipped()
    if len(unreadable) <= allowed:
        return
    _list_unreadable(writer.folder, unreadable)
    raise UserError(
        f"{len(unreadable)} images are unreadable, more than --max-bad-fraction {options.max_bad_fraction:g} of "
        f"{len(source)} allows; the first: {unreadable[0][0]} ({unreadable[0][1]}); all are in "
        f"{writer.folder / UNREADABLE_NAME}; finished shards are kept, run again with a higher share to continue"
    )


def _list_unreadable(folder: Path, unreadable: list[tuple[str, str]]) -> None:
    if unreadable:
        text = "".join(f"{name}\t{reason}\n" for name, reason in unreadable)
        write_atomically(folder / UNREADABLE_NAME, text.encode("utf-8", "surrogateescape"))
