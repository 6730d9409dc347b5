"""Checkpoints that survive a kill at any instant.

A checkpoint is written beside its final name, flushed, described by a manifest of sizes and hashes, renamed,
and only then are old ones removed. What is read back is checked against the manifest; a damaged one is passed
over for the one before it, and the run says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from letit_dist.errors import UserError
from letit_dist.files import hash_file

_PREFIX = "images-"
_MANIFEST = "manifest.json"
_FORMAT = 1
Files = dict[str, dict[str, Tensor]]  # name of a file, without its suffix -> tensors by name


@dataclass(frozen=True)
class Checkpoint:
    """A verified folder: tensors are loaded by file name, `state` is the small JSON part."""

    folder: Path
    state: dict[str, Any]

    @property
    def images_seen(self) -> int:
        return self.state["images_seen"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors, on the CPU; a UserError if the checkpoint has none."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            raise UserError(f"{self.folder} holds no {path.name}: it is the checkpoint of another kind of run")
        return load_file(path)


def _copy(tensor: Tensor) -> Tensor:
    """On the host, row-major as it is stored, and never the tensor itself."""
    tensor = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _one_clear_error(beside: Path, final: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write the checkpoint {final}: {reason} (free some space and run the same command again; "
            "the checkpoints before it are untouched)"
        ) from error


class CheckpointStore:
    """The `checkpoints/` folder of a run. For the main process alone."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep
        self._writer: threading.Thread | None = None
        self._failure: UserError | None = None

    def save(
        self,
        images_seen: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        *,
        background: bool = False,
    ) -> Path:
        """Write one checkpoint (main process only; it tells the others what came of it).

        With `background` it returns once the tensors are copied to the host's memory, and a thread writes them; what
        goes wrong there is raised by `wait`, which the next `save` calls first.
        """
        self.wait()
        final = self.folder / f"{_PREFIX}{images_seen:012d}"
        beside = self.folder / f".{final.name}.writing"
        with _one_clear_error(beside, final):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            state = {**state, "images_seen": images_seen}
            if background:
                copied = {name: {k: _copy(v) for k, v in values.items()} for name, values in tensors.items()}
                # Not a daemon: a program that ends, by whatever exception, finishes its checkpoint first.
                self._writer = threading.Thread(target=self._write, args=(beside, final, copied, state))
                self._writer.start()
            else:
                self._finish(beside, final, tensors, state)
        return final

    def _write(self, beside: Path, final: Path, tensors: Files, state: dict[str, Any]) -> None:
        try:
            with _one_clear_error(beside, final):
                self._finish(beside, final, tensors, state)
        except UserError as error:
            self._failure = error

    @property
    def failed(self) -> bool:
        """Whether a write in the background has gone wrong; `wait` says how."""
        return self._failure is not None

    def wait(self) -> None:
        """Until nothing is being written any more; raises the UserError of a write in the background, once."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _finish(self, beside: Path, final: Path, tensors: Files, state: dict[str, Any]) -> None:
        for name, values in tensors.items():
            contiguous = {key: value.detach().cpu().contiguous() for key, value in values.items()}
            save_file(contiguous, beside / f"{name}.safetensors")
        (beside / "state.json").write_text(json.dumps(state, indent=1))
        paths = sorted(p for p in beside.rglob("*") if p.is_file())
        files = {str(p.relative_to(beside)): {"bytes": p.stat().st_size, "sha256": hash_file(p)} for p in paths}
        (beside / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1))
        for path in [*paths, beside / _MANIFEST, *(p for p in beside.rglob("*") if p.is_dir()), beside]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(beside, final)
        _flush(self.folder)
        self._prune()

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}*")) if self.folder.is_dir() else []

    def _prune(self) -> None:
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _set_aside(self, damaged: list[Path]) -> None:
        # Under their old names they would count as kept, and whole ones would be pruned in their place.
        for folder in damaged:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)

    def latest(self, notice: Callable[[str], None] = print) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. Leftovers of interrupted saves are removed, damaged
        checkpoints that a whole one stands in for are renamed to `damaged-*`."""
        for leftover in self.folder.glob(f".{_PREFIX}*.writing") if self.folder.is_dir() else []:
            shutil.rmtree(leftover, ignore_errors=True)
        damaged: list[Path] = []
        for folder in reversed(self._all()):
            problem = verify(folder)
            if problem is None:
                self._set_aside(damaged)
                return open_checkpoint(folder)
            damaged.append(folder)
            notice(f"checkpoint {folder.name} is damaged ({problem}); trying the one before it")
        if damaged:
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {self.folder} is whole; move the folder away to start anew"
            )
        return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            return f"format {manifest['format']}, this version reads {_FORMAT}"
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {_MANIFEST}"
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        try:
            if hash_file(path) != digest:
                return f"{name} does not match its hash"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def newest_whole(folder: Path, least: int = 0) -> int:
    """Images of the newest whole checkpoint in `folder` that has `least` or more, 0 without any.

    It is found by its hashes, so this reads all of it; nothing is changed.
    """
    numbers = (path.name[len(_PREFIX) :] for path in folder.glob(f"{_PREFIX}*"))
    found = sorted((int(number) for number in numbers if re.fullmatch(r"\d{12}", number)), reverse=True)
    return next((n for n in found if n >= least and verify(folder / f"{_PREFIX}{n:012d}") is None), 0)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A folder that `verify` has passed."""
    return Checkpoint(folder, json.loads((folder / "state.json").read_text()))
