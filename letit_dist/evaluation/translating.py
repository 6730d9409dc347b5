"""Translating many images into a folder: files, trajectories and sheets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from letit_dist.data.inputs import Images
from letit_dist.data.progress import Progress
from letit_dist.data.transforms import to_images
from letit_dist.energy.translate import Translation, Translator
from letit_dist.errors import UserError
from letit_dist.pictures import grid, save_animation, save_picture, strip, to_picture

_SHEET_COLUMNS = 8


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


def translate_all(translator: Translator, images: Images, out: Path, options: TranslateOptions) -> Iterator[str]:
    """Translate every image into `out`, batch by batch; yields lines that say what was written.

    Noise, where the chain has any, belongs to the image's place among the readable ones, so a batch size changes
    nothing.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    device = next(translator.autoencoder.parameters()).device
    source = iter(images)
    done, sheets = 0, []
    waiting: dict[str, list] = {"source": [], "reconstruction": [], "translation": []}
    with Progress("translating", len(images)) as progress:
        while batch := list(islice(source, options.batch)):
            names = [name for name, _ in batch]
            pixels = to_images(torch.stack([p for _, p in batch]).to(device))
            result = translator.translate(
                pixels,
                steps=options.steps,
                step_size=options.step_size,
                strength=options.strength,
                keep_path=options.path,
                noise=translator.noise(options.seed, range(done, done + len(batch))),
            )
            _write(names, result, out, options)
            if options.sheet:
                waiting["source"] += pixels.cpu()
                waiting["reconstruction"] += translator.decode(result.source_latents).cpu()
                waiting["translation"] += result.images.cpu()
                while len(waiting["source"]) >= _SHEET_COLUMNS:
                    sheets.append(_sheet(waiting, out, len(sheets)))
            done += len(batch)
            progress.step(len(batch))
    if waiting["source"]:
        sheets.append(_sheet(waiting, out, len(sheets)))
    for name, reason in images.bad:
        yield f"left out: {name}: {reason}"
    yield f"{done} translations in {out}" + (f", {len(images.bad)} unreadable images left out" if images.bad else "")
    if options.path:
        yield f"trajectories: {out / 'paths'}"
    if sheets:
        yield f"sheets: {sheets[0]}" + (f" to {sheets[-1].name}" if len(sheets) > 1 else "")


def _sheet(waiting: dict[str, list], out: Path, number: int) -> Path:
    path = out / "sheets" / f"sheet-{number:04d}.png"
    rows = {name: torch.stack(images[:_SHEET_COLUMNS]) for name, images in waiting.items()}
    for images in waiting.values():
        del images[:_SHEET_COLUMNS]
    save_picture(grid(rows), path)
    return path


def _write(names: list[str], result: Translation, out: Path, options: TranslateOptions) -> None:
    quality = {"quality": 95, "subsampling": 0} if options.format == "jpg" else {}
    for i, name in enumerate(names):
        save_picture(to_picture(result.images[i]), out / f"{name}.{options.format}", **quality)
        if options.path:
            frames = result.path_images[:, i]
            save_picture(strip(frames), out / "paths" / f"{name}.png")
            save_animation(list(frames), out / "paths" / f"{name}.gif")
