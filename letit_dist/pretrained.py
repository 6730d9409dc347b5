"""Folders of weights: `config.json` beside `model.safetensors`, the layout that model hubs use.

Shared by autoencoders and energies, which do not import each other. A folder is written whole or not at all,
and what is read back is checked against the fingerprint that was stored with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import letit_dist
from letit_dist import hub
from letit_dist.cards import CARD
from letit_dist.errors import UserError

Tree = dict[str, Any]
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Keys of config.json that describe the file and are no part of the model's own config.
_STAMPS = ("fingerprint", "letit_dist_version", "extra")


def tensors_fingerprint(tree: Tree, tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the sha256 over a config and all tensors: names, dtypes, shapes and values.

    The same on every device and in every memory format; another dtype is another model.
    """
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def write_folder(
    folder: str | Path,
    tree: Tree,
    tensors: Mapping[str, Tensor],
    extra: Tree | None = None,
    *,
    card: str | None = None,
) -> str:
    """Write config.json and model.safetensors, `card` as README.md if given, and return the fingerprint.

    `tree` is the model's config as plain values (`config.as_tree`); `extra` is anything else worth keeping
    with the weights (images seen, source run) and does not enter the fingerprint. The files are written into
    a new folder beside the final one, flushed, and renamed: an interrupted call leaves the old folder or
    none. A folder that holds anything else is not replaced (UserError); a README.md that is there stays, unless
    there is a new one.
    """
    folder = Path(os.path.abspath(folder))
    taken = [name for name in _STAMPS if name in tree]
    assert not taken, f"config keys {taken} collide with the stamps of {CONFIG}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write weights to {folder}: it is a file, expected a folder or a free name")
    inside = [path.name for path in folder.iterdir()] if folder.exists() else []
    others = sorted(set(inside) - {CONFIG, WEIGHTS, CARD})
    if others:
        raise UserError(
            f"will not replace {folder}: besides {CONFIG} and {WEIGHTS} it holds {', '.join(others[:5])}; "
            "name a new folder"
        )
    fingerprint = tensors_fingerprint(tree, tensors)
    stamped = {
        **tree,
        "fingerprint": fingerprint,
        "letit_dist_version": letit_dist.__version__,
        "extra": extra or {},
    }
    text = json.dumps(stamped, indent=2, ensure_ascii=False) + "\n"
    if card is None and CARD in inside:
        card = (folder / CARD).read_text(encoding="utf-8")
    beside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        # safetensors stores row-major bytes only; channels_last weights are rewritten here.
        rows = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(rows, beside / WEIGHTS)
        (beside / CONFIG).write_text(text, encoding="utf-8")
        if card is not None:
            (beside / CARD).write_text(card, encoding="utf-8")
        swap_in(beside, folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise UserError(f"cannot write weights to {folder}: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return fingerprint


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap_in(beside: Path, folder: Path) -> None:
    """Put the finished folder `beside` in place of `folder`, which may exist; flushed to disk before."""
    for path in (*beside.rglob("*"), beside):
        _flush(path)
    # A folder with files in it cannot be renamed over, so the old one steps aside between two renames.
    aside = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        os.rename(folder, aside)
    os.rename(beside, folder)
    _flush(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def read_config(folder: Path, needed: tuple[str, ...] = (CONFIG, WEIGHTS)) -> Tree:
    """The config.json of a folder, stamps included; UserError unless all files `needed` are there and it is not newer
    than this letit_dist."""
    if not folder.is_dir():
        what = "is a file, expected a folder" if folder.exists() else "does not exist"
        asked = not folder.exists() and hub.looks_like_id(folder)
        owner = f"; the Hub is not asked for it, because there is a folder {folder.parent} here" if asked else ""
        raise UserError(f"no weights at {folder}: it {what} (with {CONFIG} and {WEIGHTS}){owner}")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing and hub.is_of_diffusers(folder):
        raise UserError(
            f"{folder} holds a model of diffusers: make a folder of ours from it, and name that "
            f"(python launch/export.py --from diffusers {folder} --resolution R --out FOLDER)"
        )
    if missing:
        raise UserError(f"{folder}: no {' and no '.join(missing)} in it")
    try:
        tree = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{folder / CONFIG}: expected keys and values, found {type(tree).__name__}")
    written, own = (_release(version) for version in (tree.get("letit_dist_version"), letit_dist.__version__))
    if written > own:
        raise UserError(
            f"{folder / CONFIG} was written by letit_dist {tree['letit_dist_version']}, this is "
            f"{letit_dist.__version__}, which may not know all that it says: pip install --upgrade letit_dist"
        )
    return tree


def _release(version: Any) -> tuple[int, ...]:
    """(major, minor); formats change with these alone. () where there is none."""
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    return tuple(map(int, numbers.groups())) if numbers else ()


def read_extra(folder: str | Path) -> Tree:
    """What was given to `write_folder` as `extra`; the weights are not read."""
    return read_config(Path(folder)).get("extra", {})


def read_folder(folder: str | Path) -> tuple[Tree, dict[str, Tensor]]:
    """The model's config (without the stamps) and its tensors, on the CPU, checked against the fingerprint.

    Raises UserError for a missing folder or file, JSON or safetensors that cannot be read, and a fingerprint
    that is absent or another one: the two files then do not belong together, or one was edited.
    """
    folder = Path(folder)
    tree = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{folder / WEIGHTS} is damaged or not a safetensors file: {error}") from None
    stored = tree.get("fingerprint")
    if stored is None:
        raise UserError(f"{folder / CONFIG}: no `fingerprint`, so letit_dist did not write it")
    tree = {key: value for key, value in tree.items() if key not in _STAMPS}
    found = tensors_fingerprint(tree, tensors)
    if found != stored:
        raise UserError(
            f"{folder}: fingerprint {stored} stored in {CONFIG}, but its config and {WEIGHTS} give {found}: "
            "one of the two files was edited or comes from another model"
        )
    return tree, tensors


def check_exactly(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise one UserError, opened by `where`, that lists all keys missing, left over or of another shape."""
    problems = [f"missing {name} {tuple(expected[name].shape)}" for name in expected if name not in tensors]
    problems += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in tensors if name not in expected]
    for name, own in expected.items():
        other = tensors.get(name)
        if other is None:
            continue
        if own.shape != other.shape:
            problems.append(f"{name}: expected shape {tuple(own.shape)}, got {tuple(other.shape)}")
        elif own.is_floating_point() != other.is_floating_point():
            problems.append(f"{name}: expected {own.dtype}, got {other.dtype}")
    if problems:
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Load every tensor into `module`, which takes over their dtypes; parameters stay the same objects.

    Raises UserError as `check_exactly` does, before anything is changed.
    """
    check_exactly(module.state_dict(), tensors, where)
    # load_state_dict would cast in silence: float64 weights would come back as float32 under the same name.
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in tensors and tensor.dtype != tensors[name].dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)
    module.load_state_dict(dict(tensors))


def find_folder(path: str | Path) -> Path:
    """The folder of weights that `path` means: itself, the newest export of the run folder that it is, or what the
    Hub has under this id if nothing here is called so.

    Raises UserError if it is none of these, and says whether the run has simply not finished yet.
    """
    if hub.is_hub_id(path):
        return hub.fetch(str(path))
    path = Path(path)
    if (path / CONFIG).is_file() or not path.is_dir():
        return path
    # glob also finds what starts with a dot: the leftovers of an export that was killed.
    exports = sorted(p for p in path.glob("export/images-*") if (p / CONFIG).is_file())
    if exports:
        return exports[-1]
    if (path / "config.yaml").is_file():
        raise UserError(f"{path} is a run folder without an export: the run has not finished, start it again")
    if hub.is_of_diffusers(path):
        return path  # its reader says what to do
    raise UserError(
        f"{path}: neither weights ({CONFIG} and {WEIGHTS}) nor a run folder with an export in it; of other people's "
        "files launch/export.py makes such a folder"
    )
