"""Encoded domains: written once by the frozen autoencoder, read whole into memory if they fit, dealt out unpaired."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from letit_dist.data.index import INDEX_NAME, Index
from letit_dist.data.order import rank_positions, sample_at
from letit_dist.data.reader import ShardDataset
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError
from letit_dist.memory import available_bytes

FIELDS = {"latents": ("latent",), "codes": ("top", "bottom")}
ROUND = 4096
AHEAD = 4096  # positions whose rows are found at once
SHARE = 0.8  # of the free memory that one encoded domain may take
LATENT_DTYPES = ("float16", "float32", "float64")


def code_dtype(codebook_size: int) -> str:
    """The smallest integer type that holds codes 0 .. codebook_size - 1 and that torch computes with."""
    for dtype in ("uint8", "int16", "int32"):
        if codebook_size - 1 <= np.iinfo(dtype).max:
            return dtype
    raise ValueError(f"a codebook of {codebook_size} entries")


class LatentWriter:
    """Writes one folder of latents or codes; a context manager, finished on a normal exit.

    Fields are `key.latent.npy` (kind "latents": float (*L)) or `key.top.npy` and `key.bottom.npy` (kind "codes":
    integer (h, w)). An augmented view is a sample of its own with a suffix: `key-flip`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        kind: str,
        autoencoder_fingerprint: str,
        meta: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        codebook_size: int | None = None,
        shard_bytes: int = 1 << 28,
    ):
        if kind not in FIELDS:
            raise ValueError(f"kind {kind!r}, known: {', '.join(FIELDS)}")
        if (kind == "codes") != (codebook_size is not None):
            raise ValueError("codebook_size belongs to kind 'codes', and only there")
        if kind == "latents" and dtype not in LATENT_DTYPES:
            raise UserError(f"latents cannot be stored as {dtype}: choose one of {', '.join(LATENT_DTYPES)}")
        self.kind, self.codebook_size = kind, codebook_size
        self.dtype = code_dtype(codebook_size) if codebook_size is not None else dtype
        meta = {**(meta or {}), "autoencoder_fingerprint": autoencoder_fingerprint, "dtype": self.dtype}
        if codebook_size is not None:
            meta["codebook_size"] = codebook_size
        self.writer = ShardWriter(folder, kind=kind, meta=meta, shard_bytes=shard_bytes)

    @property
    def resume_at(self) -> int:
        """How many samples an interrupted run has already written safely."""
        return self.writer.resume_at

    def write(
        self,
        key: str,
        fields: Mapping[str, Tensor | np.ndarray[Any, Any]],
        *,
        json_data: Mapping[str, Any] | None = None,
        view: str = "",
    ) -> str:
        """Append one sample; fields are {"latent": (*L)} or {"top": (h, w), "bottom": (H, W)}."""
        if tuple(fields) != FIELDS[self.kind]:
            raise ValueError(f"fields {list(fields)}, kind {self.kind!r} has {list(FIELDS[self.kind])}")
        files: dict[str, bytes] = {}
        for name, value in fields.items():
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            if self.kind == "codes" and (array.min() < 0 or array.max() >= self.codebook_size):
                raise ValueError(f"{key}.{name}: codes {array.min()}..{array.max()} of {self.codebook_size}")
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.ascontiguousarray(array.astype(self.dtype)), version=(1, 0))
            files[f"{name}.npy"] = stream.getvalue()
        if json_data:
            files["json"] = json.dumps(dict(json_data), sort_keys=True).encode()
        return self.writer.write(f"{key}-{view}" if view else key, files)

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.writer.__exit__(kind, error, trace)


class LatentSet:
    """One encoded domain: `take` gives rows as the models want them.

    `fields` holds all of it as stored (compact); it is empty where that does not fit into memory, and `take` then reads
    the rows from the shards.
    """

    def __init__(self, dataset: ShardDataset, fields: dict[str, Tensor], notes: list[bytes]):
        index = dataset.indexes[0]
        self.folder, self.meta, self.kind = Path(index.folder), index.meta, index.kind
        self.fields, self._json, self._dataset = fields, notes, dataset
        self.keys = [index.key(sample) for sample in range(len(index))]

    @classmethod
    def open(cls, folder: str | Path, *, autoencoder_fingerprint: str | None = None) -> LatentSet:
        """Read everything that fits; raises UserError if another autoencoder encoded these, or they are not latents.

        Without a fingerprint nothing is compared (looking at shards, not training on them).
        """
        folder = Path(folder)
        dataset = ShardDataset([folder])
        index = dataset.indexes[0]
        if index.kind not in FIELDS:
            raise UserError(
                f"{folder} holds {index.kind}, not latents: encode them first (python launch/encode_latents.py --help)"
            )
        found = index.meta.get("autoencoder_fingerprint")
        if autoencoder_fingerprint is not None and found != autoencoder_fingerprint:
            raise UserError(
                f"{folder}: encoded by autoencoder {found}, this run has autoencoder {autoencoder_fingerprint}: "
                "use that one, or encode again: python launch/encode_latents.py --autoencoder AUTOENCODER "
                "--shards IMAGES --out ANOTHER_FOLDER"
            )
        first = _rows_of(dataset, 0)
        fields = _space(first, len(dataset))
        if not fields:
            return cls(dataset, {}, [])
        notes: list[bytes] = []
        for sample in range(len(dataset)):
            files = dataset.read(sample)
            for name, value in _rows_of(dataset, sample, files, like=first).items():
                fields[name][sample] = value
            notes.append(files.get("json", b""))
        return cls(dataset, fields, notes)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def index(self) -> Index:
        """Of its shards."""
        return self._dataset.indexes[0]

    def json(self, sample: int) -> dict[str, Any]:
        """What the image's `json` file said, or {}."""
        found = self._json[sample] if self.fields else self._dataset.read(sample).get("json")
        return json.loads(found) if found else {}

    def take(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Rows of every field: latents as float32 (B, *L) (float64 stays), codes as int64 (B, h, w)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if self.fields:
            return {name: _widen(field.index_select(0, indices)) for name, field in self.fields.items()}
        first = _rows_of(self._dataset, 0)
        rows = [_rows_of(self._dataset, sample, like=first) for sample in indices.tolist()]
        return {name: _widen(torch.stack([row[name] for row in rows])) for name in first}


def _space(first: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Memory for `count` samples like the first, or {} where there is not enough of it."""
    needed = count * sum(value.nbytes for value in first.values())
    free = available_bytes()
    if free is not None and needed > SHARE * free:
        return {}
    try:
        return {name: torch.empty((count, *value.shape), dtype=value.dtype) for name, value in first.items()}
    except RuntimeError:  # the system did not say so before
        return {}


def _rows_of(
    dataset: ShardDataset,
    sample: int,
    files: Mapping[str, bytes] | None = None,
    *,
    like: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every field of one sample; raises UserError where one is not as the first sample's in `like`."""
    files = dataset.read(sample) if files is None else files
    found = {name: _load(files, name, dataset, sample) for name in FIELDS[dataset.indexes[0].kind]}
    for name, value in found.items():
        if like is not None and (value.shape != like[name].shape or value.dtype != like[name].dtype):
            expected = f"{like[name].dtype} {tuple(like[name].shape)}"
            got = f"{value.dtype} {tuple(value.shape)}"
            raise UserError(f"{dataset.place(sample)}.{name}.npy: {got}, the others are {expected}")
    return found


def _widen(field: Tensor) -> Tensor:
    if not field.is_floating_point():
        return field.long()
    return field if field.dtype == torch.float64 else field.float()


def _load(files: Mapping[str, bytes], name: str, dataset: ShardDataset, sample: int) -> Tensor:
    try:
        return torch.from_numpy(np.lib.format.read_array(io.BytesIO(files[f"{name}.npy"]), allow_pickle=False))
    except KeyError:
        raise UserError(f"{dataset.place(sample)}: no {name}.npy, its files are: {', '.join(files)}") from None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{dataset.place(sample)}.{name}.npy cannot be read: {error} (see {INDEX_NAME})") from None


@dataclass(frozen=True)
class PairBatch:
    """One rank's share of a global batch: which source and which target sample stand at each position."""

    positions: Tensor  # int64 (B,): global stream positions, the index of all randomness
    source: Tensor  # int64 (B,): rows of the source set
    target: Tensor  # int64 (B,): rows of the target set
    pair: Tensor  # int64 (B,): which (source, target) of `LatentPairs.pairs`


class LatentPairs:
    """The unpaired stream: each side has its own order and its own length, each sample once in its own epoch.

    `pairs` are the (source, target) numbers of domains that have their turn, one after the other; or, `by_size`, each
    in proportion to how many pairs of samples it has, as if one of all these were drawn.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        pairs: Sequence[tuple[int, int]] = ((0, 1),),
        by_size: bool = False,
    ):
        self.sizes = tuple(sizes)
        self.pairs = tuple(pairs)
        self.seed, self.batch, self.rank, self.world = seed, batch, rank, world
        rank_positions(0, batch, rank, world)
        # Position p is slot p % n of round p // n, and each slot belongs to a pair. How many samples of its domain
        # a slot has before it, by side: those of earlier rounds, and of earlier slots in its own.
        shares = [self.sizes[source] * self.sizes[target] for source, target in self.pairs] if by_size else None
        self._slots = _round(len(self.pairs), shares)
        sides = [np.asarray(side)[self._slots] for side in zip(*self.pairs, strict=True)]
        self._domains = sides
        self._uses = [np.bincount(side)[side] for side in sides]
        self._before = [_earlier(side) for side in sides]

    def at(self, images_seen: int) -> PairBatch:
        """The batch that a run which has seen `images_seen` takes next: a pure function."""
        return self._at(rank_positions(images_seen, self.batch, self.rank, self.world))

    def _at(self, positions: np.ndarray[Any, Any]) -> PairBatch:
        rounds, slots = np.divmod(positions, len(self._slots))
        source, target = (self._rows(side, rounds, slots) for side in (0, 1))
        return PairBatch(*map(torch.from_numpy, (positions, source, target, self._slots[slots])))

    def _rows(self, side: int, rounds: np.ndarray[Any, Any], slots: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if len(self.pairs) == 1:  # the same in fewer operations: beside a small energy they count
            return sample_at(rounds, self.seed, self.sizes[self.pairs[0][side]], ("source", "target")[side])
        rows = np.empty_like(rounds)
        domains = self._domains[side][slots]
        places = rounds * self._uses[side][slots] + self._before[side][slots]
        for domain in np.unique(domains).tolist():
            here = domains == domain
            purpose = ("source", "target")[side] + (f" {domain}" if len(self.pairs) > 1 else "")
            rows[here] = sample_at(places[here], self.seed, self.sizes[domain], purpose)
        return rows

    def stream(self, start: int) -> Iterator[PairBatch]:
        """Endless batches from images_seen = `start` on."""
        # Several at once: beside a small energy the operations on one batch's few numbers would count.
        count = max(1, AHEAD // self.batch)
        offsets = self.batch * np.arange(count)[:, None]
        while True:
            many = self._at((rank_positions(start, self.batch, self.rank, self.world) + offsets).reshape(-1))
            share = self.batch // self.world
            yield from map(
                PairBatch,
                many.positions.split(share),
                many.source.split(share),
                many.target.split(share),
                many.pair.split(share),
            )
            start += count * self.batch


def _round(count: int, shares: Sequence[int] | None) -> np.ndarray[Any, Any]:
    """Which of `count` pairs each slot of a round belongs to: int64 (slots,), each pair spread evenly over it.

    `shares` are kept to a 4096th of the round; a pair has one slot at least.
    """
    if shares is None:
        return np.arange(count)
    whole = sum(shares)
    turns = np.array([max(1, (share * ROUND + whole // 2) // whole) for share in shares])
    turns //= np.gcd.reduce(turns)
    # Integers, so that every platform has the same order: the turn j of n lies at (2j + 1) / 2n of the round.
    least = math.lcm(*turns.tolist())
    places = [((2 * j + 1) * (least // n), pair) for pair, n in enumerate(turns.tolist()) for j in range(n)]
    return np.array([pair for _, pair in sorted(places)])


def _earlier(side: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many earlier slots have the same domain: int64 (slots,)."""
    found = np.empty_like(side)
    for domain in np.unique(side).tolist():
        here = side == domain
        found[here] = np.arange(here.sum())
    return found


def pairs_of(domains: int) -> list[tuple[int, int]]:
    """Every (source, target) of different domains."""
    return list(permutations(range(domains), 2))
