"""From stored samples to a recipe's batches: the one place where data and recipes meet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from letit_dist.config import ImagesConfig
from letit_dist.data.foreign import is_foreign
from letit_dist.data.latents import LatentPairs, LatentSet
from letit_dist.data.reader import ShardDataset, open_stream
from letit_dist.data.transforms import UnreadableImage, to_images
from letit_dist.errors import UserError
from letit_dist.recipes.base import Batch


def _spread(count: int, total: int) -> list[int]:
    """`count` indices spread evenly over `total`: shards are often sorted, the first few would be alike."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


class ImageFeed:
    """Shards of images, augmented by draws that belong to the sample's place in the run."""

    def __init__(self, config: ImagesConfig, *, seed: int):
        self.config = config
        self.seed = seed
        self.foreign = any(is_foreign(path) for path in config.train)
        self.dataset = None if self.foreign else ShardDataset(config.train)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the images; None for foreign shards, which say so only when they are read."""
        return self.dataset.image_size() if self.dataset else None

    def _stream(self, images_seen: int, batch: int, rank: int, ranks: int, workers: int, **augmentation):
        return open_stream(
            self.config.train,
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
            resolution=resolution,
        )
        if stream.notice and rank == 0:
            print(stream.notice, flush=True)
        for number, item in enumerate(stream):
            images = to_images(item.pixels)
            yield Batch(
                {"images": images}, item.positions, images_seen + number * batch, batch, tuple(map(tuple, item.bad))
            )

    def preview(self, count: int) -> Batch:
        """Samples spread evenly over the data (foreign shards: their first), unaugmented."""
        if self.dataset is None:
            pixels = next(iter(self._stream(0, count, 0, 1, 0))).pixels
        else:
            pixels = torch.stack([self._readable(i) for i in _spread(count, len(self.dataset))])
        return Batch({"images": to_images(pixels)}, torch.arange(len(pixels)), 0, len(pixels))

    def _readable(self, sample: int) -> torch.Tensor:
        """The sample's pixels, or those of the next one that can be decoded."""
        for offset in range(len(self.dataset)):
            with contextlib.suppress(UnreadableImage):
                return self.dataset.pixels((sample + offset) % len(self.dataset))
        raise UserError(f"none of the {len(self.dataset)} samples in data.train can be decoded")


class LatentFeed:
    """Two encoded domains, unpaired: data {"source.<field>", "target.<field>"} as they are stored."""

    def __init__(self, source: LatentSet, target: LatentSet, *, seed: int):
        self.source = source
        self.target = target
        self.seed = seed

    def _batch(self, source: torch.Tensor, target: torch.Tensor, positions: torch.Tensor, seen: int, batch: int):
        data = {f"source.{name}": value for name, value in self.source.take(source).items()}
        data |= {f"target.{name}": value for name, value in self.target.take(target).items()}
        return Batch(data, positions, seen, batch)

    def batches(
        self, images_seen: int, batch: int, rank: int, ranks: int, resolution: int | None = None
    ) -> Iterator[Batch]:
        """This rank's share of every global batch: as many source as target samples, each side in its own order."""
        pairs = LatentPairs(self.source, self.target, seed=self.seed, batch=batch, rank=rank, world=ranks)
        for number, pair in enumerate(pairs.stream(images_seen)):
            yield self._batch(pair.source, pair.target, pair.positions, images_seen + number * batch, batch)

    def preview(self, count: int) -> Batch:
        """Samples spread evenly over each domain."""
        count = min(count, len(self.source), len(self.target))
        rows = (torch.tensor(_spread(count, len(side))) for side in (self.source, self.target))
        return self._batch(*rows, torch.arange(count), 0, count)
