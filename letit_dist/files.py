"""Files that are whole or as they were, and what identifies them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from letit_dist.errors import UserError

WAITS = (0.5, 1, 2, 4, 8)  # seconds before each further attempt to read what a disk or a server may give again


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename: `path` holds all of `data` or what it held before. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def require_folder(path: Path, option: str) -> None:
    """UserError that names `option` where `path` is a file; a folder, or nothing yet, will do."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file, expected a folder")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
