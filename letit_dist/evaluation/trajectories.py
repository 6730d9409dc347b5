"""Trajectories (LETIT, figure 8): every step of a chain decoded, beside the energy it has come down to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from letit_dist.data.inputs import Images
from letit_dist.data.progress import Progress
from letit_dist.data.transforms import to_images, to_pixels
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.energy_run import EnergyRun
from letit_dist.evaluation.figures import energy_curve, need_matplotlib
from letit_dist.evaluation.translating import TranslateOptions
from letit_dist.files import write_atomically
from letit_dist.pictures import beside, captioned, save_frames, save_picture, stacked, visible_size

ANIMATIONS = ("gif", "webp")
_FILM = 256  # pixels a side, at least: what stands below the image must be read while it moves


@dataclass(frozen=True)
class Trajectory:
    """One image's way: T'+1 points, the reconstruction first."""

    name: str
    steps: list[float]  # 0, 1, ..., and the strength's fraction of one more
    energies: list[float]  # E(z_t)
    frames: list[Tensor]  # pixels (3, H, W) on the CPU

    def caption(self, point: int, separator: str = "\n") -> str:
        return f"step {self.steps[point]:g}{separator}E {self.energies[point]:.4g}"


def follow(
    translator: Translator, name: str, pixels: Tensor, place: int, options: TranslateOptions | None = None
) -> Trajectory:
    """Pixels (3, H, W) of one image along its chain; its noise belongs to `place`, as in launch/translate.py."""
    options = options or TranslateOptions()
    _, whole, fraction = translator.chain(**options.chain)
    steps = [float(step) for step in range(whole + 1)] + ([whole + fraction] if fraction else [])
    noise = translator.autoencoder.decoder_noise(options.seed, [place])
    energies, frames = [], []

    @torch.no_grad()
    def watch(latents: Tensor) -> None:
        energies.append(float(translator.energy(latents)))
        # As pixels, and away from the GPU: 20 frames of 1024 pixels are 63 MB so, 252 as floats.
        frames.append(to_pixels(translator.decode(latents, noise=noise))[0].cpu())

    start = translator.encode(to_images(pixels[None].to(translator.device)))
    translator.transport(start, **options.chain, noise=translator.noise(options.seed, [place]), watch=watch)
    return Trajectory(name, steps, energies, frames)


def spread(count: int, columns: int) -> list[int]:
    """At most `columns` (two or more) of `count` places, evenly spread, the first and the last among them."""
    if count <= columns:
        return list(range(count))
    return [round(column * (count - 1) / (columns - 1)) for column in range(columns)]


def check_trajectories(translator: Translator, options: TranslateOptions, columns: int, animation: str) -> None:
    """Raise UserError for settings out of range."""
    if columns < 2:
        raise UserError(f"--columns must be at least 2, the first and the last step, got {columns}")
    if animation not in ANIMATIONS:
        raise UserError(f"--animation {animation}: known are {', '.join(ANIMATIONS)}")
    translator.chain(**options.chain)


def write_trajectories(
    run: EnergyRun,
    images: Images,
    out: Path,
    options: TranslateOptions,
    *,
    columns: int = 8,
    animation: str = "gif",
) -> Iterator[str]:
    """Follow every image; yields lines that say what was written.

    OUT/NAME.gif (or .webp) has every step of one image, OUT/trajectories.png at most `columns` of each with the
    curve of its energy, OUT/trajectories.jsonl all energies. One image is in work at a time, and only the columns
    of those before it are kept.
    """
    need_matplotlib()
    check_trajectories(run.translator, options, columns, animation)
    cell = visible_size(run.translator.autoencoder.config.resolution, _FILM)
    found: list[Trajectory] = []
    with Progress("following", len(images)) as progress:
        for place, (name, pixels) in enumerate(images):
            way = follow(run.translator, name, pixels, place, options)
            title = run.title(options.seed, "\n")
            captions = [f"{title}\n{way.caption(t, '   ')}" for t in range(len(way.frames))]
            film = (
                captioned([frame], [text], cell=cell, among=captions)
                for frame, text in zip(way.frames, captions, strict=True)
            )
            save_frames(film, len(captions), out / f"{name}.{animation}", milliseconds=200)
            chosen = spread(len(way.frames), columns)
            found.append(replace(way, frames=[way.frames[t] for t in chosen]))
            progress.step(1)
    for name, reason in images.bad:
        yield f"left out: {name}: {reason}"
    save_picture(_sheet(found, run.title(options.seed), columns), out / "trajectories.png")
    record = run.record(options.seed)
    lines = [json.dumps({"image": way.name, "steps": way.steps, "energies": _finite(way), **record}) for way in found]
    write_atomically(out / "trajectories.jsonl", "".join(line + "\n" for line in lines).encode())
    for way in found:
        yield f"{way.name}: E {way.energies[0]:.4g} to {way.energies[-1]:.4g} in {way.steps[-1]:g} steps"
    yield f"animations: {out}/*.{animation}"
    yield f"figure: {out / 'trajectories.png'}"


def _finite(way: Trajectory) -> list[float | None]:
    """JSON has no word for what a chain that diverges ends in."""
    return [value if math.isfinite(value) else None for value in way.energies]


def _sheet(ways: list[Trajectory], title: str, columns: int) -> Image.Image:
    cell = visible_size(ways[0].frames[0].shape[-1])
    finite = [value for way in ways for value in way.energies if math.isfinite(value)]
    limits = (min(finite), max(finite)) if finite else (0.0, 1.0)
    rows = {}
    for way in ways:
        chosen = spread(len(way.steps), columns)
        pictures = captioned(way.frames, [way.caption(t) for t in chosen], cell=cell)
        rows[way.name] = beside([pictures, energy_curve(way.steps, way.energies, chosen, limits, pictures.height)])
    return stacked(rows, title, size=cell // 8)
