"""Checking shards: sizes, hashes, and whether every sample still says what its folder says about it."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from letit_dist.data.index import INDEX_NAME, Index, build_index
from letit_dist.data.latents import FIELDS
from letit_dist.data.progress import Progress
from letit_dist.data.reader import ShardDataset, loader
from letit_dist.data.transforms import UnreadableImage
from letit_dist.errors import UserError


@dataclass
class CheckResult:
    folder: Path
    kind: str
    samples: int
    shards: int
    bytes: int
    shapes: Counter[str]
    problems: list[str]

    def line(self) -> str:
        shapes = ", ".join(f"{count} of {shape}" for shape, count in self.shapes.most_common(4))
        state = f"{len(self.problems)} FAULTS" if self.problems else "good"
        size = f"{self.bytes / 1e6:.1f} MB"
        return f"{self.folder}: {state}: {self.samples} {self.kind} in {self.shards} shards, {size}; {shapes}"


class _Describe:
    """For the loader: sample number -> (shape or None, problem or None)."""

    def __init__(self, dataset: ShardDataset):
        self.dataset, self.kind = dataset, dataset.indexes[0].kind

    def __getitem__(self, sample: int) -> tuple[str | None, str | None]:
        try:
            self.dataset.json(sample)
            if self.kind == "images":
                height, width = self.dataset.pixels(sample).shape[1:]
                return f"{width}x{height}", None
            files = self.dataset.read(sample)
            arrays = [np.load(io.BytesIO(files[f"{name}.npy"])) for name in FIELDS[self.kind]]
            return " + ".join(f"{array.dtype} {array.shape}" for array in arrays), None
        except UserError as error:
            return None, str(error)
        except (UnreadableImage, ValueError, OSError, KeyError) as error:
            return None, f"{self.dataset.place(sample)}: {error}"


def check(folder: str | Path, workers: int = 0) -> CheckResult:
    """Read everything once. Faults are collected; a folder that cannot be opened at all raises UserError."""
    dataset = ShardDataset([folder])
    index = dataset.indexes[0]
    problems = [problem for _, problem in index.hash_problems() if problem]
    for number, shard in enumerate(index.shards):
        if not shard.samples:
            problems.append(f"{index.folder / shard.name}: no samples (shard {number})")
    shapes: Counter[str] = Counter()
    with Progress(str(folder), len(dataset)) as progress:
        for shape, problem in loader(_Describe(dataset), range(len(dataset)), workers):
            if problem:
                problems.append(problem)
            else:
                shapes[shape] += 1
            progress.step()
    if len(shapes) > 1:
        problems.append(f"{folder}: samples of {len(shapes)} sizes: {', '.join(shapes)}; training needs one")
    stated = dataset.resolution
    if stated is not None and index.kind == "images" and shapes and f"{stated}x{stated}" not in shapes:
        problems.append(f"{folder}: {INDEX_NAME} says resolution {stated}, found {', '.join(shapes)}")
    size = sum(shard.bytes for shard in index.shards)
    return CheckResult(index.folder, index.kind, len(index), len(index.shards), size, shapes, problems)


def write_index(folder: str | Path) -> Index:
    """Write index.json for local tars that somebody else made; an index that is there already is kept."""
    if (Path(folder) / INDEX_NAME).exists():
        return Index.read(folder)
    index = build_index(folder)
    index.write()
    return index


def contact_sheet(
    folders: list[str | Path], path: str | Path, columns: int = 16, rows: int = 4, cell: int = 96
) -> None:
    """A PNG with evenly spaced samples of each folder, `rows` rows a folder."""
    cells = []
    for folder in folders:
        dataset = ShardDataset([folder])
        if dataset.indexes[0].kind != "images":
            raise UserError(f"{folder} holds {dataset.indexes[0].kind}: a sheet shows images")
        count = min(len(dataset), columns * rows)
        for sample in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
            try:
                image = Image.fromarray(dataset.pixels(sample).permute(1, 2, 0).contiguous().numpy())
                cells.append(np.asarray(image.resize((cell, cell), Image.Resampling.LANCZOS)))
            except UnreadableImage:
                cells.append(np.full((cell, cell, 3), (255, 0, 0), np.uint8))
        cells += [np.full((cell, cell, 3), 255, np.uint8)] * (-count % columns)
    grid = torch.from_numpy(np.stack(cells)).view(-1, columns, cell, cell, 3)
    sheet = grid.permute(0, 2, 1, 3, 4).reshape(-1, columns * cell, 3)
    try:
        Image.fromarray(sheet.numpy()).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the sheet {path}: {error}") from None
