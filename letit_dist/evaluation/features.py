"""Features of a set of images: a rank's share, resumed where it stopped, put together, and stored for the next time.

The network always sees slices of 16 images, cut by their place in the set (the last one filled up), because its
results depend on the batch in their last bits. So no number of ranks and no batch size changes a single one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from letit_dist import pretrained
from letit_dist.config import differences
from letit_dist.data.progress import Progress
from letit_dist.errors import UserError
from letit_dist.evaluation.extractors import Extractor
from letit_dist.evaluation.image_sets import ImageSet

SLICE = 16
Share = dict[int, dict[str, Tensor]]  # number of a slice -> its tensors, each (<= 16, ...)


@dataclass(frozen=True)
class Features:
    """`tensors` has features (N, D), perhaps logits (N, 1008), and columns (N,); `stamp` says what they are of."""

    tensors: dict[str, Tensor]
    stamp: dict[str, Any]

    @property
    def values(self) -> Tensor:
        return self.tensors["features"]

    def __len__(self) -> int:
        return len(self.values)


def stamp_of(images: ImageSet, extractor: Extractor) -> dict[str, Any]:
    """What decides the features: data, network, weights and resizes, as plain values; and what else the two sides must
    agree on: the split that the images state, None where they state none, and their (H, W)."""
    side = getattr(images, "side", None)
    resize = (f"{side} pixels first, " if side else "") + extractor.stamp["resize"]
    of = {"data": images.stamp, "count": len(images), "split": images.split, "pixels": [*images.pixels]}
    return {"kind": "features", **of, **extractor.stamp, "resize": resize}


def working_folder(out: Path, stamp: dict[str, Any], *also: object) -> Path:
    """Where the finished slices of these very features are kept while the others are made; `also` is what else
    decides their tensors."""
    tree = json.dumps([stamp, also, torch.__version__], sort_keys=True)
    return out / ".features" / hashlib.sha256(tree.encode()).hexdigest()[:16]


def extract_share(
    images: ImageSet, extractor: Extractor, *, rank: int = 0, world: int = 1, keep: Path | None = None
) -> Share:
    """The slices of this rank, every world-th; finished ones are taken from `keep`, new ones written there."""
    mine = range(rank, -(-len(images) // SLICE), world)
    share: Share = {}
    with Progress(f"features of {images.label}", len(mine) * SLICE) as progress:
        for number in mine:
            path = keep / f"{number:06d}.safetensors" if keep else None
            rows = range(number * SLICE, min(len(images), (number + 1) * SLICE))
            found = _finished(path, len(rows)) if path else None
            if found is None:
                found = _extract(images, extractor, rows)
                if path:
                    _write(path, found)
            share[number] = found
            progress.step(SLICE)
    return share


def _extract(images: ImageSet, extractor: Extractor, rows: range) -> dict[str, Tensor]:
    pixels, columns = images.read(rows)
    filled = torch.cat([pixels, pixels[-1:].expand(SLICE - len(rows), -1, -1, -1)])
    features = {name: value[: len(rows)].float().cpu() for name, value in extractor(filled).items()}
    return {**features, **{f"column {name}": value.cpu() for name, value in columns.items()}}


def _finished(path: Path, rows: int) -> dict[str, Tensor] | None:
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None  # never written, or cut short: it is made again
    return found if all(len(value) == rows for value in found.values()) else None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: value.contiguous() for name, value in tensors.items()}, beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to {path.parent}: {error}") from None


def assemble(shares: Sequence[Share], stamp: dict[str, Any]) -> Features:
    """The shares of all ranks as one, in the order of the images."""
    slices = {number: tensors for share in shares for number, tensors in share.items()}
    assert sorted(slices) == list(range(-(-stamp["count"] // SLICE))), "a rank's share is missing"
    ordered = [slices[number] for number in sorted(slices)]
    return Features({name: torch.cat([part[name] for part in ordered]) for name in ordered[0]}, stamp)


def gather_features(
    images: ImageSet,
    extractor: Extractor,
    gather: Callable[[object], list[Any]],
    *,
    rank: int = 0,
    world: int = 1,
    keep: Path | None = None,
) -> Features:
    """Features of all images on every rank. `gather(mine)` gives what all ranks gave, in any order.

    A rank that fails tells the others, which would wait for its share: its UserError is everybody's. UserError too
    where a rank has gone without a word.
    """
    outcome: Share | str
    try:
        outcome = extract_share(images, extractor, rank=rank, world=world, keep=keep)
    except UserError as error:
        outcome = str(error)
    try:
        outcomes = gather(outcome)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"lost the other ranks ({said}): the same command continues after the last slice") from None
    if problems := [found for found in outcomes if isinstance(found, str)]:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return assemble(outcomes, stamp_of(images, extractor))


def forget(folders: Sequence[Path]) -> None:
    """Remove what was kept for an interruption that did not come."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # if nobody else keeps anything there


def store(features: Features, folder: Path) -> None:
    """Write them as config.json and model.safetensors, with a fingerprint over both."""
    pretrained.write_folder(folder, features.stamp, features.tensors)


def read_stored(folder: Path) -> Features:
    """Stored features; UserError if the folder holds something else or was changed."""
    tree, tensors = pretrained.read_folder(folder)
    if tree.get("kind") != "features" or "features" not in tensors:
        raise UserError(f"{folder} holds no features: eval/fidelity.py writes them with --reference")
    return Features(tensors, tree)


def reuse(folder: Path, wanted: dict[str, Any]) -> Features | None:
    """What `folder` holds if that is exactly what is wanted, None if there is nothing; UserError with the differences
    if it is something else."""
    if not folder.exists():
        return None
    features = read_stored(folder)
    if different := differences(features.stamp, wanted):
        lines = [f"{folder}: stored features differ, {line}" for line in different]
        raise UserError("\n".join([*lines, f"{folder}: name another --reference, or remove this one"]))
    return features


def check_alike(a: dict[str, Any], b: dict[str, Any]) -> None:
    """UserError if two sets of features do not come from the same network, weights and resizes, or not from images of
    one size: what the network's own resize makes of two sizes would be measured as well."""
    names = ("extractor", "layer", "resize", "weights")
    different = [f"{name}: {a[name]} and {b[name]}" for name in names if a[name] != b[name]]
    sizes = [stamp.get("pixels") for stamp in (a, b)]
    stated = [f"{size[1]}x{size[0]}" for size in sizes if size is not None]
    if len(stated) == 2 and stated[0] != stated[1]:
        first, second = stated
        remedy = "give one --resize for both, or where a protocol forbids it pack both at one size"
        different.append(f"images of {first} and of {second}: {remedy}")
    if different:
        raise UserError("\n".join(f"the two sides cannot be compared, {line}" for line in different))
