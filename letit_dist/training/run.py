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
from letit_dist.cards import Card
from letit_dist.config import StrictConfig, Tree, as_tree, differences, parse_config, to_yaml
from letit_dist.errors import UserError
from letit_dist.files import write_atomically

if TYPE_CHECKING:
    from letit_dist.training.trainer import Trainer

# What may change between two starts of a run, because by construction it changes no result.
_FREE = (
    *("data.workers", "data.cache", "data.cache_gib", "intervals"),
    *("training.microbatch", "training.recompute_from", "training.timeout", "training.trackers"),
)


def _without_free(tree: Tree) -> Tree:
    tree = json.loads(json.dumps(tree))
    for path in _FREE:
        node, *rest = path.split(".")
        if rest and isinstance(tree.get(node), dict):
            tree[node].pop(rest[0], None)
        elif not rest:
            tree.pop(node, None)
    return tree


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
        raise UserError(
            f"another process is running in {folder}: wait for it, stop it, or name another --run"
        ) from None
    _HELD[folder.resolve()] = handle


def require_claimable(folder: Path, config: StrictConfig) -> None:
    """UserError where `folder` is not free for this configuration, or cannot be made; nothing is written.

    The same configuration again resumes; another one is refused with the differences.
    """
    path = folder / "config.yaml"
    tree = as_tree(config)
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
        lines = differences(_without_free(saved), _without_free(tree))
        if lines:
            listed = "\n".join(f"  {line}" for line in lines)
            raise UserError(
                f"{folder} belongs to another configuration; name another folder with --run, or undo:\n{listed}"
            )
    elif folder.is_dir() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
        raise UserError(f"{folder} is not empty and is no run folder (no config.yaml): name another with --run")


def nearest(folder: Path) -> Path:
    """`folder`, or what there is of the path to it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def open_run(folder: Path, config: StrictConfig) -> None:
    """Claim `folder` for this configuration (main process only); refuses what `require_claimable` does."""
    require_claimable(folder, config)
    path = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        write_atomically(path, to_yaml(config).encode())
        write_atomically(folder / "environment.json", (json.dumps(environment(), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write into the run folder {folder}: {error.strerror or error}") from error


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
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
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
    old = Card.read(folder) or Card()
    new = not folder.exists() or card.data not in (None, old.data) or card.licence not in (None, old.licence)
    card = replace(card, data=card.data or old.data or data, licence=card.licence or old.licence)
    card = replace(card, metrics={**trainer.stats.last(), **card.metrics})
    with trainer.whole_trained() as recipe:
        if trainer.is_main and new:
            recipe.save(folder, card=card, images_seen=trainer.images_seen, **trainer.origin, **extra)
    trainer.accelerator.wait_for_everyone()
    trainer.say(f"exported to {folder} (peak memory of this process: {peak_memory()} MiB)")
    return folder
