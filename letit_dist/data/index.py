"""index.json: what a folder of WebDataset shards holds and where each file's bytes lie.

{
  "format": 1,
  "kind": "images" | "latents" | "codes",
  "shards": [{"name", "bytes", "sha256", "samples"}],        samples follow each other in shard order
  "samples": {                                               columns: quick to parse, small on disk
    "keys": [N],
    "layouts": [[extension, ...], ...], "layout": [N],       which extensions a sample has
    "offsets": [...], "sizes": [...]                         in bytes, one a file, sample after sample
  },
  "meta": {...}                                              resolution, filter, source, domain, split, ...
}
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import json
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from letit_dist.errors import UserError
from letit_dist.files import WAITS, hash_file, write_atomically

if TYPE_CHECKING:
    from letit_dist.data.remote import RemoteShard

FORMAT = 1
INDEX_NAME = "index.json"
JOURNAL_NAME = "unfinished.jsonl"
KINDS = ("images", "latents", "codes")

Files = dict[str, tuple[int, int]]  # extension -> (offset, size)


@dataclass(frozen=True)
class Shard:
    name: str
    bytes: int
    sha256: str
    samples: int


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a file in a tar, by WebDataset's rule: the key ends at the first dot of the base name."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match.group(1), match.group(2).lower()) if match else None


def scan_tar(path: Path) -> list[tuple[str, Files]]:
    """Samples of one tar in order, from its headers; raises UserError for a tar that is cut or compressed."""
    samples: list[tuple[str, Files]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                named = split_name(member.name) if member.isreg() else None
                if named is None:
                    continue
                key, extension = named
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                if extension in samples[-1][1]:
                    raise UserError(f"{path}: two files {key}.{extension} in one sample")
                samples[-1][1][extension] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable, uncompressed tar: {error}") from None
    return samples


class Index:
    """The index of one folder, in memory as arrays (1.3 million samples take about 100 MB)."""

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        shards: Sequence[Shard],
        samples: Sequence[tuple[str, Files]],
        meta: dict[str, Any],
    ):
        layouts: dict[tuple[str, ...], int] = {}
        layout = [layouts.setdefault(tuple(files), len(layouts)) for _, files in samples]
        places = [place for _, files in samples for place in files.values()]
        columns = {
            "keys": [key for key, _ in samples],
            "layouts": [list(names) for names in layouts],
            "layout": layout,
            "offsets": [offset for offset, _ in places],
            "sizes": [size for _, size in places],
        }
        self._fill(Path(folder), kind, shards, columns, meta)

    def _fill(
        self, folder: Path, kind: str, shards: Sequence[Shard], columns: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        self.folder, self.kind, self.shards, self.meta = folder, kind, tuple(shards), meta
        encoded = [key.encode() for key in columns["keys"]]
        # One blob instead of a million strings: a loader worker gets it at the price of a copy.
        self._keys = b"".join(encoded)
        self._key_ends = np.cumsum([0, *map(len, encoded)])
        self._layouts = [tuple(names) for names in columns["layouts"]]
        self._layout = np.asarray(columns["layout"], dtype=np.int32)
        lengths = np.asarray([len(names) for names in self._layouts], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths[self._layout])]).astype(np.int64)
        self._offsets = np.asarray(columns["offsets"], dtype=np.int64)
        self._sizes = np.asarray(columns["sizes"], dtype=np.int64)
        self._shard_ends = list(itertools.accumulate(shard.samples for shard in self.shards))
        # Remote folders name their own.
        self.paths: tuple[Path | RemoteShard, ...] = ()
        if isinstance(folder, Path):
            self.paths = tuple(folder / shard.name for shard in self.shards)
        counts = {len(encoded), len(self._layout), self._shard_ends[-1] if self.shards else 0}
        if len(counts) != 1 or not self._starts[-1] == len(self._offsets) == len(self._sizes):
            raise ValueError("the columns do not have the same length")

    def __len__(self) -> int:
        return len(self._layout)

    def key(self, sample: int) -> str:
        return self._keys[self._key_ends[sample] : self._key_ends[sample + 1]].decode()

    def files(self, sample: int) -> Files:
        """Extension -> (offset, size) in the sample's shard."""
        return {name: self.file(sample, name) for name in self.extensions(sample)}

    def extensions(self, sample: int) -> tuple[str, ...]:
        """Those of the sample's files."""
        return self._layouts[self._layout[sample]]

    def file(self, sample: int, extension: str) -> tuple[int, int]:
        """(offset, size) of one file in the sample's shard."""
        at = self._starts[sample] + self.extensions(sample).index(extension)
        return int(self._offsets[at]), int(self._sizes[at])

    def shard_of(self, sample: int) -> int:
        return bisect.bisect_right(self._shard_ends, sample)

    def path_of(self, sample: int) -> Path | RemoteShard:
        return self.paths[self.shard_of(sample)]

    @property
    def well_formed(self) -> bool:
        """Whether our packer encoded these images itself, and not somebody else's program."""
        pack = self.meta.get("pack")
        return pack is not None and pack.get("format") != "original"

    def samples_of(self, shard: int) -> range:
        end = self._shard_ends[shard]
        return range(end - self.shards[shard].samples, end)

    def write(self) -> None:
        """Write index.json atomically; the same index gives the same bytes."""
        keys = [self.key(sample) for sample in range(len(self))]
        tree = {
            "format": FORMAT,
            "kind": self.kind,
            "shards": [asdict(shard) for shard in self.shards],
            "samples": {
                "keys": keys,
                "layouts": self._layouts,
                "layout": self._layout.tolist(),
                "offsets": self._offsets.tolist(),
                "sizes": self._sizes.tolist(),
            },
            "meta": self.meta,
        }
        data = json.dumps(tree, separators=(",", ":")) + "\n"
        write_atomically(self.folder / INDEX_NAME, data.encode())

    @classmethod
    def read(cls, folder: str | Path) -> Index:
        """Read and compare with the tars' names and sizes; raises UserError naming everything that is wrong."""
        folder = Path(folder)
        path = folder / INDEX_NAME
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_missing(folder)) from None
        except OSError as error:
            raise UserError(f"{path}: not readable: {error}") from None
        index = cls.parse(data, folder, str(path))
        if problems := index._size_problems():
            raise UserError("\n".join(problems))
        return index

    @classmethod
    def parse(cls, data: bytes, folder: Any, path: str) -> Index:
        """The index in the bytes of `path`, of a folder that may be remote; raises UserError for what is none."""
        try:
            tree = json.loads(data)
        except ValueError as error:
            raise UserError(f"{path}: not readable: {error}") from None
        version = tree.get("format") if isinstance(tree, dict) else None
        if not isinstance(version, int):
            raise UserError(f"{path}: no format number, so this is not an index of shards")
        if version > FORMAT:
            raise UserError(f"{path}: format {version}, this version reads up to {FORMAT}: upgrade letit_dist")
        index = cls.__new__(cls)
        try:
            shards = [Shard(**shard) for shard in tree["shards"]]
            if tree["kind"] not in KINDS:
                raise ValueError(f"kind {tree['kind']!r}, known: {', '.join(KINDS)}")
            if odd := [shard.name for shard in shards if Path(shard.name).name != shard.name]:
                raise ValueError(f"shard name {odd[0]!r} leaves the folder")
            index._fill(folder, tree["kind"], shards, tree["samples"], tree["meta"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{path}: damaged: {type(error).__name__}: {error}") from None
        return index

    def _size_problems(self) -> list[str]:
        problems = []
        for shard in self.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError:
                problems.append(f"{path}: listed in {INDEX_NAME} and not there: copy it again, or pack again")
                continue
            if size != shard.bytes:
                problems.append(f"{path}: {size} bytes, {INDEX_NAME} says {shard.bytes}: copy it again, or pack again")
        return problems

    def hash_problems(self) -> Iterator[tuple[Shard, str | None]]:
        """One (shard, problem or None) after another, as its bytes are hashed."""
        for shard in self.shards:
            yield shard, self.hash_problem(shard)

    def hash_problem(self, shard: Shard) -> str | None:
        """What is wrong with the bytes of a local shard, and what to do, or None.

        A read that fails is tried again: shared storage has outages that a run outlives.
        """
        path = self.folder / shard.name
        failure = OSError()
        for wait in (0, *WAITS):
            time.sleep(wait)
            try:
                found = hash_file(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
                return f"{path}: cannot be read: {error.strerror}: restore it"
            except OSError as error:
                failure = error
                continue
            if found == shard.sha256:
                return None
            said = f"sha256 {found[:12]}, {INDEX_NAME} says {shard.sha256[:12]}"
            return f"{path}: {said}: it is not as it was packed: restore it"
        said = f"cannot be read, in {len(WAITS) + 1} attempts: {failure.strerror or failure}"
        return f"{path}: {said}: restore it, or the disk or server that it lies on"


def _missing(folder: Path) -> str:
    if not folder.exists():
        parent = folder.parent
        names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, names, n=1)
        return f"no such shard folder: {folder}" + (f", did you mean {parent / near[0]}?" if near else "")
    if not folder.is_dir():
        return f"{folder}: a shard folder was expected, this is a file"
    if (folder / JOURNAL_NAME).exists():
        return f"{folder}: packing was interrupted here ({JOURNAL_NAME}): run the same command again to finish it"
    if any(folder.glob("*.tar")):
        return f"{folder}: tars without {INDEX_NAME}: python shards/check.py {folder} --write-index makes one"
    inner = sorted(str(path.parent) for path in folder.glob(f"**/{INDEX_NAME}"))
    return f"{folder}: no {INDEX_NAME}" + (f", there is one in {', '.join(inner[:4])}" if inner else "")


def build_index(folder: str | Path, kind: str = "images", meta: dict[str, Any] | None = None) -> Index:
    """Index tars that somebody else made (sorted by name), by reading their headers and hashing their bytes."""
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no *.tar to index")
    shards, samples = [], []
    for path in paths:
        found = scan_tar(path)
        shards.append(Shard(path.name, path.stat().st_size, hash_file(path), len(found)))
        samples += found
    if not samples:
        raise UserError(f"{folder}: {len(paths)} tars without a single sample")
    return Index(folder, kind, shards, samples, meta or {})
