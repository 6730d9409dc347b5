"""Where images to pack come from: which layout a folder or file has, and what is packed from it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from letit_dist.data.source_archives import ImageNetTarsLayout, TarsLayout, ZipLayout
from letit_dist.data.source_base import Item, Layout, Part, Request, Source
from letit_dist.data.source_faces import CelebaHqFlatLayout, CelebaLayout, CelebaMaskLayout, FfhqLayout
from letit_dist.data.source_files import DomainsLayout, FolderLayout, ImageFolderLayout, ListLayout, TableLayout
from letit_dist.data.source_fruit import FruitLayout
from letit_dist.data.source_parquet import ParquetLayout
from letit_dist.data.source_sets import CycleGanLayout, ImageNetLayout, SplitDomainsLayout
from letit_dist.errors import UserError

__all__ = ["LAYOUTS", "Found", "Item", "Part", "Request", "Source", "find", "open_source"]

# The first that recognises a thing has it: the more a layout asks for, the earlier it stands.
LAYOUTS: list[type[Layout]] = [
    FruitLayout,
    ListLayout,
    TableLayout,
    ZipLayout,
    ImageNetTarsLayout,
    FfhqLayout,
    CelebaLayout,
    CelebaMaskLayout,
    ImageNetLayout,
    CycleGanLayout,
    ImageFolderLayout,
    SplitDomainsLayout,
    CelebaHqFlatLayout,
    TarsLayout,
    ParquetLayout,
    DomainsLayout,
    FolderLayout,
]


@dataclass(frozen=True)
class Found:
    """What was seen in a place: the layout it is taken for, and the others that it could be."""

    layout: type[Layout]
    saw: str
    others: tuple[str, ...]

    def line(self, spec: str) -> str:
        """For the user: what it was taken for, and how to have it otherwise."""
        other = f"; could also be {', '.join(self.others)} (--layout NAME)" if self.others else ""
        return f"{spec}: taken for {self.layout.name}: {self.saw}{other}"


def find(spec: str, layout: str | None = None) -> Found:
    """The layout of `spec`, or the one of this name; raises UserError if nothing recognises it."""
    by_name = {known.name: known for known in LAYOUTS}
    if layout is not None and layout not in by_name:
        near = difflib.get_close_matches(layout, by_name, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"--layout {layout}: known are {', '.join(by_name)}{hint}")
    if not spec.startswith("builtin:") and not Path(spec).exists():
        raise UserError(_nothing_here(spec))
    if layout is not None:
        return Found(by_name[layout], "as asked by --layout", ())
    seen = [(known, saw) for known in LAYOUTS if (saw := known.recognise(spec)) is not None]
    if not seen:
        raise UserError(_nothing_here(spec))
    return Found(*seen[0], tuple(known.name for known, _ in seen[1:]))


def open_source(spec: str, request: Request) -> list[Part]:
    """The parts of whatever `spec` names; raises UserError if no layout recognises it, or honours an option given."""
    layout = find(spec, request.layout).layout
    options = ("count", "test", "seed", "domain", "split", "attribute", "column", "image_column")
    given = [
        f"--{name.replace('_', '-')}"
        for name in options
        if getattr(request, name) is not None and name not in layout.takes
    ]
    if given:
        kind = "the folder " if Path(spec).is_dir() else ""
        taken = "" if layout is FruitLayout else f" (taken for {layout.name})"
        raise UserError(f"{', '.join(given)} has no effect on {kind}{spec}{taken}: leave it out")
    parts = layout.parts(spec, request)
    if not parts:
        raise UserError(f"{spec}: nothing of it was asked for (--domain {request.domain}, --split {request.split})")
    return parts


def plan(parts: Sequence[Part]) -> list[str]:
    """A table of the parts, for people."""
    rows = [("folder", "domain", "split", "images", "MB")]
    total = sum(len(part.source) for part in parts)
    sizes = [part.source.bytes() for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        megabytes = "-" if size is None else f"{size / 1e6:.1f}"
        rows.append((part.subfolder or ".", part.domain or "-", part.split or "-", str(len(part.source)), megabytes))
    if len(parts) > 1:
        known = [size for size in sizes if size is not None]
        megabytes = f"{sum(known) / 1e6:.1f}" if len(known) == len(sizes) else "-"
        rows.append(("all", "", "", str(total), megabytes))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _nothing_here(spec: str) -> str:
    path = Path(spec)
    if path.is_file():
        return (
            f"cannot pack {spec}: a folder, a list (.txt), a table (.csv), a .zip or ImageNet's .tar was expected "
            "(--layout NAME forces one)"
        )
    parent = path.parent
    names = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(spec, [*names, "builtin:fruit"], n=1)
    hint = f", did you mean {near[0]}?" if near else " (a folder of images, or builtin:fruit)"
    return f"cannot pack {spec}: no such folder{hint}"
