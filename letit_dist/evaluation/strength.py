"""Translation as a dial: how far along its chain, where it arrives, and whether the way back leads home."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from letit_dist.data.inputs import Images
from letit_dist.data.transforms import to_images, to_pixels
from letit_dist.energy.classifier import LatentClassifier
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.energy_run import EnergyRun
from letit_dist.files import write_atomically
from letit_dist.pictures import grid, save_picture


@dataclass(frozen=True)
class Dial:
    """What came out for N images, and the numbers behind it."""

    rows: dict[str, Tensor]  # name -> pixels uint8 (N, 3, H, W)
    strengths: list[dict[str, float]]  # for each: strength, moved (in units of the energy), share taken for the target
    steps: list[int]  # N: after so many steps each chain is taken for the target; all of them if it never is
    arrived: list[bool]  # N: whether it ever is
    cycle: dict[str, float] | None  # errors of going there and back


def _rms(latents: Tensor) -> Tensor:
    """(B, *L) to (B,)"""
    return latents.flatten(1).square().mean(1).sqrt()


@torch.no_grad()
def turn_dial(
    translator: Translator,
    pixels: Tensor,
    strengths: Sequence[float],
    *,
    classifier: LatentClassifier | None = None,
    back: Translator | None = None,
    seed: int = 0,
) -> Dial:
    """Translate pixels uint8 (N, 3, H, W) at every strength in [0, 1], one image at a time.

    With a `classifier`, also until it takes each for the target. With `back`, the energy of the other direction on
    the same autoencoder, also there and back; its errors are root mean squares over the latents of what is left of
    the difference, relative to how far the way there led (0 = home again, 1 = as far from home as before), and mean
    absolute differences of the decoded images in [0, 1].
    """
    if not strengths or not all(0 <= strength <= 1 for strength in strengths):
        raise UserError(f"strengths lie in [0, 1], got {', '.join(map(str, strengths)) or 'none'}")
    if back is not None and back.energy.latent_shape != translator.energy.latent_shape:
        raise UserError(f"the way back sees latents {back.energy.latent_shape}, not {translator.energy.latent_shape}")
    unit = translator.energy.unit
    rows: dict[str, list[Tensor]] = {}
    moved: list[list[float]] = [[] for _ in strengths]
    taken: list[list[float]] = [[] for _ in strengths]
    steps, arrived, cycles = [], [], []

    for place, image in enumerate(pixels):
        noise = translator.noise(seed, [place])
        decoder_noise = translator.autoencoder.decoder_noise(seed, [place])

        def show(name: str, latents: Tensor, decoder_noise: list[Tensor] | None = decoder_noise) -> Tensor:
            decoded = to_pixels(translator.decode(latents, noise=decoder_noise)).cpu()
            rows.setdefault(name, []).append(decoded[0])
            return decoded.float() / 255

        rows.setdefault("source", []).append(image)
        source = translator.encode(to_images(image[None].to(translator.device)))
        home = show("reconstruction", source)
        for i, strength in enumerate(strengths):
            end = translator.transport(source, strength=strength, noise=noise).latents
            show(f"{strength:.0%}", end)
            moved[i].append(float(_rms(end - source)) / unit)
            if classifier is not None:
                taken[i].append(float(classifier.is_target(end)))
        if classifier is not None:
            result = translator.transport(source, noise=noise, until=classifier.is_target)
            show("on arrival", result.latents)
            steps.append(int(result.steps))
            arrived.append(bool(classifier.is_target(result.latents)))
        if back is not None:
            end = translator.transport(source, noise=noise).latents
            again = back.transport(end, noise=back.noise(seed, [place])).latents
            there = to_pixels(translator.decode(end, noise=decoder_noise)).cpu().float() / 255
            returned = show("there and back", again)
            cycles.append(
                (
                    float(_rms(again - source) / _rms(end - source).clamp_min(1e-12)),
                    float((returned - home).abs().mean()),
                    float((there - home).abs().mean()),
                )
            )

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    table = [
        {"strength": strength, "moved": mean(moved[i]), **({"target_share": mean(taken[i])} if taken[i] else {})}
        for i, strength in enumerate(strengths)
    ]
    cycle = None
    if cycles:
        names = ("latent_error", "image_error", "image_change")
        cycle = {name: mean(values) for name, values in zip(names, zip(*cycles, strict=True), strict=True)}
    return Dial({name: torch.stack(items) for name, items in rows.items()}, table, steps, arrived, cycle)


def write_strength(
    run: EnergyRun,
    images: Images,
    out: Path,
    strengths: Sequence[float],
    classifier: LatentClassifier,
    back: EnergyRun | None = None,
    *,
    seed: int = 0,
) -> Iterator[str]:
    """OUT/strength.png and strength.json of these images; yields lines for people."""
    named = list(images)
    yield from (f"left out: {name}: {reason}" for name, reason in images.bad)
    pixels = torch.stack([image for _, image in named])
    dial = turn_dial(
        run.translator,
        pixels,
        strengths,
        classifier=classifier,
        back=back.translator if back else None,
        seed=seed,
    )
    chain = run.translator.sampler.config.steps
    record = {
        **run.record(seed),
        "images": [name for name, _ in named],
        "classifier_accuracy": round(classifier.accuracy, 4),
        "strengths": dial.strengths,
        "arrival_steps": dial.steps,
        "arrived": dial.arrived,
        "chain_steps": chain,
        "cycle": dial.cycle,
    }
    save_picture(grid(dict(dial.rows), title=run.title(seed)), out / "strength.png")
    write_atomically(out / "strength.json", (json.dumps(record) + "\n").encode())
    for row in dial.strengths:
        share = f"{row['target_share']:.0%} taken for the target"
        yield f"strength {row['strength']:g}: moved {row['moved']:.3g} units, {share}"
    arrived = f"{sum(dial.arrived)} of {len(pixels)} arrive, after {sum(dial.steps) / len(pixels):.1f} of {chain} steps"
    yield f"{arrived} (in the classifier's eyes, which see latents; one that goes on may leave again)"
    if dial.cycle:
        cycle = dial.cycle
        yield (
            f"there and back: {cycle['latent_error']:.3f} of the way is left in the latents; images differ from "
            f"their reconstructions by {cycle['image_error']:.4f}, where translations do by {cycle['image_change']:.4f}"
        )
    yield f"figure: {out / 'strength.png'}"
