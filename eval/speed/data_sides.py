"""Both sides of `throughput.py data`: the usual image folder through Pillow, and our shards, on pictures made here.

A picture is noise with the spectrum of photographs, hard edges and plain areas, blurred a little as a lens does. As a
JPEG of quality 95, 4:4:4, 1024 pixels, it is what shards/README.md has of real 1024-pixel faces: 49 dB from its source
(faces 49.8), and half as many bytes again for 512, 256 and 128 together (faces 51 %).
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms as usual_transforms
from torchvision.datasets import ImageFolder

from letit_dist.data.index import Index, Shard
from letit_dist.data.packing import PackOptions, pack
from letit_dist.data.reader import ImageStream, ShardDataset
from letit_dist.data.source_base import Request
from letit_dist.data.sources import open_source
from letit_dist.data.transforms import decode, default_quality, encode, resize_crop, to_images
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError
from letit_dist.evaluation.benchmark import Side
from letit_dist.memory import resident_bytes

LARGE, SMALL = 1024, 256


def _noise(draw: np.random.Generator, side: int, slope: float) -> np.ndarray[Any, Any]:
    """(side, side) with unit deviation, whose amplitude falls with frequency to the power `slope`."""
    frequency = np.maximum(np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]), 1 / side)
    waves = draw.normal(size=(2, *frequency.shape)) / frequency**slope
    field = np.fft.irfft2(waves[0] + 1j * waves[1], s=(side, side))
    return field / field.std()


def picture(number: int, side: int = LARGE) -> Tensor:
    """A picture as this module says, uint8 (3, side, side); the same for the same number."""
    draw = np.random.default_rng(number)
    shape, shadow, texture = (_noise(draw, side, 2.5) for _ in range(3))
    luma = 35 * _noise(draw, side, 1.6) + 40 * (shape > 0.3) + 40 * (shadow > 0.8)
    luma += 30 * np.clip(texture, 0, None) * _noise(draw, side, 1.0)
    # A lens: little is left at the frequencies that a sensor could still hold.
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    luma = np.fft.irfft2(np.fft.rfft2(luma) * np.exp(-((frequency / 0.2) ** 2)), s=(side, side))
    tint = np.stack([12 * _noise(draw, side, 2.5) for _ in range(3)])
    grain = 0.3 * draw.normal(size=(side, side))
    return torch.from_numpy(np.clip(98 + luma + tint + grain, 0, 255).astype(np.uint8))


def box(pixels: Tensor, resolution: int) -> Tensor:
    """Averages of uint8 (3, H, W), rounded as torch rounds."""
    return F.avg_pool2d(pixels.float(), pixels.shape[-1] // resolution).round().to(torch.uint8)


def psnr(found: Tensor, expected: Tensor) -> float:
    """dB between two sets of pixels."""
    error = (found.double() - expected.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


@dataclass
class DataSides:
    """The same JPEG files as a folder of files and as shards, with and without 256 pixels beside them."""

    folder: Path
    count: int
    batch: int
    side: int = LARGE

    def __post_init__(self) -> None:
        self.small = self.side * SMALL // LARGE
        files = self.folder / "files" / "all"
        files.mkdir(parents=True)
        both, only = (
            ShardWriter(self.folder / name, meta={"resolution": self.side, "pack": {"format": "jpeg"}, **more})
            for name, more in (("both", {"resolutions": [self.side, self.small]}), ("only", {}))
        )
        self.bytes = 0
        with both, only:
            for number in range(self.count):
                pixels = picture(number, self.side)
                data = encode(pixels, "jpeg", 95)
                self.bytes += len(data)
                (files / f"{number:05d}.jpg").write_bytes(data)
                reduced = encode(box(_pillow(data), self.small), "jpeg", default_quality(self.small))
                both.write(f"{number:05d}", {f"{self.side}.jpg": data, f"{self.small}.jpg": reduced})
                only.write(f"{number:05d}", {"jpg": data})

    def _truth(self) -> list[Tensor]:
        return [_pillow(path.read_bytes()) for path in sorted((self.folder / "files/all").iterdir())]

    def dataset(self, name: str, scaled_decode: bool = False) -> ShardDataset:
        """Shards "both" (1024 and 256) or "only" (1024)."""
        return ShardDataset([self.folder / name], scaled_decode=scaled_decode)

    def usual(self, resolution: int) -> Side:
        """ImageFolder, Pillow, Resize, ToTensor, and DataLoader's batches: float (B, 3, R, R) in [0, 1]."""
        steps = [] if resolution == self.side else [usual_transforms.Resize(resolution)]
        folder = ImageFolder(
            str(self.folder / "files"), usual_transforms.Compose([*steps, usual_transforms.ToTensor()])
        )

        def run() -> None:
            for _ in DataLoader(folder, batch_size=self.batch):
                pass

        return Side(run)

    def ours(self, name: str, resolution: int, *, scaled_decode: bool = False, floats: bool = False) -> Side:
        """The training stream over as many images: uint8 (B, 3, R, R), with `floats` images in [-1, 1]."""
        dataset = self.dataset(name, scaled_decode)
        # One stream for all runs: training opens it once, while an epoch of the usual loader is a new iterator.
        stream = iter(ImageStream(dataset, seed=0, batch=self.batch, resolution=resolution))

        def run() -> None:
            for _ in range(self.count // self.batch):
                pixels = next(stream).pixels
                if floats:
                    to_images(pixels)

        return Side(run)

    def equal(self, name: str, resolution: int) -> Callable[[], str]:
        """Our pixels are Pillow's, averaged by `box` where they are reduced; raises UserError where they are not."""

        def agree() -> str:
            dataset = self.dataset(name)
            for number, pixels in enumerate(self._truth()):
                expected = pixels if resolution == self.side else box(pixels, resolution)
                if not torch.equal(dataset.pixels(number, resolution), expected):
                    raise UserError(f"{dataset.place(number)}: other pixels at {resolution} than Pillow's")
            return "equal pixels"

        return agree

    def close(self, name: str, resolution: int, least: float, *, scaled_decode: bool = False) -> Callable[[], str]:
        """Our pixels are at least `least` dB from `box`'s; raises UserError where they are not."""

        def agree() -> str:
            dataset = self.dataset(name, scaled_decode)
            found = torch.stack([dataset.pixels(number, resolution) for number in range(self.count)])
            distance = psnr(found, torch.stack([box(pixels, resolution) for pixels in self._truth()]))
            if distance < least:
                raise UserError(f"{name} at {resolution}: {distance:.1f} dB from the box filter, expected {least:g}")
            return f"{distance:.1f} dB from the box filter"

        return agree


@dataclass
class PackingSides:
    """Packing a folder of files into squares of `side` pixels with `small` ones beside them, in one process: the work
    on pixels alone, as plain calls, against all of it."""

    files: Path
    out: Path
    side: int
    small: int
    count: int = 0

    def pixels_alone(self) -> list[dict[str, bytes]]:
        """Decodes, reduces and encodes every file in memory; by file, extension -> bytes."""
        samples = []
        for path in sorted(self.files.iterdir()):
            square = resize_crop(decode(path.read_bytes()), self.side)
            squares = {side: resize_crop(square, side) for side in (self.side, self.small)}
            samples.append({f"{side}.jpg": encode(pixels, "jpeg", None) for side, pixels in squares.items()})
        return samples

    def written_alone(self, samples: list[dict[str, bytes]]) -> None:
        """Shards of these samples: what the one process that writes does for all that prepare them."""
        with ShardWriter(self._fresh()) as writer:
            for number, files in enumerate(samples):
                writer.write(f"{number:05d}", {**files, "json": b"{}"}, position=number)

    def _fresh(self) -> Path:
        self.count += 1
        return self.out / str(self.count)

    def whole(self) -> Path:
        """The shards, in a folder of their own."""
        (part,) = open_source(str(self.files), Request(resolution=self.side))
        options = PackOptions(resolution=self.side, smaller=(self.small,), format="jpeg")
        with contextlib.redirect_stderr(io.StringIO()):
            return pack(part, self._fresh(), options).folder

    def require_equal(self) -> None:
        """Raises UserError where the shards hold other images."""
        index = Index.read(self.whole())
        for number, expected in enumerate(self.pixels_alone()):
            for extension, data in expected.items():
                start, size = index.files(number)[extension]
                shard = index.path_of(number)
                assert isinstance(shard, Path)
                if shard.read_bytes()[start : start + size] != data:
                    raise UserError(f"packing wrote other bytes: sample {number}, {extension}")


def _pillow(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def large_index(folder: Path, entries: int) -> Path:
    """A folder whose index has so many samples of four sizes and a json, in shards that hold no bytes."""
    names = ["json", *(f"{side}.jpg" for side in (128, 256, 512, LARGE))]
    sizes = [512, 6_000, 20_000, 70_000, 250_000]
    places, at = {}, 512
    for name, size in zip(names, sizes, strict=True):
        places[name] = (at, size)
        at += 1024 + size
    folder.mkdir()
    shards: list[Shard] = []
    samples = []
    for first in range(0, entries, 3000):
        keys = range(first, min(first + 3000, entries))
        shard = Shard(f"shard-{len(shards):05d}.tar", at * len(keys), "0" * 64, len(keys))
        with (folder / shard.name).open("wb") as stream:
            stream.truncate(shard.bytes)  # sparse: takes no space
        shards.append(shard)
        for number, key in enumerate(keys):
            samples.append((f"{key:05d}", {n: (o + at * number, s) for n, (o, s) in places.items()}))
    Index(folder, "images", shards, samples, {"resolution": LARGE}).write()
    return folder


def resident_over(folder: Path, samples: int, points: int = 5) -> list[tuple[int, int]]:
    """(samples read, resident bytes of this process) at even distances, over a small set read again and again."""
    with ShardWriter(folder, meta={"resolution": 16}) as writer:
        for number in range(1000):
            writer.write(f"{number:04d}", {"png": encode(picture(number, 16), "png"), "json": b"{}"})
    batch = 50
    stream = iter(ImageStream(ShardDataset([folder]), seed=0, batch=batch, flip=True))
    seen, read = [], 0
    for point in range(points + 1):
        while read < samples * point // points or read < 1000:  # what is made once is there after one epoch
            next(stream)
            read += batch
        gc.collect()
        seen.append((read, resident_bytes()))
    return seen
