"""Scores of translations beside plain reconstruction and simpler ways of moving the same latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from letit_dist.data.progress import Progress
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import to_images
from letit_dist.energy.translate import METHOD, Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.attributes import Examples, Judge, judge_images, read_factors, read_pixels
from letit_dist.evaluation.decoded import DecodedFidelity
from letit_dist.evaluation.extractors import Extractor
from letit_dist.evaluation.image_distances import l2
from letit_dist.evaluation.kept import Keeper
from letit_dist.evaluation.rivals import Move, Nearness, fit_rivals
from letit_dist.evaluation.tables import markdown
from letit_dist.memory import peak_bytes
from letit_dist.pretrained import tensors_fingerprint

_SHEET = 10
_COLUMNS = (
    *("method", "valid", "target_accuracy", "content_error", "content_correlation", "kept_accuracy", "pair_error"),
    *("latent_frechet", "latent_kernel", "displacement", "l2_to_source"),
    *("lpips_alex", "lpips_vgg", "lpips_squeeze", "fid_real", "kid_real", "fid_decoded", "kid_decoded"),
    *("fit_seconds", "seconds", "mib", "samples"),
)


# On a terminal; all of them are in the file.
_SHOWN = {"method", "valid", "target_accuracy", "content_error", "kept_accuracy", "pair_error", "latent_kernel"}
_SHOWN |= {"l2_to_source", "lpips_alex", "fid_real", "fid_decoded"}
# Of the machine, and of the table.
_NOT_OF_THE_METHOD = {"method", "valid", "fit_seconds", "seconds", "mib"}


@dataclass(frozen=True)
class Scores:
    """Rows (one a method) and a few images of each, for the sheet."""

    rows: list[dict[str, Any]]
    images: dict[str, Tensor]

    def table(self, *, whole: bool = False) -> str:
        """The rows as Markdown, what tells most or the `whole`; factors, attributes and counts stay in the file."""
        hidden = {"valid"} if all(row.get("valid", True) for row in self.rows) else set()
        found = {name for row in self.rows for name in row} - hidden
        found = found if whole else found & _SHOWN
        return markdown(self.rows, [column for column in _COLUMNS if column in found])

    def card_metrics(self, test: str) -> dict[str, float]:
        """What the method reaches on the images of `test`, by names for a model card; nothing of the clock."""
        [row] = [row for row in self.rows if row["method"] == METHOD]
        way = f"{row['source'] or 'any'} to {row['target'] or 'target'}"
        found = {name: row[name] for name in _COLUMNS if name in row and name not in _NOT_OF_THE_METHOD}
        return {f"{way}: {name} on {test}": value for name, value in found.items() if value is not None}


def _encode(translator: Translator, pixels: Tensor, batch: int) -> Tensor:
    return torch.cat([translator.encode(to_images(part.to(translator.device))) for part in pixels.split(batch)])


def match_pairs(test: ShardDataset, pairs: ShardDataset) -> list[int]:
    """The row in `pairs` of each image of `test`, by key; UserError if one has no counterpart."""
    rows = {pairs.key(i): i for i in range(len(pairs))}
    missing = [test.key(i) for i in range(len(test)) if test.key(i) not in rows]
    if missing:
        raise UserError(f"--pairs: {len(missing)} of {len(test)} test images have no counterpart, e.g. {missing[0]!r}")
    return [rows[test.key(i)] for i in range(len(test))]


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
    baselines: Sequence[str] = ("mean shift",),
    keeper: Keeper | None = None,
    perceptual: Mapping[str, nn.Module] | None = None,
    extractor: Extractor | None = None,
    real: Tensor | None = None,
    training_latents: tuple[Tensor, Tensor] | None = None,
    say: Callable[[str], object] = print,
) -> Scores:
    """Score the real test images, their reconstructions, the baselines (see `fit_rivals`) and the translations.

    Baselines are fitted on the training images in `examples`, in `fit_seconds`. `seconds` is the time from the
    source's latents to the decoded images of the method, for all samples. `l2_to_source` is the mean Euclidean
    distance to the source image, both in [0, 1]; see `Nearness` for the distances of latents. `mib` are the tensors
    that live at the peak while one batch is moved and decoded, weights of the autoencoder (and the energy) included.

    `keeper` sees whether attributes are kept, `perceptual` holds LPIPS by the name of its backbone, `extractor` gives
    FID and KID to `real` images of the target, pixels uint8 (M, 3, H, W), or its training images; see the modules
    `kept` and `decoded`. All of these are where the translator is. `training_latents`, (N, *L) and (M, *L) of source
    and target, are those of the images in `examples` where they are at hand and need not be made again.
    """
    check_sizes(translator, test=test, pairs=pairs)
    pixels = read_pixels(test)
    factors, names = read_factors(test)
    if judge.names and names != judge.names:
        raise UserError(f"--test has the factors {', '.join(names) or 'none'}, --train has {', '.join(judge.names)}")
    truth = keeper.truth(test) if keeper is not None else None
    middle = examples.factors.median(0).values if examples.factors is not None and keeper is None else None
    counterparts = to_images(read_pixels(pairs)[match_pairs(test, pairs)]) if pairs is not None else None
    domains = [examples.pixels[examples.domain == d] for d in (0, 1)]
    source, target = training_latents or (_encode(translator, part, batch) for part in domains)
    rivals = fit_rivals(baselines, source, target, seed=seed, say=say)
    latents = _encode(translator, pixels, batch)
    nearness = Nearness(latents, target, translator.energy.unit, say=say)
    fidelity = None
    if extractor is not None:
        goal = domains[1] if real is None else real
        fidelity = DecodedFidelity(translator, goal, extractor, batch=batch, seed=seed, say=say)
    moved: dict[str, Tensor] = {}

    def decoded(name: str, move: Move) -> Tensor:
        ends, parts = [], []
        with Progress("scoring", len(latents)) as progress:
            for places in torch.arange(len(latents)).split(batch):
                # The same for every method: what differs between two of them is what they did.
                noise = translator.autoencoder.decoder_noise(seed, places)
                ends.append(move(latents[places], places))
                parts.append(translator.decode(ends[-1], noise=noise).clamp(-1, 1).cpu())
                progress.step(len(places))
        moved[name] = torch.cat(ends)
        return torch.cat(parts)

    def peak(name: str, move: Move) -> float:
        """MiB of one batch."""
        places = torch.arange(min(batch, len(latents)))
        noise = translator.autoencoder.decoder_noise(seed, places)
        networks = (translator.autoencoder, *([translator.energy] if name == METHOD else []))
        held = sum(t.numel() * t.element_size() for n in networks for t in (*n.parameters(), *n.buffers()))
        run = peak_bytes(lambda: translator.decode(move(latents[places], places), noise=noise), translator.device)
        return round((held + run) / 2**20, 3)

    moves: dict[str, Move] = {
        "reconstruction": lambda z, _: z,
        **{name: rival.move for name, rival in rivals.items()},
        METHOD: lambda z, places: translator.transport(z, noise=translator.noise(seed, places)).latents,
    }
    methods: dict[str, Callable[[], Tensor]] = {
        "real": lambda: to_images(pixels),
        **{name: partial(decoded, name, move) for name, move in moves.items()},
    }
    rows, images = [], {}
    for name, method in methods.items():
        begun = time.perf_counter()
        result = method()
        seconds = round(time.perf_counter() - begun, 3)
        row = {"method": name, **judge_images(judge, result, factors, middle), "seconds": seconds}
        if keeper is not None and truth is not None:
            row |= keeper.scores(result, truth)
        if counterparts is not None:
            row["pair_error"] = float((result - counterparts).square().mean().sqrt())
        if name in moved:
            row |= {**nearness.of(moved.pop(name)), "l2_to_source": _to_source(l2, result, pixels, batch) / 2}
            row |= {f"lpips_{net}": _to_source(of, result, pixels, batch) for net, of in (perceptual or {}).items()}
            row["mib"] = peak(name, moves[name])
        if fidelity is not None:
            row |= fidelity.of(name, result)
        if name in rivals:
            row["fit_seconds"] = rivals[name].fit_seconds
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


def _to_source(distance: Callable[[Tensor, Tensor], Tensor], images: Tensor, pixels: Tensor, batch: int) -> float:
    """Mean of a distance between images in [-1, 1], where its network is."""
    device = next(distance.parameters()).device if isinstance(distance, nn.Module) else images.device
    pairs = zip(images.split(batch), to_images(pixels).split(batch), strict=True)
    return float(torch.cat([distance(a.to(device), b.to(device)).flatten().cpu().double() for a, b in pairs]).mean())


def _spread(count: int) -> Tensor:
    return torch.arange(min(_SHEET, count)) * count // min(_SHEET, count)
