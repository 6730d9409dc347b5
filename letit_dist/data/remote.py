"""Shards on a server (https://, s3://, gs://, ...), read block by block through a cache on local disk.

The cache is a folder of whole blocks, shared by all processes of a machine:

    .used                  bytes it holds, kept under a lock, so that the limit holds for all processes together
    <shard>/about.json     where the shard lies, what the server says of this version, whether all of it was hashed
    <shard>/000012         block 12

A block is written beside, flushed and renamed, so that a kill at any instant leaves whole blocks. The least recently
used ones go first. A shard has another folder in the cache when its index names another hash.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from letit_dist.data.index import INDEX_NAME, Index, Shard
from letit_dist.errors import UserError
from letit_dist.files import WAITS, write_atomically
from letit_dist.memory import GIB

ENVIRONMENT = "LETIT_CACHE"
BLOCK = 1 << 20  # a few images at 1024 pixels: a request costs more than the bytes that nobody needs yet
# What tells two versions of a file apart, the surest first; servers give one or the other.
_VERSIONS: tuple[str, ...] = ("generation", "versionid", "etag", "md5hash", "content-md5", "digest", "lastmodified")
_VERSIONS += ("last-modified", "mtime", "modified", "created")


def is_url(path: str | Path) -> bool:
    """Whether this names something on a server."""
    return "://" in str(path)


class BlockCache:
    """Blocks of remote files in a local folder, at most `limit` bytes of them."""

    def __init__(self, folder: str | Path | None = None, limit: int = 50 * GIB, block: int = BLOCK):
        chosen = folder or os.environ.get(ENVIRONMENT) or "~/.cache/letit_dist/shards"
        self.folder, self.limit, self.block = Path(chosen).expanduser(), limit, block
        if limit < 16 * block:
            raise UserError(f"a cache of {limit} bytes is too small: data.cache_gib {16 * block / GIB:g} at least")

    def part(self, name: str, number: int, start: int, stop: int, size: int) -> bytes | None:
        """Bytes `start` to `stop` of a block of `size` bytes, now the last to go; None where it is not here."""
        path = self._path(name, number)
        try:
            with path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size != size:
                    return None  # a power failure, say: fetched again
                os.utime(path)
                return os.pread(stream.fileno(), stop - start, start)
        except FileNotFoundError:
            return None  # never was, or has just been dropped
        except OSError as error:
            raise self._broken(error) from None

    def store(self, name: str, number: int, data: bytes) -> None:
        """Keep a block, dropping the least recently used ones where the limit asks for it."""
        path = self._path(name, number)
        part = path.with_name(f"{path.name}.part-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._used() as used:
                total = used.get() + len(data)
                used.put(total if total <= self.limit else self._evict(len(data)) + len(data))
                with part.open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise self._broken(error) from None

    def blocks(self, name: str) -> list[int]:
        """Numbers of the whole blocks of a file that are here."""
        with contextlib.suppress(OSError):
            return sorted(int(path) for path in os.listdir(self.folder / name) if path.isdecimal())
        return []

    def drop(self, name: str) -> None:
        """Forget the blocks of a file."""
        for number in self.blocks(name):
            self._path(name, number).unlink(missing_ok=True)

    def about(self, name: str) -> dict[str, Any]:
        """What `note` has kept of a file; {} before that."""
        try:
            return json.loads((self.folder / name / "about.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def note(self, name: str, **facts: Any) -> None:
        """Keep facts of a file beside its blocks."""
        self.write(name, "about.json", json.dumps({**self.about(name), **facts}, indent=1).encode())

    def write(self, name: str, file: str, data: bytes) -> None:
        """A small file beside the blocks, whole or not at all."""
        try:
            with self.alone():
                write_atomically(self.folder / name / file, data)
        except OSError as error:
            raise self._broken(error) from None

    @contextlib.contextmanager
    def alone(self, what: str = "write") -> Iterator[None]:
        """One process of this machine at a time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = (self.folder / f".{what}.lock").open("a")
        except OSError as error:
            raise self._broken(error) from None
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"{number:06d}"

    @contextlib.contextmanager
    def _used(self) -> Iterator[_Count]:
        with (self.folder / ".used").open("a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield _Count(handle)

    def _evict(self, coming: int) -> int:
        """Drop the oldest blocks until a tenth of the limit is free; returns the bytes that stay."""
        found = []
        for folder in self.folder.iterdir():
            if folder.is_dir():
                for entry in os.scandir(folder):
                    # Under the lock nobody is writing: a part is what a kill has left.
                    if ".part-" in entry.name:
                        os.unlink(entry.path)
                    elif entry.name.isdecimal():
                        state = entry.stat()
                        found.append((state.st_mtime_ns, state.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + coming <= 0.9 * self.limit:
                break
            os.unlink(path)
            total -= size
        return total

    def _broken(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: the cache of remote shards cannot be used: {error.strerror or error}: "
            "free space there, or choose data.cache and data.cache_gib"
        )


class _Count:
    """A number in a locked file; what cannot be read counts as 0, and the next eviction counts anew."""

    def __init__(self, handle: Any):
        self.handle = handle

    def get(self) -> int:
        self.handle.seek(0)
        text = self.handle.read(32)
        return int(text) if text.isdigit() else 0

    def put(self, value: int) -> None:
        self.handle.truncate(0)  # the file is open for appending
        self.handle.write(str(value).encode())
        self.handle.flush()


@dataclass(frozen=True)
class RemoteFolder:
    """A shard folder on a server, where an `Index` expects a path."""

    url: str

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        return self.url


class RemoteFile:
    """One file on a server: what is needed of it, in as many attempts as it takes."""

    def __init__(self, url: str):
        self.url = url

    def __str__(self) -> str:
        return self.url

    def _filesystem(self) -> tuple[Any, str]:
        # Anew each time: fsspec keeps one a process, and a forked worker must not use its parent's.
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            hint = "pip install 'letit_dist[remote]', or fsspec's package for this kind of server"
            raise UserError(f"{self.url}: cannot be opened: {error}: {hint}") from None

    def _attempt(self, work: Any) -> Any:
        """work(filesystem, path), again after what may be a passing fault."""
        last: Any = None
        for wait in (0, *WAITS):
            time.sleep(wait)
            filesystem, path = self._filesystem()
            try:
                return work(filesystem, path)
            except FileNotFoundError:
                raise UserError(f"{self.url}: the server has no such file") from None
            except PermissionError as error:
                raise UserError(f"{self.url}: the server refuses to give it: {error}") from None
            except (UserError, TypeError, AttributeError, NameError):
                raise  # decided, or a fault of a program: neither passes
            except Exception as error:  # aiohttp, botocore and others each have their own families
                last = error
        said = " ".join(f"{type(last).__name__}: {last}".split())
        raise UserError(f"{self.url}: cannot be read, in {len(WAITS) + 1} attempts: {said[:300]}")

    def state(self) -> tuple[int, str]:
        """(bytes, version) as the server has them now."""
        return self._attempt(lambda filesystem, path: _state(filesystem, path))

    def bytes(self) -> bytes:
        """All of it."""
        return self._attempt(lambda filesystem, path: filesystem.cat_file(path))


def _state(filesystem: Any, path: str) -> tuple[int, str]:
    filesystem.invalidate_cache(path)
    info = {key.lower(): value for key, value in filesystem.info(path).items()}
    version = next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key)), "")
    if info.get("size") is None:
        raise UserError(f"{filesystem.unstrip_protocol(path)}: the server does not say how long it is")
    return int(info["size"]), version


class RemoteShard(RemoteFile):
    """A shard on a server, where a reader expects a path; `read` gives any range of it."""

    def __init__(self, url: str, shard: Shard, cache: BlockCache):
        super().__init__(url)
        self.shard, self.cache = shard, cache
        self.name = hashlib.sha256(f"{url} {shard.bytes} {shard.sha256}".encode()).hexdigest()[:24]

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on, from the cache where they are there.

        Raises UserError where the server cannot give them, or has another file than the index says.
        """
        block = self.cache.block
        parts = []
        for number in range(offset // block, (offset + max(size, 1) - 1) // block + 1):
            first, last = number * block, min((number + 1) * block, self.shard.bytes)
            start, stop = max(offset, first) - first, min(offset + size, last) - first
            part = self.cache.part(self.name, number, start, stop, last - first)
            if part is None:
                whole = self._fetch(number, first, last)
                part = whole[start:stop]
            parts.append(part)
        return b"".join(parts)

    def _fetch(self, number: int, first: int, last: int) -> bytes:
        def fetch(filesystem: Any, path: str) -> bytes:
            if not self.cache.about(self.name):
                self._require_version(*_state(filesystem, path))
            data = filesystem.cat_file(path, start=first, end=last)
            if len(data) > last - first:
                raise UserError(f"{self.url}: the server sends whole files only (no ranges): copy the shards here")
            if len(data) < last - first:
                raise OSError(f"{len(data)} of {last - first} bytes came")
            # After it: a file that is replaced while it is read would leave blocks of two.
            self._require_version(*_state(filesystem, path))
            return data

        data = self._attempt(fetch)
        self.cache.store(self.name, number, data)
        self._hash_when_whole()
        return data

    def _require_version(self, size: int, version: str) -> None:
        if size != self.shard.bytes:
            raise UserError(
                f"{self.url}: {size} bytes, its {INDEX_NAME} says {self.shard.bytes}: upload both again, together"
            )
        about = self.cache.about(self.name)
        if not about:
            self.cache.note(self.name, url=self.url, version=version, sha256=self.shard.sha256)
        elif about.get("version") != version:
            raise UserError(
                f"{self.url}: changed on the server since its first blocks were read ({about.get('version')}, now "
                f"{version}): if its {INDEX_NAME} is right for it, remove {self.cache.folder / self.name}"
            )

    def _hash_when_whole(self) -> None:
        """The hash in the index is of the whole file: compared once, when all of it is here."""
        count = -(-self.shard.bytes // self.cache.block)
        if len(self.cache.blocks(self.name)) < count or self.cache.about(self.name).get("hashed"):
            return
        digest = hashlib.sha256()
        for number in range(count):
            size = min(self.cache.block, self.shard.bytes - number * self.cache.block)
            block = self.cache.part(self.name, number, 0, size, size)
            if block is None:
                return  # another process has just dropped it
            digest.update(block)
        if digest.hexdigest() != self.shard.sha256:
            self.cache.drop(self.name)
            raise UserError(
                f"{self.url}: sha256 {digest.hexdigest()[:12]}, its {INDEX_NAME} says {self.shard.sha256[:12]}: "
                "upload both again, together"
            )
        self.cache.note(self.name, hashed=True)


def read_index(url: str, cache: BlockCache) -> Index:
    """The index of a shard folder on a server; fetched once a machine and version. Raises UserError."""
    folder = RemoteFolder(url.rstrip("/"))
    source = RemoteFile(f"{folder}/{INDEX_NAME}")
    name = hashlib.sha256(source.url.encode()).hexdigest()[:24]
    with cache.alone("index"):
        size, version = source.state()
        kept = cache.folder / name / INDEX_NAME
        about = {"url": source.url, "version": version, "bytes": size}
        if not (version and cache.about(name) == about and kept.is_file()):
            data = source.bytes()
            cache.write(name, INDEX_NAME, data)
            cache.note(name, **about)
        index = Index.parse(kept.read_bytes(), folder, source.url)
    index.paths = tuple(RemoteShard(f"{folder}/{shard.name}", shard, cache) for shard in index.shards)
    return index
