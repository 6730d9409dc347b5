"""Where images to pack come from. A new layout is one class here with `recognise` and `parts`."""

from __future__ import annotations

import difflib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from letit_dist.data.transforms import IMAGE_EXTENSIONS
from letit_dist.errors import UserError


@dataclass(frozen=True)
class Item:
    """One image to pack: its encoded bytes, or pixels (uint8 (H, W, 3))."""

    key: str
    content: bytes | np.ndarray
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What the user asked for, as far as a source needs to know."""

    resolution: int | None = None
    count: int | None = None
    test: int | None = None
    seed: int | None = None
    domain: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Part:
    """One folder of shards to write."""

    subfolder: str
    domain: str | None
    split: str | None
    source: Source


class Source(ABC):
    """Images by number, so that an interrupted pack continues and workers need no queue of bytes."""

    @staticmethod
    @abstractmethod
    def recognise(spec: str) -> bool:
        """Whether `spec` (what stands on the command line) is for this class."""

    @classmethod
    @abstractmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        """The folders to write; raises UserError for options that this source cannot honour."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, number: int) -> str:
        """What to call the item in messages and lists."""

    @abstractmethod
    def item(self, number: int) -> Item:
        """One item; an OSError means that it cannot be read."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What identifies the contents; two sources with equal settings give equal shards."""

    def __iter__(self) -> Iterator[Item]:
        return (self.item(number) for number in range(len(self)))


def _refuse(options: dict[str, Any], spec: str) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"{', '.join(given)} has no effect on {spec}: leave it out")


class FolderSource(Source):
    """All images below a folder, sorted by path. Files with other extensions are not looked at."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        paths, other = [], 0
        for root, folders, names in os.walk(self.folder):
            folders.sort()
            for name in names:
                path = Path(root, name).relative_to(self.folder)
                if path.suffix[1:].lower() in IMAGE_EXTENSIONS and not name.startswith("."):
                    paths.append(path.as_posix())
                else:
                    other += 1
        if not paths:
            known = ", ".join(IMAGE_EXTENSIONS)
            raise UserError(f"{folder}: no images below this folder ({other} other files; looked for {known})")
        self.paths = sorted(paths)

    @staticmethod
    def recognise(spec: str) -> bool:
        return Path(spec).is_dir()

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        _refuse({"count": request.count, "test": request.test, "seed": request.seed}, f"the folder {spec}")
        return [Part("", request.domain, request.split, cls(spec))]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return self.paths[number]

    def item(self, number: int) -> Item:
        path = self.paths[number]
        return Item(path.rpartition(".")[0], (self.folder / path).read_bytes(), {"file": path})

    def settings(self) -> dict[str, Any]:
        # Names and sizes tell a changed folder without reading it.
        listing = "\n".join(f"{path} {self._size(path)}" for path in self.paths)
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
        return {"source": self.folder.resolve().name, "files": len(self), "listing": digest[:16]}

    def _size(self, path: str) -> int | None:
        try:
            return (self.folder / path).stat().st_size
        except OSError:
            return None  # a dangling link: listed as unreadable when its turn comes


class FruitSource(Source):
    """The built-in apples and oranges, drawn at the resolution they are packed at."""

    # Test pictures do not depend on how many are trained on, and a longer train set begins with the shorter one.
    FIRST_TEST = 1_000_000

    def __init__(self, style: str, seed: int, first: int, count: int, resolution: int):
        self.style, self.seed, self.first, self.count, self.resolution = style, seed, first, count, resolution

    @staticmethod
    def recognise(spec: str) -> bool:
        return spec == "builtin:fruit"

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        from letit_dist.data.synthetic import MAX_RESOLUTION, MIN_RESOLUTION, STYLES

        _refuse({"domain": request.domain, "split": request.split}, spec)
        if request.resolution is None or request.count is None:
            raise UserError(f"{spec} needs --resolution and --count, e.g. --resolution 64 --count 2000")
        if not MIN_RESOLUTION <= request.resolution <= MAX_RESOLUTION:
            raise UserError(
                f"{spec} draws at {MIN_RESOLUTION} to {MAX_RESOLUTION}, got --resolution {request.resolution}"
            )
        test = 256 if request.test is None else request.test
        if not 0 < request.count <= cls.FIRST_TEST:
            raise UserError(f"{spec} draws 1 to {cls.FIRST_TEST} training pictures, got --count {request.count}")
        seed = request.seed or 0
        parts = []
        for style in STYLES:
            for split, first, count in (("train", 0, request.count), ("test", cls.FIRST_TEST, test)):
                if count:
                    source = cls(style, seed, first, count, request.resolution)
                    parts.append(Part(f"{style}/{split}", style, split, source))
        return parts

    def __len__(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        return f"{self.style}-{self.first + number:07d}"

    def item(self, number: int) -> Item:
        from letit_dist.data.synthetic import fruit

        index = self.first + number
        pixels, factors = fruit(self.style, self.seed, index, self.resolution)
        return Item(self.name(number), pixels, {"index": index, "seed": self.seed, "factors": factors.as_json()})

    def settings(self) -> dict[str, Any]:
        return {
            "source": "builtin:fruit",
            "filter": None,  # nothing is resized
            "style": self.style,
            "seed": self.seed,
            "first": self.first,
            "files": self.count,
        }


SOURCES: list[type[Source]] = [FruitSource, FolderSource]


def open_source(spec: str, request: Request) -> list[Part]:
    """The parts of whatever `spec` names; raises UserError if no source recognises it."""
    for source in SOURCES:
        if source.recognise(spec):
            return source.parts(spec, request)
    parent = Path(spec).parent
    names = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(spec, [*names, "builtin:fruit"], n=1)
    hint = f", did you mean {near[0]}?" if near else " (a folder of images, or builtin:fruit)"
    raise UserError(f"cannot pack {spec}: no such folder{hint}")
