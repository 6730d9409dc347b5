"""Attributes that a translation must keep: what the shards, or a table beside them, say, and what a second judge sees.

The judge learns each attribute from real images of both domains. An image keeps an attribute if, after the translation,
the judge sees what was true of its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from letit_dist import pretrained, rng
from letit_dist.data.reader import ShardDataset
from letit_dist.data.source_faces import read_attribute
from letit_dist.errors import UserError
from letit_dist.evaluation.attributes import Examples, learn, seen_by_judge, small_network

_MOST_CLASSES = 20


@dataclass(frozen=True)
class Attribute:
    """A column of the metadata: classes, or numbers that are cut in two at the median of the training images."""

    name: str
    classes: tuple[str, ...]
    cut: float | None = None

    @classmethod
    def fit(cls, name: str, sides: Sequence[Sequence[Any]]) -> Attribute:
        """From the training values of both domains; UserError for a column that says no more than the domain."""
        values = [value for side in sides for value in side]
        numbers = [_number(value) for value in values]
        if None not in numbers and len(set(numbers)) > _MOST_CLASSES:
            cut = float(torch.tensor(numbers).median())
            return cls(name, ("low", "high"), cut)
        classes = tuple(sorted({str(value) for value in values}))
        if len(classes) > _MOST_CLASSES:
            raise UserError(f"--keep {name}: {len(classes)} different values, at most {_MOST_CLASSES}")
        for side, words in zip(sides, ("source", "target"), strict=True):
            if len({str(value) for value in side}) < 2:
                raise UserError(
                    f"--keep {name}: all training images of the {words} have {str(side[0])!r}: nothing to keep there"
                )
        return cls(name, classes)

    def codes(self, values: Sequence[Any]) -> Tensor:
        """(N,) numbers of the classes."""
        if self.cut is not None:
            numbers = [_number(value) for value in values]
            if None in numbers:
                raise UserError(f"--keep {self.name}: {values[numbers.index(None)]!r} is no number, others are")
            return (torch.tensor(numbers) > self.cut).long()
        if strange := sorted({str(value) for value in values} - set(self.classes)):
            raise UserError(
                f"--keep {self.name}: test images have {strange[0]!r}, training has {', '.join(self.classes)}"
            )
        return torch.tensor([self.classes.index(str(value)) for value in values])


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def read_column(dataset: ShardDataset, name: str, table: Path | None = None) -> list[Any]:
    """The value of a column for every sample: of its JSON, dots leading inside, or of a `table` of attributes as
    CelebA's, found by the name of the file that was packed. Raises UserError for a sample without one."""
    known = read_attribute(table, name, option="--keep") if table else {}
    values = []
    for row in range(len(dataset)):
        note = dataset.json(row)
        if table:
            value: Any = known.get(Path(str(note.get("file", dataset.key(row)))).stem)
        else:
            value = note.get(name)
            if value is None:
                value = note
                for step in name.split("."):
                    value = value.get(step) if isinstance(value, dict) else None
        if value is None or isinstance(value, (dict, list)) or value == "":
            where = str(table) if table else f"it has {', '.join(_columns(dataset.json(row))) or 'none'}"
            raise UserError(f"--keep {name}: no such value for {dataset.place(row)} ({where})")
        values.append(value)
    return values


def _columns(note: dict[str, Any], inside: str = "") -> list[str]:
    """Names of all single values, dotted."""
    names = []
    for name, value in note.items():
        if isinstance(value, dict):
            names += _columns(value, f"{inside}{name}.")
        elif not isinstance(value, list):
            names.append(f"{inside}{name}")
    return names


class Keeper(nn.Module):
    """The second judge: `forward(images)` -> (B, A) numbers of classes, one a column for each attribute."""

    def __init__(self, attributes: Sequence[Attribute], table: Path | None = None):
        super().__init__()
        self.attributes, self.table = tuple(attributes), table
        self.network = small_network(sum(len(attribute.classes) for attribute in attributes))

    def logits(self, images: Tensor) -> list[Tensor]:
        """Of images (B, 3, 64, 64): one (B, classes) for each attribute."""
        return list(self.network(images).split([len(attribute.classes) for attribute in self.attributes], dim=1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([part.argmax(1) for part in self.logits(seen_by_judge(images))], 1)

    def truth(self, dataset: ShardDataset) -> Tensor:
        """(N, A) numbers of the classes that the samples have."""
        return torch.stack([a.codes(read_column(dataset, a.name, self.table)) for a in self.attributes], 1)

    @torch.no_grad()
    def scores(self, images: Tensor, truth: Tensor, *, chunk: int = 256) -> dict[str, float]:
        """Of images (N, 3, H, W) whose sources had `truth` (N, A): the share of each attribute that is still seen, and
        `kept_accuracy`, their mean."""
        device = next(self.parameters()).device
        seen = torch.cat([self(part.to(device)) for part in images.split(chunk)]).cpu()
        shares = (seen == truth).double().mean(0).tolist()
        named = {f"kept_{attribute.name}": share for attribute, share in zip(self.attributes, shares, strict=True)}
        return {"kept_accuracy": sum(shares) / len(shares), **named}


def load_or_train_keeper(
    names: Sequence[str],
    sides: Sequence[ShardDataset],
    examples: Examples,
    folder: Path,
    *,
    table: Path | None = None,
    steps: int = 300,
    batch: int = 64,
    seed: int = 0,
) -> Keeper:
    """The judge of these columns of the source's and the target's training shards (those of `examples`), from
    `folder` if it is there, else trained and kept."""
    values = {name: [read_column(side, name, table) for side in sides] for name in dict.fromkeys(names)}
    attributes = [Attribute.fit(name, column) for name, column in values.items()]
    truth = torch.stack([a.codes([v for side in values[a.name] for v in side]) for a in attributes], 1)
    tree = {
        "kept": [{**asdict(a), "classes": list(a.classes)} for a in attributes],
        "truth": pretrained.tensors_fingerprint({}, {"truth": truth}),
        **{"data": examples.stamp, "steps": steps, "seed": seed},
    }
    torch.manual_seed(rng.seed_for(seed, "keeper weights", 0))
    keeper = Keeper(attributes, table)
    if (folder / pretrained.CONFIG).is_file():
        stored, tensors = pretrained.read_folder(folder)
        if stored == tree:
            pretrained.load_exactly(keeper, tensors, folder)
            return keeper.eval().requires_grad_(False)

    def loss_of(images: Tensor, rows: Tensor) -> Tensor:
        parts = zip(keeper.logits(images), truth[rows].unbind(1), strict=True)
        return torch.stack([F.cross_entropy(logits, goal) for logits, goal in parts]).sum()

    draws = rng.generator(seed, "keeper batches", 0)
    learn(keeper, examples.pixels, loss_of, steps=steps, batch=batch, draws=draws, label="training the second judge")
    pretrained.write_folder(folder, tree, keeper.state_dict())
    return keeper
