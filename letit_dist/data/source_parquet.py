"""Hugging Face's parquet files with images inside; pyarrow is needed for these alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from letit_dist.data.source_base import Item, Layout, Part, Request, Source, fingerprint, first_images, place, select
from letit_dist.data.source_files import SPLITS, domain_name
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

    def __init__(self, files: list[Path], rows: list[Row], image: str, labels: list[Any] | None):
        self.files, self.rows, self.image, self.labels = files, rows, image, labels
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
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}


class ParquetLayout(Layout):
    """SRC/*.parquet or SRC/data/*.parquet; the split by the file's name, a domain by --column."""

    name = "parquet"
    takes = frozenset({"domain", "split", "column"})

    @staticmethod
    def _files(spec: str) -> list[Path]:
        path = Path(spec)
        if path.is_file():
            return [path] if path.suffix == ".parquet" else []
        return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))

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
        parquet = _pyarrow()
        schema = parquet.ParquetFile(files[0]).schema_arrow
        image = _image_column(schema, files[0])
        column = request.column or ("label" if "label" in schema.names else None)
        if column is not None and column not in schema.names:
            raise UserError(f"{files[0]}: no column {column!r}; it has {', '.join(schema.names)}")
        names = _class_names(schema, column)
        groups: dict[tuple[str, str], tuple[list[Row], list[Any]]] = {}
        for number, path in enumerate(files):
            head = path.name.partition("-")[0].partition(".")[0]
            split = SPLITS.get(head, "")
            reader = parquet.ParquetFile(path)
            for group in range(reader.num_row_groups):
                count = reader.metadata.row_group(group).num_rows
                values: list[Any] = [None] * count
                if column is not None:
                    table = reader.read_row_group(group, columns=[column], use_threads=False)
                    values = [names[v] if names and isinstance(v, int) else v for v in table.column(column).to_pylist()]
                for row, value in enumerate(values):
                    domain = domain_name(value) if request.column is not None else ""
                    rows, labels = groups.setdefault((domain, split), ([], []))
                    rows.append((number, group, row))
                    labels.append(value)
        if request.column is not None and len(found := {domain for domain, _ in groups}) < 2:
            have = f"{request.column} holds {next(iter(found))} alone"
            raise UserError(f"{spec}: one domain where two are needed: {have}")
        parts = [
            Part(
                place(domain, split),
                domain or None,
                split or None,
                ParquetSource(files, rows, image, labels if column is not None else None),
            )
            for (domain, split), (rows, labels) in sorted(groups.items())
        ]
        return select(parts, request, spec)


def _image_column(schema: Any, path: Path) -> str:
    """The column that holds encoded images: struct<bytes, path>, or binary."""
    for field in schema:
        kind = str(field.type)
        if (kind.startswith("struct") and "bytes: " in kind) or kind in ("binary", "large_binary"):
            return field.name
    raise UserError(f"{path}: no column of images (struct<bytes, path> or binary); it has {', '.join(schema.names)}")


def _class_names(schema: Any, column: str | None) -> list[str] | None:
    """Names of the classes that Hugging Face keeps in the schema's metadata."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None or column is None:
        return None
    features = json.loads(stored).get("info", {}).get("features", {})
    return features.get(column, {}).get("names")
