"""Translations beside one another (LETIT, figures 4, 6, 7 and 9): source, reconstruction, mean shift, ours, others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from letit_dist.data.inputs import Images
from letit_dist.data.progress import Progress
from letit_dist.data.transforms import (
    IMAGE_EXTENSIONS,
    UnreadableImage,
    decode,
    resize_crop,
    to_images,
    to_pixels,
)
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.translate import METHOD, Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.comparison_page import comparison_page
from letit_dist.evaluation.energy_run import EnergyRun
from letit_dist.evaluation.latents import all_latents
from letit_dist.evaluation.translating import TranslateOptions
from letit_dist.files import write_atomically
from letit_dist.pictures import grid, save_picture

SOURCE, RECONSTRUCTION, MEAN_SHIFT = "source", "reconstruction", "mean shift"


@dataclass(frozen=True)
class Comparison:
    """One row a method, one column an image."""

    names: list[str]
    rows: dict[str, list[Tensor]]  # pixels (3, H, W) on the CPU


def parse_others(
    arguments: Sequence[str],
    *,
    option: str = "--also",
    taken: Sequence[str] = (SOURCE, RECONSTRUCTION, MEAN_SHIFT, METHOD),
) -> dict[str, Path]:
    """NAME=FOLDER, each a row of its own, none of those `taken`. Raises one UserError for all that are not so."""
    others: dict[str, Path] = {}
    problems = []
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not (name and equals and folder):
            problems.append(f"{option} {argument}: expected NAME=FOLDER")
        elif name in (*taken, *others):
            problems.append(f"{option} {argument}: there is a row {name!r} already")
        elif not Path(folder).is_dir():
            problems.append(f"{option} {argument}: no such folder")
        else:
            others[name] = Path(folder)
    if problems:
        raise UserError("\n".join(problems))
    return others


def match_others(
    others: Mapping[str, Path], names: Sequence[str], *, option: str = "--also"
) -> dict[str, dict[str, Path]]:
    """For each folder the file of each of these names, whatever its ending. Raises one UserError that lists every
    name without a file, or with several."""
    matched: dict[str, dict[str, Path]] = {}
    problems = []
    for label, folder in others.items():
        files: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and not path.name.startswith("."):
                files.setdefault(path.stem, []).append(path)
        missing = [name for name in names if name not in files]
        double = [path.name for name in names for path in files.get(name, []) if len(files[name]) > 1]
        if missing:
            problems.append(f"{option} {label}={folder}: no image of the name {', '.join(missing)}")
        if double:
            problems.append(f"{option} {label}={folder}: several images of one name: {', '.join(double)}")
        matched[label] = {name: files[name][0] for name in names if name in files}
    if problems:
        raise UserError("\n".join(problems))
    return matched


def _read(path: Path, resolution: int) -> Tensor:
    try:
        return resize_crop(decode(path.read_bytes()), resolution)
    except (UnreadableImage, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


@torch.no_grad()
def compare_images(
    translator: Translator,
    images: Images,
    options: TranslateOptions,
    shift: MeanShift | None = None,
    others: Mapping[str, Path] | None = None,
) -> Comparison:
    """Every readable image by every method, one image at a time; the decoder's noise is the same for all methods.

    `others` are folders of images under the same names, resized to ours. Raises UserError before anything is
    computed if one of them cannot be had.
    """
    matched = match_others(others or {}, images.names)
    read = {
        label: {name: _read(path, images.resolution) for name, path in files.items()}
        for label, files in matched.items()
    }
    labels = [SOURCE, RECONSTRUCTION, *([MEAN_SHIFT] if shift is not None else []), METHOD, *read]
    found = Comparison([], {label: [] for label in labels})
    with Progress("comparing", len(images)) as progress:
        for place, (name, pixels) in enumerate(images):
            noise = translator.autoencoder.decoder_noise(options.seed, [place])
            latents = translator.encode(to_images(pixels[None].to(translator.device)))
            moved = translator.transport(
                latents, **options.chain, noise=translator.noise(options.seed, [place])
            ).latents
            ways = {RECONSTRUCTION: latents, METHOD: moved}
            if shift is not None:
                ways[MEAN_SHIFT] = shift.translate(latents)
            found.names.append(name)
            found.rows[SOURCE].append(pixels)
            for label, z in ways.items():
                found.rows[label].append(to_pixels(translator.decode(z, noise=noise))[0].cpu())
            for label, pictures in read.items():
                found.rows[label].append(pictures[name])
            progress.step(1)
    return found


def fit_mean_shift(run: EnergyRun, folders: Sequence[str | Path] | None) -> MeanShift | str:
    """The mean shift between the latents of both domains, of the run's own or of these folders (source, target).

    A line that says why if the run names none that are there. Raises UserError for given folders that are not
    there, and for latents of another autoencoder.
    """
    if folders is None:
        try:
            folders = [run.latent_folder("source"), run.latent_folder("target")]
        except UserError as error:
            return f"without a row for the mean shift: {error}"
    autoencoder = run.translator.autoencoder
    return MeanShift.fit(*(all_latents(autoencoder, run.open_latents(folder)) for folder in folders))


def write_comparison(
    run: EnergyRun,
    images: Images,
    out: Path,
    options: TranslateOptions,
    *,
    latents: Sequence[str] | None = None,
    others: Mapping[str, Path] | None = None,
) -> Iterator[str]:
    """OUT/compare.png, a sheet at full resolution, and OUT/compare.html, a page that wipes between source and any
    method; yields lines that say what was written."""
    # What is wrong with the options shows before the latents are read.
    match_others(others or {}, images.names)
    run.translator.chain(steps=options.steps, step_size=options.step_size, strength=options.strength)
    shift = fit_mean_shift(run, latents)
    if isinstance(shift, str):
        yield shift
    found = compare_images(run.translator, images, options, None if isinstance(shift, str) else shift, others)
    for name, reason in images.bad:
        yield f"left out: {name}: {reason}"
    title = run.title(options.seed)
    save_picture(grid(found.rows, title=title), out / "compare.png")
    page = comparison_page(title, found.names, found.rows).encode()
    write_atomically(out / "compare.html", page)
    yield f"{len(found.names)} images: {', '.join(found.rows)}"
    yield f"figure: {out / 'compare.png'}"
    yield f"page: {out / 'compare.html'} ({len(page) / 2**20:.1f} MiB)"
