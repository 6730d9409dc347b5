"""Encoded domains: written once by the frozen autoencoder, read whole into memory, dealt out unpaired."""

from __future__ import annotations

import io
import json
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

FIELDS = {"latents": ("latent",), "codes": ("top", "bottom")}
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
        fields: Mapping[str, Tensor | np.ndarray],
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

    def __exit__(self, kind, error, trace) -> None:
        self.writer.__exit__(kind, error, trace)


class LatentSet:
    """One encoded domain in memory: `fields` as stored (compact), `take` as the models want them."""

    def __init__(self, folder: Path, index: Index, fields: dict[str, Tensor], keys: list[str], notes: list[bytes]):
        self.folder, self.meta, self.kind = folder, index.meta, index.kind
        self.fields, self.keys, self._json = fields, keys, notes

    @classmethod
    def open(cls, folder: str | Path, *, autoencoder_fingerprint: str | None = None) -> LatentSet:
        """Read everything; raises UserError if these were encoded by another autoencoder, or are not latents.

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
        fields: dict[str, Tensor] = {}
        notes: list[bytes] = []
        for sample in range(len(dataset)):
            files = dataset.read(sample)
            for name in FIELDS[index.kind]:
                array = _load(files, name, dataset, sample)
                if name not in fields:
                    fields[name] = torch.empty((len(dataset), *array.shape), dtype=array.dtype)
                if array.shape != fields[name].shape[1:] or array.dtype != fields[name].dtype:
                    expected = f"{fields[name].dtype} {tuple(fields[name].shape[1:])}"
                    got = f"{array.dtype} {tuple(array.shape)}"
                    raise UserError(f"{dataset.place(sample)}.{name}.npy: {got}, the others are {expected}")
                fields[name][sample] = array
            notes.append(files.get("json", b""))
        return cls(folder, index, fields, [index.key(sample) for sample in range(len(index))], notes)

    def __len__(self) -> int:
        return len(self.keys)

    def json(self, sample: int) -> dict[str, Any]:
        """What the image's `json` file said, or {}."""
        return json.loads(self._json[sample]) if self._json[sample] else {}

    def take(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Rows of every field: latents as float32 (B, *L) (float64 stays), codes as int64 (B, h, w)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return {name: _widen(field[indices]) for name, field in self.fields.items()}


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

    `pairs` are the (source, target) numbers of domains that have their turn, one after the other.
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
    ):
        self.sizes = tuple(sizes)
        self.pairs = tuple(pairs)
        self.seed, self.batch, self.rank, self.world = seed, batch, rank, world
        rank_positions(0, batch, rank, world)
        # Position p is turn p // n of pair p % n. How many samples of its domain a pair's turn has before it, by side:
        # those of earlier turns, and of earlier pairs in its own.
        sides = list(zip(*self.pairs, strict=True))
        self._uses = [[side.count(domain) for domain in side] for side in sides]
        self._before = [[side[:i].count(domain) for i, domain in enumerate(side)] for side in sides]

    def at(self, images_seen: int) -> PairBatch:
        """The batch that a run which has seen `images_seen` takes next: a pure function."""
        positions = rank_positions(images_seen, self.batch, self.rank, self.world)
        turns, pair = np.divmod(positions, len(self.pairs))
        source, target = (self._rows(side, turns, pair) for side in (0, 1))
        return PairBatch(*map(torch.from_numpy, (positions, source, target, pair)))

    def _rows(self, side: int, turns: np.ndarray, pair: np.ndarray) -> np.ndarray:
        if len(self.pairs) == 1:  # the same in fewer operations: beside a small energy they count
            return sample_at(turns, self.seed, self.sizes[self.pairs[0][side]], ("source", "target")[side])
        rows = np.empty_like(pair)
        for number in np.unique(pair).tolist():
            here = pair == number
            domain = self.pairs[number][side]
            places = turns[here] * self._uses[side][number] + self._before[side][number]
            purpose = ("source", "target")[side] + (f" {domain}" if len(self.pairs) > 1 else "")
            rows[here] = sample_at(places, self.seed, self.sizes[domain], purpose)
        return rows

    def stream(self, start: int) -> Iterator[PairBatch]:
        """Endless batches from images_seen = `start` on."""
        while True:
            yield self.at(start)
            start += self.batch


def pairs_of(domains: int) -> list[tuple[int, int]]:
    """Every (source, target) of different domains."""
    return list(permutations(range(domains), 2))
