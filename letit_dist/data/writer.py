"""Writing shards: ordinary WebDataset tars, the same bytes for the same input, safe to interrupt.

A shard is written beside and renamed when it is whole, then noted in a journal; index.json comes last. So a
folder with index.json is complete, and a folder with a journal can be continued from its last whole shard.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from letit_dist.config import differences
from letit_dist.data.index import INDEX_NAME, JOURNAL_NAME, KINDS, Files, Index, Shard, scan_tar
from letit_dist.errors import UserError

if TYPE_CHECKING:
    from webdataset import TarWriter

TAR_BLOCK, TAR_RECORD = 512, 10240


def clean_key(name: str) -> str:
    """A WebDataset key ends at the first dot, and names like `__x__/` are skipped: neither survives this."""
    key = re.sub(r"[.\\\x00-\x1f\x7f\ud800-\udfff]", "_", name.strip()).strip("/").lstrip("_")
    return key or "sample"


def distinct_key(name: str, used: set[str]) -> str:
    """The cleaned key, used from now on; a second `a.b` beside `a_b` becomes `a_b-2`: the order alone decides."""
    key = cleaned = clean_key(name)
    number = 1
    while key in used:
        number += 1
        key = f"{cleaned}-{number}"
    used.add(key)
    return key


class _HashingFile:
    """Just enough of a file for a tar stream."""

    def __init__(self, path: Path):
        self.stream: BinaryIO = path.open("wb")
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.stream.write(data)

    def close(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()


class ShardWriter:
    """Writes one folder of shards.

    `settings` is what must agree when an interrupted folder is continued (default: `meta`). A shard is closed
    before it would pass `shard_bytes`, or at `shard_samples`. Use as a context manager: leaving it normally
    writes index.json, leaving it by an exception keeps the whole shards and the journal.

    `resume_at` is the source position to begin with: one past the last sample in a whole shard.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        kind: str = "images",
        meta: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        shard_bytes: int = 1 << 30,
        shard_samples: int | None = None,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}, known: {', '.join(KINDS)}")
        self.folder, self.kind = Path(folder), kind
        self.meta = dict(meta or {})
        self.shard_bytes, self.shard_samples = shard_bytes, shard_samples
        self.resume_at = 0
        self.skipped: list[tuple[str, str]] = []
        self.renamed = self.repeated = 0
        self.marks: set[str] = set()
        self._settings = json.loads(json.dumps(dict(settings if settings is not None else self.meta)))
        self._shards: list[Shard] = []
        self._samples: list[tuple[str, Files]] = []
        self._used: set[str] = set()
        self._tar: TarWriter | None = None
        self._file: _HashingFile | None = None
        self._open_samples = 0
        self._next = 0
        self._pending: list[tuple[int, str, str]] = []
        self._new_marks: list[str] = []
        self._begin()

    def _begin(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / INDEX_NAME).exists():
                raise UserError(f"{self.folder} already holds finished shards: choose another folder, or remove it")
            journal = self.folder / JOURNAL_NAME
            if not journal.exists() and (tars := sorted(self.folder.glob("*.tar"))):
                raise UserError(f"{self.folder} holds other tars ({tars[0].name}, ...): choose an empty folder")
            self._journal = journal.open("a+b")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from None
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            raise UserError(f"{self.folder}: another process is writing here") from None
        try:
            self._resume()
        except BaseException:
            self._journal.close()
            raise

    def _resume(self) -> None:
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")
        records, whole = [], 0
        for line in lines[:-1]:  # what follows the last newline was being written when the process died
            try:
                records.append(json.loads(line))
            except ValueError:
                break
            whole += len(line) + 1
        if len(records) == 1:
            whole, records = 0, []  # begun, and no shard was finished: nothing that other settings would spoil
        self._journal.truncate(whole)
        if not records:
            self._note({"settings": self._settings})
            return
        if changed := differences(records[0]["settings"], self._settings):
            reason = f"{self.folder} was begun with other settings (finish with those, or choose another folder)"
            raise UserError("\n".join([reason, *changed]))
        for record in records[1:]:
            shard = Shard(**record["shard"])
            path = self.folder / shard.name
            if not path.exists() or path.stat().st_size != shard.bytes:
                break  # from here on they are written again
            self._shards.append(shard)
            self._samples += [(key, {e: tuple(p) for e, p in files.items()}) for key, files in record["samples"]]
            self.skipped += [tuple(item) for item in record["skipped"]]
            self.resume_at = self._next = record["next"]
            self.renamed = record["renamed"]
            self._mark(record.get("marks", []))
        if len(self._shards) < len(records) - 1:
            self._journal.truncate(0)
            self._note(*records[: len(self._shards) + 1])
        self._used = {key for key, _ in self._samples}

    def _note(self, *records: dict[str, Any]) -> None:
        for record in records:
            self._journal.write(json.dumps(record).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _unique(self, name: str) -> str:
        key = distinct_key(name, self._used)
        self.renamed += key != clean_key(name)
        return key

    def _mark(self, marks: list[str]) -> None:
        for mark in marks:
            self.repeated += mark in self.marks
            self.marks.add(mark)

    def write(
        self, key: str, files: Mapping[str, bytes], *, position: int | None = None, mark: str | None = None
    ) -> str:
        """Append one sample (extension -> bytes) and return the key it got.

        `position` says which item of the source this was, so that a continued pack can skip what is done. `mark`
        names its contents: `repeated` counts those that came before, in earlier attempts too.
        """
        if not files or any(e != e.lower() or not e or e[0] in "._" or "/" in e for e in files):
            raise ValueError(f"extensions must be lower case, without a leading dot or underscore: {list(files)}")
        key = self._unique(key)
        size = sum(TAR_BLOCK + -(-len(data) // TAR_BLOCK) * TAR_BLOCK for data in files.values())
        try:
            if self._tar is not None:
                # A tar ends with two empty blocks and is filled up to whole records.
                end = -(-(self._tar.tarstream.offset + size + 2 * TAR_BLOCK) // TAR_RECORD) * TAR_RECORD
                if end > self.shard_bytes or self._open_samples == self.shard_samples:
                    self._finish_shard()
            tar = self._open_shard() if self._tar is None else self._tar
            tar.write({"__key__": key, **files})
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None
        if mark is not None:
            self._mark([mark])
            self._new_marks.append(mark)
        self._open_samples += 1
        self._next = self._next + 1 if position is None else position + 1
        return key

    def skip(self, key: str, reason: str, *, position: int) -> None:
        """Note a source item that is left out, so that a continued pack still lists it."""
        self._pending.append((position, key, reason))

    def all_skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of everything left out so far."""
        return [*self.skipped, *((key, reason) for _, key, reason in self._pending)]

    def first_sample(self) -> tuple[str, dict[str, bytes]]:
        """The first sample of the first whole shard: what a continued pack compares itself with."""
        key, files = self._samples[0]
        with (self.folder / self._shards[0].name).open("rb") as stream:
            return key, {e: (stream.seek(offset), stream.read(size))[1] for e, (offset, size) in files.items()}

    def _open_shard(self) -> TarWriter:
        from webdataset import TarWriter

        self._name = f"shard-{len(self._shards):05d}.tar"
        self._file = _HashingFile(self.folder / (self._name + ".part"))
        # An integer mtime: a float would cost a PAX header a file. PAX: names longer than 100 bytes.
        self._tar = TarWriter(self._file, encoder=False, mtime=0, format="PAX_FORMAT")
        self._open_samples = 0
        return self._tar

    def _finish_shard(self) -> None:
        assert self._tar is not None and self._file is not None
        self._tar.close()
        self._file.close()
        part = self.folder / (self._name + ".part")
        samples = scan_tar(part)
        assert len(samples) == self._open_samples, (len(samples), self._open_samples)
        os.replace(part, self.folder / self._name)
        shard = Shard(self._name, self._file.bytes, self._file.digest.hexdigest(), len(samples))
        done = [(key, reason) for position, key, reason in self._pending if position < self._next]
        self._pending = [item for item in self._pending if item[0] >= self._next]
        self.skipped += done
        self._shards.append(shard)
        self._samples += samples
        self._tar = self._file = None
        marks, self._new_marks = self._new_marks, []
        self._note(
            {
                "shard": asdict(shard),
                "samples": samples,
                "next": self._next,
                "skipped": done,
                "renamed": self.renamed,
                "marks": marks,
            }
        )

    def close(self) -> Index:
        """Finish the last shard, write index.json, remove the journal."""
        try:
            if self._tar is not None:
                self._finish_shard()
            if not self._shards:
                self.abandon()
                raise UserError(f"{self.folder}: no sample was written, so there is nothing to index")
            self.skipped = self.all_skipped()
            self._pending = []
            index = Index(self.folder, self.kind, self._shards, self._samples, self.meta)
            index.write()
            (self.folder / JOURNAL_NAME).unlink()
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None
        finally:
            self._journal.close()
        return index

    def abandon(self) -> None:
        """Stop here: the open shard is dropped, whole shards and the journal stay for the next attempt."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, say: the file goes anyway
                if self._tar is not None:
                    self._tar.close()
                self._file.stream.close()
            (self.folder / (self._name + ".part")).unlink(missing_ok=True)
            self._tar = self._file = None
        self._journal.close()
