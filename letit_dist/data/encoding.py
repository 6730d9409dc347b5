"""Encoding a domain once: image shards in, latent shards out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from letit_dist import rng
from letit_dist.config import differences
from letit_dist.data.folders import FolderDataset
from letit_dist.data.index import INDEX_NAME, Index
from letit_dist.data.latents import LatentWriter
from letit_dist.data.progress import Progress
from letit_dist.data.reader import ShardDataset, chunks
from letit_dist.data.transforms import to_images
from letit_dist.errors import UserError
from letit_dist.memory import MemoryPlan, Precision, Weighted, lowered, plan_memory
from letit_dist.pretrained import tensors_fingerprint

Encoded = dict[str, dict[str, Tensor]]  # view -> field -> rows

T = TypeVar("T")

_READ_AHEAD = 4  # batches that the loader keeps ready for each worker


class Encoder(Weighted, Protocol):
    """What encoding needs of an autoencoder."""

    config: Any
    stores_codes: ClassVar[bool]

    @property
    def codebook_size(self) -> int: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def encode_codes(self, images: Tensor) -> dict[str, Tensor]: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class EncodeOptions:
    """How a domain is encoded; views, seed, dtype and precision decide the result and are kept in the index."""

    flip: bool = False
    crops: int = 0
    seed: int = 0
    dtype: str = "float32"
    batch: int = 64
    workers: int = 0
    shard_bytes: int = 1 << 28
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        problems = []
        if self.crops < 0:
            problems.append(f"--crops {self.crops}: 0 or more")
        if self.seed and not self.crops:
            problems.append("--seed has no effect without --crops: leave it out")
        if self.batch < 1:
            problems.append(f"--batch {self.batch}: 1 or more")
        if self.workers < 0:
            problems.append(f"--workers {self.workers}: 0 or more")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def views(self) -> list[str]:
        """Names of the views of an image; the plain one has no name."""
        return ["", *(["flip"] if self.flip else []), *(f"crop{i}" for i in range(self.crops))]


def random_crop(pixels: Tensor, seed: int, purpose: str, sample: int) -> Tensor:
    """A crop of uint8 (3, H, W) at its own size: area 0.8 to 1.0, aspect ratio 0.9 to 1.1, mirrored with
    probability 1/2, as the published code augments stage 2 (there anew in every step, here once)."""
    area, ratio, x, y, mirror = torch.rand(5, generator=rng.generator(seed, purpose, sample)).tolist()
    side = pixels.shape[-1]
    scale = math.sqrt(0.8 + 0.2 * area)
    aspect = math.sqrt(math.exp(math.log(0.9) + (math.log(1.1) - math.log(0.9)) * ratio))
    width, height = (min(side, round(side * scale * a)) for a in (aspect, 1 / aspect))
    left, top = round(x * (side - width)), round(y * (side - height))
    crop = F.resized_crop(pixels, top, left, height, width, [side, side], antialias=True)
    return crop.flip(-1) if mirror < 0.5 else crop


def _view(pixels: Tensor, samples: Tensor, name: str, seed: int) -> Tensor:
    if name == "":
        return pixels
    if name == "flip":
        return pixels.flip(-1)
    return torch.stack([random_crop(p, seed, name, int(s)) for p, s in zip(pixels, samples, strict=True)])


def _codebook_size(autoencoder: Encoder) -> int | None:
    return autoencoder.codebook_size if autoencoder.stores_codes else None


@dataclass(frozen=True)
class Ranks:
    """The processes that encode together. `gather(mine)` gives what all gave, in order of their ranks."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]

    def share(self, work: Callable[[], T]) -> list[T]:
        """What `work()` gave on every rank; a UserError of one is everybody's, so that nobody waits for it."""
        problem, mine = None, None
        try:
            mine = work()
        except UserError as error:
            problem = str(error)
        try:
            outcomes = self.gather((problem, mine))
        except RuntimeError as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"lost the other ranks ({said}): the same command continues after the last whole shard"
            ) from None
        if problems := [found for found, _ in outcomes if found is not None]:
            raise UserError("\n".join(dict.fromkeys(problems)))
        return [found for _, found in outcomes]


@torch.no_grad()
def encode_domain(
    autoencoder: Encoder,
    dataset: ShardDataset | FolderDataset,
    out: Path,
    options: EncodeOptions,
    *,
    domain: str | None = None,
    device: torch.device | str = "cpu",
    budget: int | None = None,
    say: Callable[[str], object] = print,
    ranks: Ranks | None = None,
) -> str:
    """Write the latents (or codes) of every image and view to `out`; returns one line that says what was done.

    Within `budget` bytes, if given, no more images go through at once than `plan_encoding` says; `say` gets the
    plan before the work. Finished folders are recognised, interrupted ones continued, with any number at once.
    The images go through the ranks in turns, and rank 0 writes: any number of ranks gives the same bytes.
    Raises UserError, on every rank, if `out` holds something else, if the images are of another size than the
    autoencoder's, and for an image that cannot be read.
    """
    ranks = ranks or Ranks()
    side = autoencoder.config.resolution
    dataset = dataset.require_side(side)
    meta = {
        "domain": domain or dataset.domain,
        "split": dataset.split,
        "resolution": side,
        "views": options.views,
        "crop_seed": options.seed if options.crops else None,
        "images": len(dataset),
        "image_shards": tensors_fingerprint({"shards": dataset.stamp()}, {}),
        # Absent where it is float32: so were they written before there was a choice.
        **({} if options.precision == "fp32" else {"precision": options.precision}),
    }
    fingerprint = autoencoder.fingerprint()
    kind = "codes" if autoencoder.stores_codes else "latents"
    if kind == "codes" and options.dtype != "float32":
        raise UserError(f"--dtype {options.dtype} has no effect here: codes are whole numbers, and exact; leave it out")

    def already() -> str | None:
        if ranks.rank > 0 or not (out / INDEX_NAME).exists():
            return None
        dtype = {} if kind == "codes" else {"dtype": options.dtype}
        wanted = {"kind": kind, "autoencoder_fingerprint": fingerprint, "precision": None, **dtype, **meta}
        return _already(Index.read(out), wanted)

    if done := ranks.share(already)[0]:
        return done
    chunk = options.batch
    if budget is not None:
        # The smallest of all ranks': how many go through at once decides the last bits of a latent.
        plans = ranks.share(lambda: plan_encoding(autoencoder, len(dataset), options, budget, device))
        smallest = min(plans, key=lambda plan: plan.images)
        chunk = smallest.images
        if ranks.rank == 0:
            say(str(smallest))

    with contextlib.ExitStack() as stack:
        writer: LatentWriter | None = None

        def begin() -> int:
            nonlocal writer
            if ranks.rank > 0:
                return 0
            writer = LatentWriter(
                out,
                kind=kind,
                autoencoder_fingerprint=fingerprint,
                meta=meta,
                dtype=options.dtype,
                codebook_size=_codebook_size(autoencoder),
                shard_bytes=options.shard_bytes,
            )
            return stack.enter_context(writer).resume_at

        begun = ranks.share(begin)[0]
        progress = Progress(f"encoding {meta['domain']}", len(dataset), done=begun // len(options.views))
        if writer:
            stack.enter_context(progress)
        firsts = range(0, len(dataset), chunk)
        cuts = [np.arange(first, min(first + chunk, len(dataset))) for first in firsts]
        # The same cuts as of a run that was never interrupted: what goes through together decides the last bits.
        cuts = [cut for cut in cuts if (cut[-1] + 1) * len(options.views) > begun]
        read = chunks(dataset, cuts[ranks.rank :: ranks.world], options.workers)
        encoded: list[tuple[Tensor, Encoded]] = []

        def turn() -> tuple[Tensor, Encoded] | None:
            for done in encoded if writer else ():
                assert writer is not None
                _write(writer, dataset, options, done, begun)
                progress.step((int(done[0][-1]) + 1) - progress.done)
            if (images := next(read, None)) is None:
                return None
            pixels, samples = images
            return samples, _encode_views(autoencoder, pixels, samples, options, device)

        # One more: what the last turn has encoded is written in the one after it.
        for _ in range(-(-len(cuts) // ranks.world) + 1):
            encoded = [found for found in ranks.share(turn) if found is not None]
    each = "1 view" if len(options.views) == 1 else f"{len(options.views)} views"
    return f"{out}: {len(dataset)} images of {meta['domain']} x {each} as {kind}, autoencoder {fingerprint}"


def plan_encoding(
    autoencoder: Encoder, count: int, options: EncodeOptions, budget: int, device: torch.device | str = "cpu"
) -> MemoryPlan:
    """How many images go through at once within `budget` bytes: at most `options.batch`, and `count`.

    Encodes every view of grey images to see what that takes. Raises UserError for a budget too small for one.
    """
    side = autoencoder.config.resolution
    grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    return plan_memory(
        lambda images: _encode_views(autoencoder, grey.repeat(images, 1, 1, 1), torch.arange(images), options, device),
        modules=[autoencoder],
        most=min(options.batch, count),
        budget=budget,
        precision=options.precision,
        device=device,
        kept=3 * side**2 * (1 + _READ_AHEAD * options.workers),
    )


@torch.no_grad()
def _encode_views(
    autoencoder: Encoder, pixels: Tensor, samples: Tensor, options: EncodeOptions, device: torch.device | str
) -> Encoded:
    """View -> field -> rows on the CPU, of pixels uint8 (B, 3, H, W)."""
    with lowered(options.precision, device):
        return {
            name: _encode(autoencoder, _view(pixels, samples, name, options.seed).to(device)) for name in options.views
        }


def _encode(autoencoder: Encoder, pixels: Tensor) -> dict[str, Tensor]:
    images = to_images(pixels)
    if autoencoder.stores_codes:
        return {name: codes.cpu() for name, codes in autoencoder.encode_codes(images).items()}
    latents = autoencoder.encode(images)
    # Numpy, and so the shards, know no bfloat16.
    return {"latent": (latents.float() if latents.dtype == torch.bfloat16 else latents).cpu()}


def _write(
    writer: LatentWriter,
    dataset: ShardDataset | FolderDataset,
    options: EncodeOptions,
    done: tuple[Tensor, Encoded],
    begun: int,
) -> None:
    """Append what was encoded of some samples, from position `begun` on."""
    samples, encoded = done
    for row, sample in enumerate(samples.tolist()):
        for v, name in enumerate(options.views):
            if sample * len(options.views) + v >= begun:
                fields = {field: values[row] for field, values in encoded[name].items()}
                writer.write(dataset.key(sample), fields, json_data=dataset.json(sample), view=name)


def _already(index: Index, wanted: dict[str, Any]) -> str:
    if index.kind == "images":
        raise UserError(f"{index.folder} holds images: choose another folder for the latents with --out")
    found = {name: {**index.meta, "kind": index.kind}.get(name) for name in wanted}
    if changed := differences(found, wanted):
        first = f"{index.folder} holds other latents than asked for: choose another folder with --out, or remove it"
        raise UserError("\n".join([first, *changed]))
    return f"{index.folder}: already encoded by autoencoder {wanted['autoencoder_fingerprint']}, nothing to do"
