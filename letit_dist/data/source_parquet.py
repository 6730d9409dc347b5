"""Hugging Face's parquet files with images inside; pyarrow is needed for these alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from letit_dist.data.source_base import (
    Item,
    Layout,
    Part,
    Request,
    Source,
    fingerprint,
    first_images,
    place,
    select,
    subfolders,
)
from letit_dist.data.source_files import SPLITS, domain_name
from letit_dist.data.source_sets import CycleGanLayout
from letit_dist.errors import UserError

Row = tuple[int, int, int]  # file, row group, row in the group


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow.parquet


class ParquetSource(Source):
    """Rows of parquet files; a process keeps one row group at a time."""

    def __init__(self, files: list[Path], rows: list[Row], image: str, labels: list[Any] | None, chosen: bool = False):
        self.files, self.rows, self.image, self.labels = files, rows, image, labels
        self.chosen = chosen  # there are other columns of images
        self._group: tuple[tuple[int, int], list[Any]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        file, group, row = self.rows[number]
        return f"{self.files[file].name}: row {row} of group {group}"

    def item(self, number: int) -> Item:
        file, group, row = self.rows[number]
        if self._group is None or self._group[0] != (file, group):
            # No threads: this runs in forked workers too.
            table = (
                _pyarrow().ParquetFile(self.files[file]).read_row_group(group, columns=[self.image], use_threads=False)
            )
            self._group = (file, group), table.column(self.image).to_pylist()
        value = self._group[1][row]
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not content:
            raise OSError("no bytes in this row")
        known = {"file": path or self.name(number)}
        if self.labels is not None:
            known["label"] = self.labels[number]
        return Item(f"{self.files[file].stem}-{group}-{row:06d}", content, known)

    def settings(self) -> dict[str, Any]:
        lines = [f"{path.name} {path.stat().st_size}" for path in self.files]
        lines += [f"{file} {group} {row}" for file, group, row in self.rows]
        return {
            "source": self.files[0].resolve().parent.name,
            "files": len(self),
            "listing": fingerprint(lines),
            "layout": ParquetLayout.name,
            **({"image_column": self.image} if self.chosen else {}),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}


class ParquetLayout(Layout):
    """SRC/*.parquet, SRC/data/*.parquet, or the Hub's own conversion (SRC/default/train/0000.parquet).

    The split by the file's or its folder's name; a domain by --column, or two by the columns imageA and imageB.
    """

    name = "parquet"
    takes = frozenset({"domain", "split", "column", "image_column"})
    PAIR = ("imageA", "imageB")  # as the Hub has CycleGAN's sets

    @staticmethod
    def _files(spec: str) -> list[Path]:
        path = Path(spec)
        if path.is_file():
            return [path] if path.suffix == ".parquet" else []
        if found := sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")):
            return found
        # Only folders of splits are listed: a set of a million files is asked too, whether it is parquet.
        inside = [path, *(path / name for name in subfolders(path))]
        splits = [folder / name for folder in inside for name in subfolders(folder) if _split(name)]
        return [file for folder in splits if not first_images(folder, 1) for file in sorted(folder.glob("*.parquet"))]

    @staticmethod
    def recognise(spec: str) -> str | None:
        files = ParquetLayout._files(spec)
        if not files or first_images(spec, 1) or any(Path(spec).glob("*.tar")):
            return None
        return f"parquet files ({len(files)}, {files[0].name} the first)"

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        files = cls._files(spec)
        if not files:
            raise UserError(f"{spec}: no *.parquet here")
        if len(sets := sorted({file.parent.parent for file in files})) > 1:
            raise UserError(f"{spec}: {len(sets)} sets in parquet, name one: {', '.join(map(str, sets))}")
        parquet = _pyarrow()
        schema = parquet.ParquetFile(files[0]).schema_arrow
        images = _image_columns(schema, files[0])
        column = request.column or ("label" if "label" in schema.names else None)
        if column is not None and column not in schema.names:
            raise UserError(f"{files[0]}: no column {column!r}; it has {', '.join(schema.names)}")
        if request.image_column is None and set(images) == set(cls.PAIR):
            if request.column is not None:
                raise UserError(
                    f"--column {column}: {' and '.join(cls.PAIR)} are the domains already; leave it out, or take "
                    "one of them by --image-column"
                )
            taken = dict(zip(cls.PAIR, CycleGanLayout.domains(spec), strict=True))
        else:
            taken = {_chosen(images, request.image_column, files[0]): ""}
        groups = cls._groups(files, parquet, schema, column, by_column=request.column is not None)
        if request.column is not None and len(found := {domain for domain, _ in groups}) < 2:
            have = f"{request.column} holds {next(iter(found))} alone"
            raise UserError(f"{spec}: one domain where two are needed: {have}")
        parts = [
            Part(
                place(domain or side, split),
                domain or side or None,
                split or None,
                ParquetSource(files, rows, image, labels if column is not None else None, len(images) > 1),
            )
            for image, side in taken.items()
            for (domain, split), (rows, labels) in sorted(groups.items())
        ]
        return select(parts, request, spec)

    @staticmethod
    def _groups(
        files: list[Path], parquet: Any, schema: Any, column: str | None, *, by_column: bool
    ) -> dict[tuple[str, str], tuple[list[Row], list[Any]]]:
        """(domain, split) -> (rows, their labels); "" for what there is none of."""
        names = _class_names(schema, column)
        groups: dict[tuple[str, str], tuple[list[Row], list[Any]]] = {}
        for number, path in enumerate(files):
            split = _split(path.name.partition("-")[0].partition(".")[0]) or _split(path.parent.name)
            reader = parquet.ParquetFile(path)
            for group in range(reader.num_row_groups):
                count = reader.metadata.row_group(group).num_rows
                values: list[Any] = [None] * count
                if column is not None:
                    table = reader.read_row_group(group, columns=[column], use_threads=False)
                    values = [names[v] if names and isinstance(v, int) else v for v in table.column(column).to_pylist()]
                for row, value in enumerate(values):
                    domain = domain_name(value) if by_column else ""
                    rows, labels = groups.setdefault((domain, split), ([], []))
                    rows.append((number, group, row))
                    labels.append(value)
        return groups


def _split(name: str) -> str:
    """The split that a file's or folder's name says, or ""; the Hub writes partial-train for the part it converted."""
    return SPLITS.get(name.removeprefix("partial-").lower(), "")


def _image_columns(schema: Any, path: Path) -> list[str]:
    """The columns that hold encoded images: struct<bytes, path>, or binary where there are none of those."""
    kinds = {field.name: str(field.type) for field in schema}
    structs = [name for name, kind in kinds.items() if kind.startswith("struct") and "bytes: " in kind]
    found = structs or [name for name, kind in kinds.items() if kind in ("binary", "large_binary")]
    if not found:
        raise UserError(
            f"{path}: no column of images (struct<bytes, path> or binary); it has {', '.join(schema.names)}"
        )
    return found


def _chosen(images: list[str], wanted: str | None, path: Path) -> str:
    """The column to take: the one that was asked for, the only one, or the one that is called image."""
    if wanted is not None:
        if wanted not in images:
            raise UserError(f"--image-column {wanted}: {path} has {', '.join(images)}")
        return wanted
    if len(images) > 1 and "image" not in images:
        raise UserError(f"{path}: {len(images)} columns of images ({', '.join(images)}): name one by --image-column")
    return images[0] if len(images) == 1 else "image"


def _class_names(schema: Any, column: str | None) -> list[str] | None:
    """Names of the classes that Hugging Face keeps in the schema's metadata."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None or column is None:
        return None
    features = json.loads(stored).get("info", {}).get("features", {})
    return features.get(column, {}).get("names")
