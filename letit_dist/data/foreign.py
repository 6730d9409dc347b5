"""Other people's shards, without an index: streamed through `webdataset`, so a resume is approximate."""

from __future__ import annotations

import glob
import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from letit_dist.data import transforms
from letit_dist.data.batch import BadSamples, ImageBatch, augment, stack
from letit_dist.data.index import INDEX_NAME, JOURNAL_NAME
from letit_dist.data.loading import Failure, loader, unwrap
from letit_dist.data.order import permutation, rank_positions
from letit_dist.data.remote import is_url
from letit_dist.data.sizes import choose, images_of
from letit_dist.data.transforms import IMAGE_EXTENSIONS, UnreadableImage
from letit_dist.errors import UserError
from letit_dist.rng import seed_for

SHUFFLE = 200  # encoded samples a worker holds to mix neighbours


def is_foreign(path: str | Path) -> bool:
    """A tar or a pattern, here or on a server, or a folder of tars that never had an index."""
    folder = Path(path)
    if folder.is_dir():
        known = (folder / INDEX_NAME).exists() or (folder / JOURNAL_NAME).exists()
        return not known and any(folder.glob("*.tar"))
    return str(path).endswith(".tar") or any(c in str(path) for c in "*?[{")


def expand(paths: Sequence[str | Path]) -> list[str]:
    """Patterns, braces and folders -> shard names, sorted within each; raises UserError where nothing is found."""
    import braceexpand

    shards: list[str] = []
    for path in map(str, paths):
        if Path(path).is_dir():
            found = sorted(map(str, Path(path).glob("*.tar")))
        elif is_url(path):
            found = list(braceexpand.braceexpand(path))
        else:
            names = list(braceexpand.braceexpand(path))
            found = [shard for name in names for shard in (sorted(glob.glob(name)) if "*" in name else [name])]
        missing = [shard for shard in found if not is_url(shard) and not Path(shard).is_file()]
        if missing or not found:
            raise UserError(f"no such tar: {missing[0] if missing else path}")
        shards += found
    return shards


class _Stream(IterableDataset["ImageBatch | Failure"]):
    """Endless ImageBatches of one (rank, worker): every so many-th shard of an order that changes each epoch."""

    def __init__(self, shards: list[str], options: dict[str, Any]):
        self.shards, self.options = shards, options

    def _urls(self, part: int, parts: int) -> Iterator[dict[str, str]]:
        # `start` is in the purpose: a resumed run must not begin again with the shards it began with.
        purpose = f"foreign shards from {self.options['start']}"
        for epoch in count():
            for shard in permutation(self.options["seed"], epoch, len(self.shards), purpose)[part::parts]:
                yield {"url": self.shards[shard]}

    def __iter__(self) -> Iterator[ImageBatch | Failure]:
        try:
            yield from self._batches()
        except UserError as error:
            yield Failure(str(error))

    def _batches(self) -> Iterator[ImageBatch]:
        import webdataset as wds

        o = self.options
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        part, parts = o["rank"] * workers + worker, o["world"] * workers
        bad: list[tuple[str, str]] = []
        fruitless = [0]

        def note(key: str, reason: str) -> None:
            bad.append((key, reason))
            fruitless[0] += 1
            if fruitless[0] > 1000:
                raise UserError(f"1000 samples in a row cannot be read, the last: {key} ({reason})")

        def damaged(error: Exception) -> bool:
            note(str(error.args[-1]) if error.args else "a shard", f"{type(error).__name__}: {error.args[:1]}")
            return True

        samples = wds.DataPipeline(
            lambda: self._urls(part, parts),
            wds.tarfile_to_samples(handler=damaged),
            wds.shuffle(SHUFFLE, rng=random.Random(seed_for(o["seed"], f"foreign {o['start']}", part))),
        )
        share = o["batch"] // o["world"]
        size = None
        pixels: list[Tensor] = []
        turn = worker  # the loader asks its workers in turn, so the global batch of each answer is known
        for sample in samples:
            key = sample["__key__"]
            images = images_of(sample)
            if images is None:
                found = sum(name.rpartition(".")[2] in IMAGE_EXTENSIONS for name in sample)
                note(key, f"{found} images in one sample")
                continue
            try:
                image = transforms.decode(sample[images[choose(images, o["resolution"])]])
            except UnreadableImage as error:
                note(key, str(error))
                continue
            fruitless[0] = 0
            size = size or image.shape
            if image.shape != size:
                (_, h, w), (_, height, width) = image.shape, size
                where = f"{sample['__url__']}: {key}"
                raise UserError(f"{where}: the image is {w}x{h}, the others are {width}x{height}: one size is needed")
            pixels.append(transforms.resize_crop(image, o["resolution"]) if o["resolution"] else image)
            if len(pixels) == share:
                at = rank_positions(o["start"] + turn * o["batch"], o["batch"], o["rank"], o["world"])
                positions = torch.from_numpy(at)
                augmented = augment(stack(pixels), positions, o["seed"], o["flip"], o["grayscale"])
                yield ImageBatch(augmented, positions, list(bad))
                bad.clear()
                pixels.clear()
                turn += workers


class ForeignStream:
    """The interface of ImageStream over tars without an index; see `notice`."""

    notice = (
        "these shards have no index.json: samples come in an approximate order that depends on ranks and workers, "
        "and a resumed run does not continue exactly (python shards/check.py FOLDER --write-index makes an index)"
    )

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        flip: bool = False,
        grayscale: float = 0.0,
        max_bad_fraction: float = 0.01,
        start: int = 0,
        resolution: int | None = None,
    ):
        rank_positions(start, batch, rank, world)
        shards = expand(paths)
        readers = world * max(1, workers)
        if len(shards) < readers:
            raise UserError(
                f"{len(shards)} shards without an index cannot feed {world} ranks x {max(1, workers)} workers: "
                f"use {len(shards) // world} workers or fewer, or index them (shards/check.py --write-index)"
                if len(shards) >= world
                else f"{len(shards)} shards without an index cannot feed {world} ranks: "
                "index them (python shards/check.py FOLDER --write-index)"
            )
        self.bad = BadSamples(max_bad_fraction)
        self.size: tuple[int, int] | None = None
        options = dict(
            seed=seed,
            batch=batch,
            rank=rank,
            world=world,
            flip=flip,
            grayscale=grayscale,
            start=start,
            resolution=resolution,
        )
        self._loader = loader(_Stream(shards, options), None, workers, pin=True)

    def __iter__(self) -> Iterator[ImageBatch]:
        for item in unwrap(iter(self._loader)):
            size = tuple(item.pixels.shape[2:])
            if self.size not in (None, size):
                raise UserError(f"images of {self.size} and of {size} (H, W) in these shards: one size is needed")
            self.size = size
            yield item
