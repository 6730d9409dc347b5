"""From stored samples to a recipe's batches: the one place where data and recipes meet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from letit_dist.data.foreign import ForeignStream, is_foreign
from letit_dist.data.latents import LatentPairs, LatentSet, PairBatch, pairs_of
from letit_dist.data.reader import ImageStream, ShardDataset, open_stream
from letit_dist.data.remote import BlockCache, is_url
from letit_dist.data.transforms import UnreadableImage, fast_decoders, to_images
from letit_dist.data.verifying import Verification
from letit_dist.errors import UserError
from letit_dist.memory import GIB
from letit_dist.recipes.base import Batch
from letit_dist.schemas import ImagesConfig, PretrainConfig

PREVIEW = 8  # samples in a picture of a run


class Feed(Protocol):
    """Where batches come from."""

    def batches(self, images_seen: int, batch: int, rank: int, ranks: int, resolution: int | None) -> Iterator[Batch]:
        """This rank's share of every global batch from `images_seen` on, without end; images at `resolution`."""

    def preview(self, count: int) -> Batch:
        """The same few samples on every call, for pictures."""


def _spread(count: int, total: int) -> list[int]:
    """`count` indices spread evenly over `total`: shards are often sorted, the first few would be alike."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


class _Verified:
    """A feed whose shards are hashed while a run learns from them."""

    _verification: Verification | None = None

    @property
    def unverified(self) -> str | None:
        """What to say of a run that ends before all its shards were hashed."""
        return self._verification.unfinished if self._verification else None


class ImageFeed(_Verified):
    """Shards of images, augmented by draws that belong to the sample's place in the run.

    Pixels become images on `device`: bytes are a quarter of what floats would be to send there. `resolution` is taken
    from samples that hold it beside larger ones; it does nothing to others.
    """

    def __init__(self, config: ImagesConfig, *, seed: int, resolution: int | None = None):
        self.config = config
        self.seed = seed
        self.device = torch.device("cpu")
        self._cache: BlockCache | None = None
        if any(map(is_url, config.train)):
            self._cache = BlockCache(config.cache, int(config.cache_gib * GIB))
        elif config.cache is not None:
            raise UserError("data.cache has no effect where nothing in data.train is on a server: leave it out")
        fast_decoders()  # here, and not once in each loader process
        self.foreign = any(is_foreign(path) for path in config.train)
        self.dataset: ShardDataset | None = None
        if not self.foreign:
            self.dataset = ShardDataset(config.train, scaled_decode=config.scaled_decode, cache=self._cache)
        self.resolution: int | None = None
        if self.dataset is not None and resolution is not None and self.dataset.stores(resolution):
            self.dataset, self.resolution = self.dataset.at(resolution), resolution

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the images; None for foreign shards, which say so only when they are read."""
        return self.dataset.image_size() if self.dataset else None

    def _stream(
        self, images_seen: int, batch: int, rank: int, ranks: int, workers: int, **augmentation: Any
    ) -> ImageStream | ForeignStream:
        return open_stream(
            self.config.train,
            scaled_decode=self.config.scaled_decode,
            cache=self._cache,
            seed=self.seed,
            batch=batch,
            rank=rank,
            world=ranks,
            workers=workers,
            max_bad_fraction=self.config.max_bad_fraction,
            start=images_seen,
            **augmentation,
        )

    def batches(
        self, images_seen: int, batch: int, rank: int, ranks: int, resolution: int | None = None
    ) -> Iterator[Batch]:
        """This rank's share of every global batch from `images_seen` on: data {"images": (B, 3, H, W)}, box-filtered
        to `resolution` if that is given."""
        stream = self._stream(
            images_seen,
            batch,
            rank,
            ranks,
            self.config.workers,
            flip=self.config.flip,
            grayscale=self.config.grayscale,
            resolution=resolution or self.resolution,
        )
        if stream.notice and rank == 0:
            print(stream.notice, flush=True)
        items = iter(stream)
        if self.dataset is not None and self.config.verify != "sizes" and self._verification is None:
            place = (rank, ranks) if self.config.verify == "once" else None
            self._verification = Verification(self.dataset.indexes, place)
        for number, item in enumerate(items):
            images = to_images(item.pixels.to(self.device, non_blocking=True))
            problem = self._verification.check() if self._verification else None
            seen = images_seen + number * batch
            yield Batch({"images": images}, item.positions, seen, batch, tuple(item.bad), problem)

    def require_shares(self, batch: int, ranks: int) -> None:
        """Raise UserError where `ranks` could not each be given a part of every batch; reads no image."""
        self._stream(0, batch, 0, ranks, self.config.workers)

    def preview(self, count: int) -> Batch:
        """Samples spread evenly over the data (foreign shards: their first), unaugmented."""
        if self.dataset is None:
            pixels = next(iter(self._stream(0, count, 0, 1, 0))).pixels
        else:
            pixels = torch.stack([self._readable(i) for i in _spread(count, len(self.dataset))])
        return Batch({"images": to_images(pixels)}, torch.arange(len(pixels)), 0, len(pixels))

    def _readable(self, sample: int) -> torch.Tensor:
        """The sample's pixels, or those of the next one that can be decoded."""
        assert self.dataset is not None
        for offset in range(len(self.dataset)):
            with contextlib.suppress(UnreadableImage):
                return self.dataset.pixels((sample + offset) % len(self.dataset))
        raise UserError(f"none of the {len(self.dataset)} samples in data.train can be decoded")


def open_images(config: PretrainConfig) -> ImageFeed:
    """The feed of a pretraining; UserError where its images are not of the autoencoder's size."""
    side = config.autoencoder.resolution
    feed = ImageFeed(config.data, seed=config.training.seed, resolution=side)
    require_side(feed.image_size, side)
    return feed


def require_side(size: tuple[int, int] | None, side: int) -> None:
    """UserError for images of another (H, W) than `side`; None is not known."""
    if size not in (None, (side, side)):
        raise UserError(
            f"data.train holds images of {size[1]}x{size[0]}, autoencoder.resolution is {side}: "
            f"pack them again with shards/pack.py --resolution {side}"
        )


class LatentFeed(_Verified):
    """Encoded domains, unpaired: data {"source.<field>", "target.<field>"} as they are stored.

    Two of them are source and target; `every_way` goes from each to each other, and data has "pair" (B,) too, the
    number of the (source, target) in `pairs`. These have their turns equally often, or `by_size` (see LatentPairs).
    """

    def __init__(self, *domains: LatentSet, seed: int, every_way: bool = False, by_size: bool = False):
        self.domains = domains
        self.seed = seed
        self.every_way = every_way
        self.by_size = by_size
        self.pairs = pairs_of(len(domains)) if every_way else [(0, 1)]
        self.names = [domain.meta["domain"] for domain in domains]
        if every_way and len(set(self.names)) < len(domains):
            raise UserError(
                f"data.domains: two of one name ({', '.join(self.names)}): name them by encode_latents.py --domain"
            )

    def _batch(self, item: PairBatch, seen: int, batch: int) -> Batch:
        data: dict[str, torch.Tensor] = {}
        for side, (name, rows) in enumerate((("source", item.source), ("target", item.target))):
            if not self.every_way:
                data |= {f"{name}.{field}": values for field, values in self.domains[side].take(rows).items()}
                continue
            domain = torch.tensor([pair[side] for pair in self.pairs])[item.pair]
            data |= {f"{name}.{field}": values for field, values in self._take(domain, rows).items()}
        if self.every_way:
            data["pair"] = item.pair
        return Batch(data, item.positions, seen, batch)

    def _take(self, domain: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        fields: dict[str, torch.Tensor] = {}
        for number in domain.unique().tolist():
            here = domain == number
            for name, values in self.domains[number].take(rows[here]).items():
                whole = fields.setdefault(name, values.new_empty((len(rows), *values.shape[1:])))
                whole[here] = values
        return fields

    def batches(
        self, images_seen: int, batch: int, rank: int, ranks: int, resolution: int | None = None
    ) -> Iterator[Batch]:
        """This rank's share of every global batch: as many source as target samples, each domain in its own order."""
        sizes = [len(domain) for domain in self.domains]
        pairs = LatentPairs(
            sizes, seed=self.seed, batch=batch, rank=rank, world=ranks, pairs=self.pairs, by_size=self.by_size
        )
        self._verification = self._verification or Verification([domain.index for domain in self.domains])
        for number, item in enumerate(pairs.stream(images_seen)):
            yield replace(self._batch(item, images_seen + number * batch, batch), problem=self._verification.check())

    def preview(self, count: int) -> Batch:
        """Samples spread evenly over each domain, and over the pairs."""
        count = min(count, *(len(domain) for domain in self.domains))
        pair = torch.arange(count) % len(self.pairs)
        source, target = (
            torch.tensor(
                [_spread(count, len(self.domains[self.pairs[p][side]]))[i] for i, p in enumerate(pair.tolist())]
            )
            for side in (0, 1)
        )
        return self._batch(PairBatch(torch.arange(count), source, target, pair), 0, count)
