"""Folders, lists and tables of images that belong to no known set."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from letit_dist.data.source_base import (
    FileSource,
    Found,
    Layout,
    Part,
    Request,
    Source,
    by_domain_and_split,
    first_images,
    images_and_others,
    is_image,
    select,
    subfolders,
    unseen,
    walk,
    with_notes,
)
from letit_dist.errors import UserError

SPLITS = {
    **{name: "train" for name in ("train", "training")},
    **{name: "val" for name in ("val", "valid", "validation")},
    **{name: "test" for name in ("test", "testing")},
}
PATH_COLUMNS = ("file_name", "filename", "file", "path", "filepath", "image", "image_path", "image_id")
MOST_DEPTH = 4  # of folders in which the name of a split is looked for
METADATA_FILES = ("metadata.csv", "metadata.jsonl")


class FolderLayout(Layout):
    """All images below a folder, sorted by path. Files with other extensions are not looked at."""

    name = "folder"

    @staticmethod
    def recognise(spec: str) -> str | None:
        if not Path(spec).is_dir():
            return None
        inside = [name for name in subfolders(spec) if first_images(Path(spec, name), 1)]
        splits = any(name.lower() in SPLITS for name in inside)
        if 2 <= len(inside) <= 20 and not splits and not first_images(spec, 1):
            return f"all images below it together; for its folders {', '.join(inside)} as domains: --layout domains"
        return "all images below it"

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        paths, other = images_and_others(spec)
        if request.layout != cls.name:
            _refuse_mixed_splits(spec, paths)
        return [Part("", request.domain, request.split, FileSource(spec, paths), unseen(other))]


def _refuse_mixed_splits(spec: str, paths: list[str]) -> None:
    """Raise UserError where folders called after splits hold a part of the images only: all would become one."""
    found: dict[str | None, str] = {}
    for path in paths:
        inside = path.split("/")[:-1][:MOST_DEPTH]
        depth = next((n for n, name in enumerate(inside, 1) if name.lower() in SPLITS), None)
        split = None if depth is None else SPLITS[inside[depth - 1].lower()]
        found.setdefault(split, "other folders" if depth is None else "/".join(inside[:depth]))
    if len(found) > 1:
        listed = ", ".join(sorted(found.values(), key=lambda name: (name == "other folders", name)))
        raise UserError(
            f"{spec}: no known layout, and the splits in it would be mixed: images in {listed}; name the folder of one "
            "split, or its folder of splits, or take all together by --layout folder (shards/pack.py)"
        )


class DomainsLayout(Layout):
    """Each folder right inside is a domain. Only on request: nothing tells it from a plain folder."""

    name = "domains"

    @staticmethod
    def recognise(spec: str) -> str | None:
        return None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        walked = {name: walk(Path(spec, name)) for name in subfolders(spec)}
        images = {name: paths for name, (paths, _) in walked.items()}
        files: list[Found] = [(name, None, f"{name}/{path}", {}) for name, paths in images.items() for path in paths]
        if len(found := [name for name, paths in images.items() if paths]) < 2:
            have = ", ".join(found) or "none"
            raise UserError(f"{spec}: two domains are needed, one folder of images each; found {have}")
        other = sum((others for _, others in walked.values()), Counter())
        return with_notes(select(by_domain_and_split(spec, files, cls.name), request, spec), unseen(other))


class ListLayout(Layout):
    """A text file with one path a line, relative to the file's folder or absolute."""

    name = "list"

    @staticmethod
    def recognise(spec: str) -> str | None:
        path = Path(spec)
        return "a path a line" if path.suffix.lower() in (".txt", ".lst", ".list") and path.is_file() else None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        lines = [line.strip() for line in _text(spec).splitlines()]
        paths = [line for line in lines if line]
        if not paths:
            raise UserError(f"{spec}: no paths in this list")
        if odd := next((path for path in paths if not is_image(path)), None):
            raise UserError(f"{spec}, line {lines.index(odd) + 1}: {odd!r} is no path of an image")
        source = FileSource(Path(spec).parent, paths, cls.name)
        return [Part("", request.domain, request.split, source, _absent(source))]


class TableLayout(Layout):
    """A CSV with a column of paths; a column may name the domain (--column), `split` the split."""

    name = "csv"
    takes = frozenset({"domain", "split", "column"})

    @staticmethod
    def recognise(spec: str) -> str | None:
        path = Path(spec)
        return "a table of images" if path.suffix.lower() in (".csv", ".tsv") and path.is_file() else None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        return _table_parts([(spec, "")], Path(spec).parent, request, spec, cls.name)


class ImageFolderLayout(Layout):
    """Hugging Face's ImageFolder: images beside metadata.csv or metadata.jsonl, in the folder or in those of splits."""

    name = "imagefolder"
    takes = TableLayout.takes

    @staticmethod
    def _tables(spec: str) -> list[tuple[str, str]]:
        folders = [("", "")] + [(name, SPLITS[name]) for name in subfolders(spec) if name in SPLITS]
        return [
            (str(Path(spec, folder, name)), split)
            for folder, split in folders
            for name in METADATA_FILES
            if Path(spec, folder, name).is_file()
        ]

    @staticmethod
    def recognise(spec: str) -> str | None:
        tables = ImageFolderLayout._tables(spec)
        return f"images with {Path(tables[0][0]).relative_to(spec)}" if tables else None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        tables = cls._tables(spec)
        if not tables:
            raise UserError(f"{spec}: no {' or '.join(METADATA_FILES)} here")
        return _table_parts(tables, Path(spec), request, spec, cls.name)


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, column -> value) of a CSV, TSV or JSONL file."""
    text = _text(path)
    if path.endswith(".jsonl"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: an object was expected, got {line[:40]}")
                yield number, row
        return
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in header else ",")
    for row in reader:
        yield reader.line_num, row


def domain_name(value: Any) -> str:
    """What stands in a column, fit to name a folder: `Big cat` -> `big_cat`."""
    return re.sub(r"[^\w+-]+", "_", str(value).strip()).strip("_").lower() or "none"


def _table_parts(tables: list[tuple[str, str]], root: Path, request: Request, spec: str, layout: str) -> list[Part]:
    files: list[tuple[str | None, str | None, str, dict[str, Any]]] = []
    for table, folder_split in tables:
        column = None
        inside = Path(table).parent.relative_to(root)
        for line, row in _rows(table):
            if column is None:
                column = next((name for name in PATH_COLUMNS if name in row), None)
                if column is None:
                    raise UserError(f"{table}: no column of paths ({', '.join(PATH_COLUMNS)}); it has {', '.join(row)}")
                if request.column is not None and request.column not in row:
                    raise UserError(f"{table}: no column {request.column!r}; it has {', '.join(row)}")
            path = row.get(column)
            if not path or not is_image(str(path)):
                raise UserError(f"{table}, line {line}: {column} is {path!r}, no path of an image")
            split = folder_split or str(row.get("split") or "").strip().lower()
            domain = None
            if request.column is not None:
                if row.get(request.column) in (None, ""):
                    raise UserError(f"{table}, line {line}: nothing in column {request.column!r}")
                domain = domain_name(row[request.column])
            others = {name: row[name] for name in row if name not in (column, "split", None)}
            files.append((domain, SPLITS.get(split, split) or None, (inside / str(path)).as_posix(), others))
    if not files:
        raise UserError(f"{spec}: no rows in {', '.join(table for table, _ in tables)}")
    if request.column is not None and len(found := {domain for domain, *_ in files}) < 2:
        raise UserError(
            f"{spec}: one domain where two are needed: column {request.column!r} holds {next(iter(found))!r} alone"
        )
    parts = select(by_domain_and_split(root, files, layout), request, spec)
    return [replace(part, notes=_absent(part.source)) for part in parts]


def _absent(source: Source) -> tuple[str, ...]:
    assert isinstance(source, FileSource)
    absent = [path for path in source.paths if not (source.folder / path).is_file()]
    return (f"{len(absent)} of {len(source)} files are not there, the first: {absent[0]}",) if absent else ()
