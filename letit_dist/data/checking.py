"""Checking shards: hashes, places, sizes, and whether pictures of one split stand in another."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from letit_dist.data.index import INDEX_NAME, Files, Index, build_index, scan_tar
from letit_dist.data.latents import FIELDS
from letit_dist.data.loading import loader
from letit_dist.data.progress import Progress
from letit_dist.data.reader import ShardDataset
from letit_dist.data.remote import is_url
from letit_dist.data.similarity import Pictures, difference_hash, pixel_digest, shared
from letit_dist.data.transforms import UnreadableImage
from letit_dist.errors import UserError


@dataclass
class CheckResult:
    index: Index
    shapes: Counter[str]
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    pictures: Pictures | None = None  # None: these are latents

    @property
    def domain(self) -> str | None:
        return self.index.meta.get("domain")

    @property
    def split(self) -> str | None:
        return self.index.meta.get("split")

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.index.shards)

    def lines(self) -> list[str]:
        """What was found, for people."""
        index = self.index
        shapes = ", ".join(f"{count} of {shape}" for shape, count in self.shapes.most_common(4))
        state = f"{len(self.problems)} FAULTS" if self.problems else "good"
        size = f"{self.bytes / 1e6:.1f} MB"
        head = f"{index.folder}: {state}: {len(index)} {index.kind} in {len(index.shards)} shards, {size}; {shapes}"
        return [head, *(f"  {note}" for note in self.notes)]


@dataclass
class _Sample:
    """One sample as it was found: its shape, or what is wrong with it."""

    shape: str | None = None
    problem: str | None = None
    digest: int = 0
    hash: int = 0


class _Describe:
    """For the loader: sample number -> _Sample."""

    def __init__(self, dataset: ShardDataset):
        self.dataset, self.kind = dataset, dataset.indexes[0].kind

    def __getitem__(self, sample: int) -> _Sample:
        try:
            self.dataset.json(sample)
            if self.kind == "images":
                return self._image(sample)
            files = self.dataset.read(sample)
            arrays = [np.load(io.BytesIO(files[f"{name}.npy"])) for name in FIELDS[self.kind]]
            return _Sample(" + ".join(f"{array.dtype} {array.shape}" for array in arrays))
        except UserError as error:
            return _Sample(problem=str(error))
        except (UnreadableImage, ValueError, OSError, KeyError) as error:
            return _Sample(problem=f"{self.dataset.place(sample)}: {error}")

    def _image(self, sample: int) -> _Sample:
        images, shapes = self.dataset.images(sample), []
        largest: Tensor | None = None
        for side in sorted(images, key=lambda side: -(side or 0)):
            pixels = self.dataset.decode(sample, images[side])
            height, width = pixels.shape[1:]
            if side is not None and (height, width) != (side, side):
                raise UserError(
                    f"{self.dataset.place(sample)}.{images[side]} is {width}x{height}, its name says {side}"
                )
            largest = pixels if largest is None else largest
            shapes.append(f"{width}x{height}")
        assert largest is not None  # one image a sample is the least
        return _Sample(" + ".join(shapes), None, pixel_digest(largest), difference_hash(largest))


def check(folder: str | Path, workers: int = 0) -> CheckResult:
    """Read everything once. Faults are collected; a folder that cannot be opened at all raises UserError."""
    if is_url(folder):
        raise UserError(f"{folder}: only folders on this machine are checked: copy it here first")
    dataset = ShardDataset([folder])
    index = dataset.indexes[0]
    problems = []
    for number, (shard, problem) in enumerate(index.hash_problems()):
        if problem := problem or _misplaced(index, number):
            problems.append(problem)
        if not shard.samples:
            problems.append(f"{index.folder / shard.name}: no samples (shard {number})")
    shapes: Counter[str] = Counter()
    good: list[tuple[int, int, int]] = []
    with Progress(str(folder), len(dataset)) as progress:
        for number, sample in enumerate(loader(_Describe(dataset), range(len(dataset)), workers)):
            if sample.problem:
                problems.append(sample.problem)
            else:
                shapes[sample.shape] += 1
                good.append((number, sample.digest, sample.hash))
            progress.step()
    if len(shapes) > 1:
        problems.append(f"{folder}: samples of {len(shapes)} sizes: {', '.join(shapes)}; training needs one")
    stated = index.meta.get("resolutions", [dataset.resolution])
    if stated != [None] and index.kind == "images" and shapes:
        shape = " + ".join(f"{side}x{side}" for side in stated)
        if shape not in shapes:
            said = " ".join(map(str, stated))
            problems.append(f"{folder}: {INDEX_NAME} says resolution {said}, found {', '.join(shapes)}")
    result = CheckResult(index, shapes, problems)
    if index.kind == "images":
        columns = np.array(good, dtype=np.uint64).reshape(-1, 3)
        result.pictures = Pictures(columns[:, 0].astype(np.int64), columns[:, 1], columns[:, 2])
        if count := result.pictures.duplicates:
            result.notes.append(f"{count} images equal an earlier one in this folder")
    result.notes += _balance(index)
    return result


def _misplaced(index: Index, number: int) -> str | None:
    """What is wrong if the index does not say where the samples of a shard lie, though the shard is whole."""
    path = index.folder / index.shards[number].name
    found = scan_tar(path)
    stated = [(index.key(sample), index.files(sample)) for sample in index.samples_of(number)]
    if found == stated:
        return None
    nothing: tuple[str, Files] = ("nothing", {})
    pairs = itertools.zip_longest(stated, found, fillvalue=nothing)
    (key, _), (other, _) = next(pair for pair in pairs if pair[0] != pair[1])
    what = f"another place or size for {key}" if key == other else f"{key} where the tar has {other}"
    return f"{path}: {INDEX_NAME} says {what}: remove {INDEX_NAME} and run shards/check.py with --write-index"


def _balance(index: Index) -> list[str]:
    counts = [shard.samples for shard in index.shards]
    full = counts[:-1]
    if not full:
        return []
    line = f"shards of {min(full)} to {max(full)} samples, the last {counts[-1]}"
    uneven = max(full) > 2 * max(1, min(full))
    return [line + (": uneven, which costs a loader that deals whole shards out to ranks" if uneven else "")]


def compare(results: Sequence[CheckResult], show: int = 5) -> tuple[list[str], list[str]]:
    """(equal, similar): a line for each two image folders of different splits that share pictures."""
    equal_lines: list[str] = []
    similar_lines: list[str] = []
    known = [(r, r.pictures) for r in results if r.pictures is not None and r.split is not None]
    for (first, one), (second, other) in itertools.combinations(known, 2):
        if first.split == second.split:
            continue
        if second.split == "train":
            first, one, second, other = second, other, first, one
        both = f"{first.index.folder} ({first.split}) and {second.index.folder} ({second.split})"
        for pairs, word, lines in zip(
            shared(one, other), ("equal", "similar"), (equal_lines, similar_lines), strict=True
        ):
            if pairs:
                sign = {"equal": "=", "similar": "~"}[word]
                named = ", ".join(f"{first.index.key(i)} {sign} {second.index.key(j)}" for i, j in pairs[:show])
                more = f" and {len(pairs) - show} more" if len(pairs) > show else ""
                of = f"{len(pairs)} of {len(second.index)} images"
                lines.append(f"{both}: {of} of the second are {word}: {named}{more}")
    return equal_lines, similar_lines


def table(results: Sequence[CheckResult]) -> list[str]:
    """Samples and bytes by domain and split."""
    sums: dict[tuple[str, str], list[int]] = {}
    for result in results:
        row = sums.setdefault((result.domain or "-", result.split or "-"), [0, 0])
        row[0] += len(result.index)
        row[1] += result.bytes
    rows = [("domain", "split", "samples", "MB")]
    rows += [(domain, split, str(count), f"{size / 1e6:.1f}") for (domain, split), (count, size) in sums.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


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
