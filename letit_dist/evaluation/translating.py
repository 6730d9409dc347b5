"""Translating many images into a folder: files, trajectories and sheets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor

from letit_dist.data.inputs import Images, ahead
from letit_dist.data.progress import Progress
from letit_dist.data.transforms import picture_pixels, resize_crop, to_images, to_pixels
from letit_dist.energy.classifier import LatentClassifier
from letit_dist.energy.translate import METHOD, Translator
from letit_dist.files import require_folder
from letit_dist.memory import MemoryPlan, plan_memory
from letit_dist.pictures import grid, save_animation, save_picture, strip, to_picture, visible_size

_SHEET_COLUMNS = 8
_WRITERS = 4  # threads, at most: a picture of 1024 pixels takes a core longer than a GPU needs to make one


class ChainSettings(TypedDict):
    """Of one chain; None = as the energy was trained."""

    steps: int | None
    step_size: float | None
    strength: float


@dataclass(frozen=True)
class TranslateOptions:
    """What to write; None = as the energy was trained."""

    steps: int | None = None
    step_size: float | None = None
    strength: float = 1.0
    path: bool = False
    sheet: bool = False
    format: str = "png"
    batch: int = 16
    seed: int = 0
    classifier: LatentClassifier | None = None  # a chain stops where this says that it has arrived

    @property
    def chain(self) -> ChainSettings:
        """How far to walk, as `Translator.transport` and `Translator.chain` take it."""
        return {"steps": self.steps, "step_size": self.step_size, "strength": self.strength}


@dataclass(frozen=True)
class _Chunk:
    """Pixels uint8 of what came out for B images, on the CPU."""

    images: Tensor  # (B, 3, H, W)
    reconstructions: Tensor | None  # (B, 3, H, W), for a sheet
    frames: list[Tensor]  # T'+1 of (B, 3, H, W), for a path
    steps: list[int]  # B, how many steps each chain took


@torch.no_grad()
def _translate(translator: Translator, pixels: Tensor, places: Sequence[int], options: TranslateOptions) -> _Chunk:
    """Pixels uint8 (B, 3, H, W) of the images at these places among the readable ones, to all that is to be written."""
    noise = translator.autoencoder.decoder_noise(options.seed, places)
    frames: list[Tensor] = []
    result = translator.translate(
        to_images(pixels.to(translator.device)),
        steps=options.steps,
        step_size=options.step_size,
        strength=options.strength,
        noise=translator.noise(options.seed, places),
        decoder_noise=noise,
        on_frame=(lambda frame: frames.append(to_pixels(frame).cpu())) if options.path else None,
        until=options.classifier.is_target if options.classifier else None,
    )
    images, source, steps = to_pixels(result.images).cpu(), result.source_latents, result.steps.tolist()
    del result  # the images as floats, before others are decoded
    again = to_pixels(translator.decode(source, noise=noise)).cpu() if options.sheet else None
    return _Chunk(images, again, frames, steps)


def translate_picture(
    translator: Translator,
    picture: Image.Image,
    *,
    strength: float = 1.0,
    steps: int | None = None,
    step_size: float | None = None,
    seed: int = 0,
) -> Image.Image:
    """A picture, cropped to its centred square and resized as the programs do, to its translation.

    Settings are those of `Translator.transport`; `seed` is of the noise of chain and decoder, where they have any.
    Raises UserError for a picture that cannot be read and settings out of range.
    """
    pixels = resize_crop(picture_pixels(picture), translator.autoencoder.config.resolution)
    options = TranslateOptions(steps=steps, step_size=step_size, strength=strength, seed=seed)
    return to_picture(_translate(translator, pixels[None], [0], options).images[0])


def plan_translation(translator: Translator, count: int, options: TranslateOptions, budget: int) -> MemoryPlan:
    """How many images go through at once within `budget` bytes: at most `options.batch`, and `count`.

    Translates grey images with two steps of the chain to see what that takes. What decoding a large photograph
    takes on the way in is not counted. Raises UserError for settings out of range and a budget too small for one.
    """
    _, whole, fraction = translator.chain(steps=options.steps, step_size=options.step_size, strength=options.strength)
    side = translator.autoencoder.config.resolution
    grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    # The second step runs beside what the first one left behind; a third one takes no more.
    brief = replace(options, steps=min(2, whole + (fraction > 0)), strength=1.0)
    drawn = 3 * visible_size(side) ** 2
    frames = whole + (fraction > 0) + 1 if options.path else 0
    waiting = _SHEET_COLUMNS - 1 if options.sheet else 0
    sheet = 3 * waiting * 3 * side**2 + (3 * _SHEET_COLUMNS * drawn if options.sheet else 0)
    return plan_memory(
        lambda images: _translate(translator, grey.repeat(images, 1, 1, 1), range(images), brief),
        modules=(translator.autoencoder, translator.energy),
        most=min(options.batch, count),
        budget=budget,
        precision=translator.precision,
        device=translator.device,
        # One chunk is read, one is worked on, and the one before is made into pictures, all at the same time.
        kept=3 * side**2 * (3 + 2 * frames + 4 * options.sheet),
        beside=frames * drawn + sheet,
    )


def translate_all(
    translator: Translator, images: Images, out: Path, options: TranslateOptions, budget: int | None = None
) -> Iterator[str]:
    """Translate every image into `out`, chunk by chunk; yields lines that say what was written.

    Within `budget` bytes, if given, chunks are as small as `plan_translation` says, and the plan is the first line.
    The next chunk is read and the one before is written while one is worked on, and no more than that: memory does
    not grow with the number of images. Noise, of the chain or of the decoder, belongs to the image's place among the
    readable ones, so a chunk size changes nothing beyond rounding.
    """
    require_folder(out, "--out")
    chunk = options.batch
    if budget is not None:
        planned = plan_translation(translator, len(images), options, budget)
        chunk = planned.images
        yield str(planned)
    _, whole, fraction = translator.chain(**options.chain)
    last = whole + (fraction > 0)
    source = ahead(iter(images), chunk)
    done = 0
    sheets: list[Path] = []
    steps: list[int] = []
    waiting: dict[str, list[Tensor]] = {"source": [], "reconstruction": [], METHOD: []}
    with _Writers(_writers(options)) as writers, Progress("translating", len(images)) as progress:
        while batch := list(islice(source, chunk)):
            names, pixels = [name for name, _ in batch], torch.stack([p for _, p in batch])
            result = _translate(translator, pixels, range(done, done + len(batch)), options)
            writers.write(partial(_write, name, result, row, out, options, last) for row, name in enumerate(names))
            steps += result.steps
            if result.reconstructions is not None:
                waiting["source"] += pixels
                waiting["reconstruction"] += result.reconstructions
                waiting[METHOD] += result.images
                while len(waiting["source"]) >= _SHEET_COLUMNS:
                    sheets.append(_sheet(waiting, out, len(sheets)))
            done += len(batch)
            progress.step(len(batch))
            del result  # or it would stay beside the next one
    if waiting["source"]:
        sheets.append(_sheet(waiting, out, len(sheets)))
    for name, reason in images.bad:
        yield f"left out: {name}: {reason}"
    if options.classifier and steps:
        whole = translator.chain(steps=options.steps, step_size=options.step_size)[1]
        early = sum(count < whole for count in steps)
        yield f"{early} of {done} chains arrived before their end; {sum(steps) / done:.1f} of {whole} steps on average"
    yield f"{done} translations in {out}" + (f", {len(images.bad)} unreadable images left out" if images.bad else "")
    if options.path:
        yield f"trajectories: {out / 'paths'}"
    if sheets:
        yield f"sheets: {sheets[0]}" + (f" to {sheets[-1].name}" if len(sheets) > 1 else "")


def _sheet(waiting: dict[str, list[Tensor]], out: Path, number: int) -> Path:
    path = out / "sheets" / f"sheet-{number:04d}.png"
    picture = grid({name: images[:_SHEET_COLUMNS] for name, images in waiting.items()})
    for images in waiting.values():
        del images[:_SHEET_COLUMNS]
    save_picture(picture, path)
    return path


def _write(name: str, result: _Chunk, row: int, out: Path, options: TranslateOptions, last: int) -> None:
    """All files of one image; a chain that does not arrive before takes `last` steps."""
    quality = {"quality": 95, "subsampling": 0} if options.format == "jpg" else {}
    save_picture(to_picture(result.images[row]), out / f"{name}.{options.format}", **quality)
    if result.frames:
        frames = [frame[row] for frame in result.frames]
        names = ["reconstruction", *(f"step {step}" for step in range(1, len(frames)))]
        if options.strength < 1 and result.steps[row] == last > 0:
            # It may lie between two steps.
            names[-1] = f"strength {options.strength:g}"
        save_picture(strip(frames, names=names), out / "paths" / f"{name}.png")
        save_animation(frames, out / "paths" / f"{name}.gif")


def _writers(options: TranslateOptions) -> int:
    # Of a path every frame is drawn before it is written: one at a time.
    return 1 if options.path else min(_WRITERS, os.cpu_count() or 1)


class _Writers:
    """Threads that write one chunk while the next one is worked on. What writing raises comes with the next chunk, or
    at the end."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="write")
        self._waiting: list[Future[None]] = []

    def write(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Begin with a chunk, when the one before is written."""
        self._finish()
        self._waiting = [self._pool.submit(job) for job in jobs]

    def _finish(self) -> None:
        for future in self._waiting:
            future.result()
        self._waiting = []

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
