"""How well an autoencoder gives images back, and how much of its codebooks it uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from letit_dist.autoencoders.base import Autoencoder
from letit_dist.data.progress import Progress
from letit_dist.data.reader import ShardDataset, batches
from letit_dist.data.transforms import to_images
from letit_dist.evaluation.image_distances import psnr, squared_error, ssim
from letit_dist.evaluation.weights import FILES, find_weights, missing_line
from letit_dist.pictures import grid, save_picture

Net = Literal["alex", "vgg", "squeeze"]
NETS: tuple[Net, ...] = ("alex", "vgg", "squeeze")
Distance = Callable[[Tensor, Tensor], Tensor]  # of images (B, 3, H, W) in [-1, 1]; B numbers
_SHOWN = 8


@dataclass
class Measured:
    """Numbers of N images of one data set, and how often each code was used."""

    label: str
    meta: dict[str, Any]
    scores: dict[str, Tensor]  # name -> (N,) float64
    counts: dict[str, Tensor] = field(default_factory=dict)  # name of a codebook -> (codes,) int64

    def row(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Means over the images; of a codebook the codes that were used, and the perplexity exp(H) of their shares.

        `exact` counts images that came back bit by bit, such as empty ones: their PSNR is infinite, and the mean is
        that of the others (None where there are none).
        """
        row = {"data": self.label, **self.meta, "images": len(self.scores["mse"])}
        for name, values in self.scores.items():
            finite = values[values.isfinite()]
            row[name] = float(finite.mean()) if len(finite) else None
            if name == "psnr" and len(finite) < len(values):
                row["exact"] = len(values) - len(finite)
        for name, counts in self.counts.items():
            row |= {f"{name}_used": int((counts > 0).sum()), f"{name}_codes": len(counts)}
            row[f"{name}_perplexity"] = float(perplexity(counts))
        return {**row, **(extra or {})}

    def card_metrics(self) -> dict[str, float]:
        """The same by names for a model card."""
        known = {"data", *self.meta}
        row = {name: value for name, value in self.row().items() if name not in known and value is not None}
        return {f"reconstruction: {name} on {self.label}": value for name, value in row.items()}


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the shares of (codes,): how many codes used equally often would be as diverse."""
    return torch.exp(torch.special.entr(counts.double() / counts.sum()).sum())


def together(parts: Sequence[Measured]) -> Measured:
    """All data sets as one: every image counts the same."""
    names = [name for name in parts[0].scores if all(name in part.scores for part in parts)]
    scores = {name: torch.cat([part.scores[name] for part in parts]) for name in names}
    counts = {name: torch.stack([part.counts[name] for part in parts]).sum(0) for name in parts[0].counts}
    return Measured("all", {}, scores, counts)


def find_backbones(folder: Path, nets: Sequence[Net] = NETS) -> tuple[dict[Net, Path], list[str]]:
    """The weights of LPIPS's backbones by name, as far as `folder` has them, and a line for each that it has not."""
    found: dict[Net, Path] = {}
    missing = []
    for net in nets:
        if not (folder / FILES[f"lpips-{net}"].name).is_file():
            missing.append(f"lpips_{net} is left out: {missing_line(f'lpips-{net}', folder)}")
            continue
        found[net], _ = find_weights(f"lpips-{net}", folder)
    return found, missing


@torch.no_grad()
def reconstruct(
    autoencoder: Autoencoder, pixels: Tensor, places: Tensor, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """pixels uint8 (B, 3, H, W) -> images (B, 3, H, W) clipped to [-1, 1], and codes where the autoencoder has them.

    The noise of a decoder that needs some is a function of (seed, place), as for translations.
    """
    device = next(autoencoder.parameters()).device
    images = to_images(pixels.to(device))
    codes = autoencoder.encode_codes(images) if autoencoder.stores_codes else {}
    latents = autoencoder.latents_from_codes(codes) if codes else autoencoder.encode(images)
    return autoencoder.decode(latents, noise=autoencoder.decoder_noise(seed, places)).clamp(-1, 1), codes


@torch.no_grad()
def measure_reconstruction(
    autoencoder: Autoencoder,
    dataset: ShardDataset,
    perceptual: Mapping[str, Distance] | None = None,
    *,
    batch: int = 16,
) -> Measured:
    """Every image of a data set, in order: `mse` of images in [-1, 1], PSNR, SSIM, and each of the LPIPS distances.

    Raises UserError for shards without images, and of another size than the autoencoder's.
    """
    dataset = dataset.require_side(autoencoder.config.resolution)
    index = dataset.indexes[0]
    label = str(index.folder)
    scores: dict[str, list[Tensor]] = {}
    counts: dict[str, Tensor] = {}
    with Progress(f"reconstructing {label}", len(dataset)) as progress:
        for pixels, places in batches(dataset, batch):
            again, codes = reconstruct(autoencoder, pixels, places)
            images = to_images(pixels.to(again.device))
            parts = {"mse": squared_error(again, images), "psnr": psnr(again, images, peak=2.0)}
            parts["ssim"] = ssim(again, images, peak=2.0)
            for net, distance in (perceptual or {}).items():
                parts[f"lpips_{net}"] = distance(again, images).flatten().double()
            for name, values in parts.items():
                scores.setdefault(name, []).append(values.cpu())
            for name, values in codes.items():
                seen = torch.bincount(values.flatten().cpu(), minlength=autoencoder.codebook_size)
                counts[name] = counts[name] + seen if name in counts else seen
            progress.step(len(pixels))
    meta = {"domain": index.meta.get("domain"), "split": index.meta.get("split")}
    return Measured(label, meta, {name: torch.cat(values) for name, values in scores.items()}, counts)


def choose(errors: Tensor, count: int = _SHOWN) -> dict[str, Tensor]:
    """Of errors (N,): the largest, and those nearest to the median, in order of size."""
    count = min(count, len(errors))
    order = errors.argsort()
    middle = (errors - errors.median()).abs().argsort(stable=True)[:count]
    return {"worst": order.flip(0)[:count], "typical": middle[errors[middle].argsort(descending=True)]}


def save_sheet(autoencoder: Autoencoder, dataset: ShardDataset, measured: Measured, path: Path) -> None:
    """The worst and the typical images of a data set above what the autoencoder makes of them."""
    dataset = dataset.matching(autoencoder.config.resolution)
    rows: dict[str, Tensor] = {}
    for name, chosen in choose(measured.scores["mse"]).items():
        pixels = torch.stack([dataset.pixels(int(place)) for place in chosen])
        rows[name] = pixels
        rows[f"{name}, again"] = reconstruct(autoencoder, pixels, chosen)[0].cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(grid(rows), path)
