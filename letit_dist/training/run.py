"""The run folder: its configuration, where it ran, and who may write into it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import yaml

import letit_dist
from letit_dist.cards import CARD, Card, restate
from letit_dist.config import StrictConfig, Tree, as_tree, differences, parse_config, to_yaml
from letit_dist.errors import UserError
from letit_dist.files import write_atomically
from letit_dist.ranks import launched_ranks
from letit_dist.training.checkpoint import newest_whole
from letit_dist.training.setup import main_decides

if TYPE_CHECKING:
    from letit_dist.training.trainer import Trainer

# What may change between two starts of a run, because by construction it changes no result.
_FREE = (
    *("data.workers", "data.cache", "data.cache_gib", "data.verify", "intervals"),
    *("training.microbatch", "training.recompute_from", "training.timeout", "training.trackers"),
)
# What a run that is not at its end may go on with as well, so that one whose loss diverged need not begin again: its
# result is then another, and CHANGES in its folder says from where on.
_TUNABLE = ("recipe.optimizer.learning_rate",)
CHANGES = "changes.jsonl"
Changes = dict[str, tuple[Any, Any]]  # key to its values before and after


def _split(tree: Tree, paths: tuple[str, ...]) -> tuple[Tree, Tree]:
    """(the tree without these keys, their values by path)."""
    tree, taken = json.loads(json.dumps(tree)), {}
    for path in paths:
        *sections, key = path.split(".")
        node: Any = tree
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict) and key in node:
            taken[path] = node.pop(key)
    return tree, taken


# Lock files stay open, and so locked, until this process ends; by folder, since one process may open it again.
_HELD: dict[Path, IO[str]] = {}


def _lock(folder: Path) -> None:
    """One run at a time in a folder: two would write each other's checkpoints and statistics."""
    if folder.resolve() in _HELD:
        return
    handle = (folder / ".lock").open("w")
    try:
        # A record lock: forked loader processes, which may outlive a killed run for seconds, do not inherit it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise UserError(_held(folder)) from None
    _HELD[folder.resolve()] = handle


def _held(folder: Path) -> str:
    return f"another process is running in {folder}: wait for it, stop it, or name another --run"


def require_unheld(folder: Path) -> None:
    """UserError where another process runs in `folder`; nothing is written."""
    lock = folder / ".lock"
    if folder.resolve() in _HELD or not lock.is_file():  # a process that closes the file anywhere drops its own lock
        return
    try:
        handle = lock.open("r")
    except OSError as error:
        raise UserError(f"cannot write into the run folder {folder}: .lock: {error.strerror or error}") from None
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise UserError(_held(folder)) from None


def _note_changes(folder: Path, changes: Changes, now: Tree) -> list[str]:
    """Bring CHANGES up to the `changes` of a run whose configuration on disk has the values `now`, by key.

    A start that was killed may have noted some and not begun: these go. Returns a line for each of `changes`.
    """
    path, seen, lines = folder / CHANGES, newest_whole(folder / "checkpoints") if changes else 0, []
    old = path.read_bytes() if path.exists() else b""
    noted = old.splitlines(keepends=True)
    while noted and not _is_true(noted[-1], now):
        noted.pop()
    for key, (before, after) in changes.items():
        change = {"images_seen": seen, "key": key, "before": before, "after": after}
        noted.append(json.dumps(change).encode() + b"\n")
        lines.append(f"{key}: {before} -> {after} from {seen} images on (noted in {CHANGES})")
    if (new := b"".join(noted)) != old:
        write_atomically(path, new)
    return lines


def _is_true(line: bytes, now: Tree) -> bool:
    """Whether a line of CHANGES is whole, and the run has since had the value it tells."""
    try:
        change = json.loads(line)
        return line.endswith(b"\n") and now.get(change["key"], change["after"]) == change["after"]
    except (ValueError, KeyError, TypeError):
        return False


def require_claimable(folder: Path, config: StrictConfig) -> Changes:
    """UserError where `folder` is not free for this configuration, or cannot be made; nothing is written.

    The same configuration again resumes; another one is refused with the differences. Returns the keys that an
    unfinished run goes on with another value of.
    """
    path = folder / "config.yaml"
    tree = as_tree(config)
    changes: Changes = {}
    there = nearest(folder)
    if there == folder and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a run folder")
    if not there.is_dir():
        raise UserError(f"cannot write into the run folder {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the run folder {folder}: {there} is not yours to write into")
    if path.exists():
        try:
            saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, OSError):
            saved = None
        if not isinstance(saved, dict):
            raise UserError(f"{path} cannot be read: name another run folder with --run")
        with contextlib.suppress(UserError):  # keys that are newer than the run have their defaults there
            saved = as_tree(parse_config(type(config), saved))
        (saved, _), (new, _) = _split(saved, _FREE), _split(tree, _FREE)
        (rest, before), (new_rest, after) = _split(saved, _TUNABLE), _split(new, _TUNABLE)
        changes = {key: (before[key], after[key]) for key in before if before[key] != after.get(key, before[key])}
        if changes and not newest_whole(folder / "checkpoints", new.get("training", {}).get("images", 0)):
            saved, new = rest, new_rest  # it is not at its end
        lines = differences(saved, new)
        if lines:
            listed = "\n".join(f"  {line}" for line in lines)
            raise UserError(
                f"{folder} belongs to another configuration; name another folder with --run, or undo:\n{listed}"
            )
    elif folder.is_dir() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
        raise UserError(f"{folder} is not empty and is no run folder (no config.yaml): name another with --run")
    return changes


def nearest(folder: Path) -> Path:
    """`folder`, or what there is of the path to it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def open_run(folder: Path, config: StrictConfig) -> list[str]:
    """Claim `folder` for this configuration (main process only); refuses what `require_claimable` does.

    Returns a line for each key that an unfinished run goes on with another value of.
    """
    changes = require_claimable(folder, config)
    _, now = _split(as_tree(config), _TUNABLE)
    now |= {key: before for key, (before, _) in changes.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        said = _note_changes(folder, changes, now)
        # After it: until this is written, the changes have not been made.
        write_atomically(folder / "config.yaml", to_yaml(config).encode())
        write_atomically(folder / "environment.json", (json.dumps(environment(), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write into the run folder {folder}: {error.strerror or error}") from error
    return said


def starts_anew(folder: Path) -> bool:
    """Whether the run in `folder` has no checkpoint to go on from, whole or damaged."""
    return not any((folder / "checkpoints").glob("images-*"))


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def environment() -> dict[str, Any]:
    """What ran, where: versions, commit, command, devices."""
    from importlib import metadata

    names = ("accelerate", "deepspeed", "torchvision", "webdataset", "safetensors", "numpy")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    return {
        "letit_dist": letit_dist.__version__,
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **versions,
        "ranks": launched_ranks(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
    }


def peak_memory() -> int:
    """The most memory this process has held so far, in MiB: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # Linux counts in KiB


def export(trainer: Trainer, card: Card, *, data: str, **extra: Any) -> Path:
    """Write the run's result as a pretrained folder under export/ (main process), and say where.

    Its model card is `card`, with `data` where that says nothing of them, and with the last line of stats.jsonl. A
    folder that is there stays, but for a card that says other data or another licence.
    """
    folder = trainer.run / "export" / f"images-{trainer.images_seen:012d}"
    old = Card.read(folder)
    given = {"data": card.data, "licence": card.licence}
    card = replace(card, data=card.data or data, metrics={**trainer.stats.last(), **card.metrics})
    with trainer.whole_trained() as recipe:

        def write() -> None:
            if old is None:
                recipe.save(folder, card=card, images_seen=trainer.images_seen, **trainer.origin, **extra)
            elif (old.data, old.licence) != (given["data"] or old.data, given["licence"] or old.licence):
                restate(folder / CARD, **given)

        main_decides(trainer.accelerator, write)
    trainer.say(f"exported to {folder} (peak memory of this process: {peak_memory()} MiB)")
    return folder
