"""What a source of images and a layout are. A new layout is one class with `recognise` and `parts`."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from letit_dist.data.transforms import IMAGE_EXTENSIONS
from letit_dist.errors import UserError


@dataclass(frozen=True)
class Item:
    """One image to pack: its encoded bytes, or pixels (uint8 (H, W, 3))."""

    key: str
    content: bytes | np.ndarray[Any, Any]
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
    layout: str | None = None
    attribute: str | None = None
    column: str | None = None
    image_column: str | None = None


# Of a file: domain, split, path, what else is known.
Found = tuple[str | None, str | None, str, dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One folder of shards to write; `notes` are lines for the user."""

    subfolder: str
    domain: str | None
    split: str | None
    source: Source
    notes: tuple[str, ...] = ()


class Source(ABC):
    """Images by number, so that an interrupted pack continues and workers need no queue of bytes."""

    drawn = False  # True: items are pixels, not encoded bytes

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

    def bytes(self) -> int | None:
        """How many bytes the encoded images take; None if that is not known before they are read."""
        return None

    def __iter__(self) -> Iterator[Item]:
        return (self.item(number) for number in range(len(self)))


class Layout(ABC):
    """A way in which people store images."""

    name: str
    # Fields of Request that this layout honours; any other that is given is refused.
    takes: frozenset[str] = frozenset({"domain", "split"})

    @staticmethod
    @abstractmethod
    def recognise(spec: str) -> str | None:
        """What was seen in `spec` (what stands on the command line) that speaks for this layout, or None."""

    @classmethod
    @abstractmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        """The folders to write; raises UserError for what cannot be packed as asked."""


@dataclass(frozen=True)
class FileItem(Item):
    """The bytes of a file."""

    content: bytes


class FileSource(Source):
    """Files below a folder: (path, what else is known about it), in the order given."""

    def __init__(
        self, folder: str | Path, files: Iterable[str | tuple[str, dict[str, Any]]], layout: str | None = None
    ):
        self.folder, self.layout = Path(folder), layout
        pairs = [(file, None) if isinstance(file, str) else file for file in files]
        self.paths = [path for path, _ in pairs]
        # A million empty dictionaries would take 64 MB.
        self.known = [known or None for _, known in pairs]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return self.paths[number]

    def item(self, number: int) -> FileItem:
        content = (self.folder / self.paths[number]).read_bytes()
        return FileItem(self.key(number), content, self.metadata(number))

    def key(self, number: int) -> str:
        """The item's key, before it is cleaned."""
        return self.paths[number].lstrip("/").rpartition(".")[0].replace("../", "")

    def metadata(self, number: int) -> dict[str, Any]:
        """What is known of a file beside its bytes."""
        return {"file": self.paths[number], **(self.known[number] or {})}

    def settings(self) -> dict[str, Any]:
        # Names and sizes tell a changed folder without reading it.
        lines = [f"{path} {self._size(path)}" for path in self.paths]
        if any(self.known):
            lines = [f"{line} {json.dumps(known)}" for line, known in zip(lines, self.known, strict=True)]
        found = {"source": self.folder.resolve().name, "files": len(self), "listing": fingerprint(lines)}
        return found if self.layout is None else {**found, "layout": self.layout}

    def bytes(self) -> int:
        return sum(self._size(path) or 0 for path in self.paths)

    def _size(self, path: str) -> int | None:
        try:
            return (self.folder / path).stat().st_size
        except OSError:
            return None  # a dangling link: listed as unreadable when its turn comes


class Chosen(Source):
    """Some of another source's items; `stamp` says in the settings how they were chosen."""

    def __init__(self, source: Source, numbers: Sequence[int], stamp: dict[str, Any]):
        self.source, self.numbers, self.stamp = source, list(numbers), stamp
        self.drawn = source.drawn

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return self.source.name(self.numbers[number])

    def item(self, number: int) -> Item:
        return self.source.item(self.numbers[number])

    def settings(self) -> dict[str, Any]:
        return {**self.source.settings(), **self.stamp}


def hold_out(parts: Sequence[Part], count: int) -> list[Part]:
    """Each part without a split as two, train and test, with `count` evenly spread items in the latter.

    Raises UserError for parts that have a split already, and for a `count` that leaves nothing to train on.
    """
    found = []
    for part in parts:
        if part.split is not None:
            raise UserError(f"--holdout has no effect on a set that has splits ({part.split}): leave it out")
        total = len(part.source)
        if not 0 < count < total:
            raise UserError(f"--holdout {count}: 1 to {total - 1}, there are {total} images")
        test = [number * total // count for number in range(count)]
        kept = set(test)
        sides = {"train": [number for number in range(total) if number not in kept], "test": test}
        for split, numbers in sides.items():
            chosen = Chosen(part.source, numbers, {"holdout": count, "part": split})
            found.append(replace(part, subfolder=str(Path(part.subfolder, split)), split=split, source=chosen))
    return found


def fingerprint(lines: Iterable[str]) -> str:
    """16 hex digits of SHA-256 over lines."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def is_image(name: str) -> bool:
    """Whether a file of this name is looked at: a known extension, and not hidden."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.rpartition("/")[2].startswith(".")


def walk(folder: str | Path) -> tuple[list[str], Counter[str]]:
    """(sorted relative paths of all images below, how many other files with which ending, hidden ones left out).

    Linked folders are walked, hidden ones are not; nor is a link to a folder above itself, which would never end.
    """
    paths = []
    other: Counter[str] = Counter()
    for root, folders, names in os.walk(folder, followlinks=True):
        inside = Path(root).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if links := [name for name in folders if Path(root, name).is_symlink()]:
            way = [Path(root), *list(Path(root).parents)[: len(inside.parts)]]
            above = {real for path in way for real in (path.resolve(), *path.resolve().parents)}
            for name in links:
                if Path(root, name).resolve() in above:
                    folders.remove(name)
        for name in names:
            if is_image(name):
                paths.append((inside / name).as_posix())
            elif not name.startswith("."):
                other[Path(name).suffix.lower()] += 1
    return sorted(paths), other


def unseen(other: Counter[str], most: int = 5) -> tuple[str, ...]:
    """A note on files that are not taken for images, or none."""
    if not other:
        return ()
    listed = [f"{count} {ending or 'without ending'}" for ending, count in other.most_common(most)]
    more = ", ..." if len(other) > most else ""
    return (f"{other.total()} other files not looked at: {', '.join(listed)}{more}",)


def with_notes(parts: Sequence[Part], notes: Sequence[str]) -> list[Part]:
    """The parts, with the notes on the first."""
    return [replace(part, notes=tuple(notes) if part is parts[0] else ()) for part in parts]


def images_below(folder: str | Path) -> list[str]:
    """Sorted relative paths; raises UserError if there is none."""
    return images_and_others(folder)[0]


def images_and_others(folder: str | Path) -> tuple[list[str], Counter[str]]:
    """What `walk` gives; raises UserError if there is no image."""
    paths, other = walk(folder)
    if not paths:
        known = ", ".join(IMAGE_EXTENSIONS)
        raise UserError(f"{folder}: no images below this folder ({other.total()} other files; looked for {known})")
    return paths, other


def first_images(folder: str | Path, count: int = 20) -> list[str]:
    """Names of a few images right inside a folder, without listing a million of them."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_image(entry.name):
                    found.append(entry.name)
                    if len(found) == count:
                        break
    except OSError:
        return []
    return found


def subfolders(folder: str | Path) -> list[str]:
    """Sorted names of the visible folders right inside; [] where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def select(parts: Sequence[Part], request: Request, spec: str) -> list[Part]:
    """The parts of the domain and split that were asked for; raises UserError naming those that there are.

    Where no part has a domain (or split), the name that was asked for is given to all.
    """
    found = list(parts)
    for field in ("domain", "split"):
        wanted = getattr(request, field)
        if wanted is None:
            continue
        known = list(dict.fromkeys(getattr(part, field) for part in parts if getattr(part, field) is not None))
        if not known:
            found = [replace(part, **{field: wanted}) for part in found]
            continue
        if wanted not in known:
            near = difflib.get_close_matches(wanted, known, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"--{field} {wanted}: {spec} has {', '.join(known)}{hint}")
        found = [part for part in found if getattr(part, field) == wanted]
    return found


def place(domain: str | None, split: str | None) -> str:
    """The subfolder of a part: domain/split, as far as there are any."""
    return "/".join(name for name in (domain, split) if name)


def by_domain_and_split(
    folder: str | Path,
    files: Iterable[Found],
    layout: str,
    kind: type[FileSource] = FileSource,
) -> list[Part]:
    """Parts from files as they were found, domains and splits in order of their names."""
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for domain, split, path, known in files:
        groups.setdefault((domain or "", split or ""), []).append((path, known))
    order = {"train": 0, "val": 1, "test": 2}
    keys = sorted(groups, key=lambda key: (key[0], order.get(key[1], 3), key[1]))
    return [
        Part(place(domain, split), domain or None, split or None, kind(folder, groups[domain, split], layout))
        for domain, split in keys
    ]
