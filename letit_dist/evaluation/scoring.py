"""Scores of translations beside plain reconstruction and the mean shift, on the same test images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from letit_dist.data.progress import Progress
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import to_images
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.attributes import Examples, Judge, judge_images, read_factors, read_pixels
from letit_dist.evaluation.tables import markdown
from letit_dist.pretrained import tensors_fingerprint

_SHEET = 10


@dataclass(frozen=True)
class Scores:
    """Rows (one a method) and a few images of each, for the sheet."""

    rows: list[dict]
    images: dict[str, Tensor]

    def table(self) -> str:
        """The rows as Markdown; the error of each single factor stays in the JSON lines."""
        columns = (
            "method",
            "target_accuracy",
            "content_error",
            "content_correlation",
            "pair_error",
            "seconds",
            "samples",
        )
        return markdown(self.rows, [c for c in columns if any(c in row for row in self.rows)])


def _encode(translator: Translator, pixels: Tensor, batch: int) -> Tensor:
    return torch.cat([translator.encode(to_images(part)) for part in pixels.split(batch)])


def _paired(test: ShardDataset, pairs: ShardDataset) -> Tensor:
    """Images (N, 3, H, W) of `pairs` in the order of `test`, matched by key."""
    rows = {pairs.key(i): i for i in range(len(pairs))}
    missing = [test.key(i) for i in range(len(test)) if test.key(i) not in rows]
    if missing:
        raise UserError(f"--pairs: {len(missing)} of {len(test)} test images have no counterpart, e.g. {missing[0]!r}")
    return to_images(read_pixels(pairs)[[rows[test.key(i)] for i in range(len(test))]])


def check_sizes(translator: Translator, **folders: ShardDataset | None) -> None:
    """Raise UserError, with a line for each, if images of the named options are not the autoencoder's size."""
    side = translator.autoencoder.config.resolution
    sizes = {name: folder.image_size() for name, folder in folders.items() if folder is not None}
    problems = [
        f"--{name} holds images of {width}x{height}, the autoencoder takes {side}x{side}"
        for name, (height, width) in sizes.items()
        if (height, width) != (side, side)
    ]
    if problems:
        raise UserError("\n".join(problems))


@torch.no_grad()
def score_translations(
    translator: Translator,
    judge: Judge,
    examples: Examples,
    test: ShardDataset,
    pairs: ShardDataset | None = None,
    *,
    batch: int = 64,
    seed: int = 0,
) -> Scores:
    """Score the real test images, their reconstructions, the mean shift and the translations.

    The mean shift is fitted on the training images in `examples`. `seconds` is the time from the source's
    latents to the decoded images of the method, for all samples.
    """
    check_sizes(translator, test=test, pairs=pairs)
    pixels = read_pixels(test)
    factors, names = read_factors(test)
    if judge.names and names != judge.names:
        raise UserError(f"--test has the factors {', '.join(names) or 'none'}, --train has {', '.join(judge.names)}")
    counterparts = _paired(test, pairs) if pairs is not None else None
    domains = [examples.pixels[examples.domain == d] for d in (0, 1)]
    shift = MeanShift.fit(*(_encode(translator, part, batch) for part in domains))
    latents = _encode(translator, pixels, batch)

    def decoded(move: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        parts = []
        with Progress("scoring", len(latents)) as progress:
            for places in torch.arange(len(latents)).split(batch):
                # The same for every method: what differs between two of them is what they did.
                noise = translator.decoder_noise(seed, places)
                parts.append(translator.decode(move(latents[places], places), noise=noise).clamp(-1, 1))
                progress.step(len(places))
        return torch.cat(parts)

    methods: dict[str, Callable[[], Tensor]] = {
        "real": lambda: to_images(pixels),
        "reconstruction": lambda: decoded(lambda z, _: z),
        "mean shift": lambda: decoded(lambda z, _: shift.translate(z)),
        "translation": lambda: decoded(
            lambda z, places: translator.transport(z, noise=translator.noise(seed, places)).latents
        ),
    }
    rows, images = [], {}
    for name, method in methods.items():
        begun = time.perf_counter()
        result = method()
        seconds = round(time.perf_counter() - begun, 3)
        row = {"method": name, **judge_images(judge, result, factors), "seconds": seconds}
        if counterparts is not None:
            row["pair_error"] = float((result - counterparts).square().mean().sqrt())
        row |= {
            "samples": len(result),
            "seed": seed,
            "source": translator.energy.extra.get("source"),
            "target": translator.energy.extra.get("target"),
            "autoencoder": translator.energy.extra.get("autoencoder_fingerprint"),
            "energy": translator.energy.fingerprint(),
            "images_seen": translator.energy.extra.get("images_seen"),
            "judge": tensors_fingerprint({}, judge.state_dict()),
        }
        rows.append(row)
        images[name] = result[_spread(len(result))]
    if counterparts is not None:
        images["counterpart"] = counterparts[_spread(len(counterparts))]
    return Scores(rows, images)


def _spread(count: int) -> Tensor:
    return torch.arange(min(_SHEET, count)) * count // min(_SHEET, count)
