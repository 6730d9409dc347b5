"""FID and KID of decoded images, against real images of the target and against the same images decoded.

The first sees what transport and autoencoder do wrong together; the second, whose reference went through the same
decoder, sees what transport does wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from letit_dist import pretrained
from letit_dist.data.progress import Progress
from letit_dist.data.transforms import to_images, to_pixels
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.extractors import Extractor
from letit_dist.evaluation.features import Features, gather_features
from letit_dist.evaluation.fidelity import FidelityOptions, measure
from letit_dist.evaluation.image_sets import Columns, ImageSet

_SUBSET = 1000  # of KID, or as many as there are


class HeldImages(ImageSet):
    """Images in memory, (N, 3, H, W) in [-1, 1], as the pixels that a file would hold."""

    def __init__(self, label: str, images: Tensor):
        self.label, self._images = label, to_pixels(images).cpu()
        self.stamp = pretrained.tensors_fingerprint({}, {"pixels": self._images})

    def __len__(self) -> int:
        return len(self._images)

    @property
    def pixels(self) -> tuple[int, int]:
        height, width = self._images.shape[2:]
        return height, width

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Columns]:
        return self._images[list(rows)], {}


@torch.no_grad()
def decode_again(translator: Translator, pixels: Tensor, *, batch: int, seed: int) -> Tensor:
    """Pixels uint8 (N, 3, H, W) through the autoencoder: images (N, 3, H, W) in [-1, 1], on the CPU."""
    parts = []
    with Progress("decoding real targets", len(pixels)) as progress:
        for places in torch.arange(len(pixels)).split(batch):
            latents = translator.encode(to_images(pixels[places].to(translator.device)))
            noise = translator.autoencoder.decoder_noise(seed, places)
            parts.append(translator.decode(latents, noise=noise).clamp(-1, 1).cpu())
            progress.step(len(places))
    return torch.cat(parts)


class DecodedFidelity:
    """Distances to real images of the target, pixels uint8 (M, 3, H, W), and to what the autoencoder makes of them."""

    def __init__(
        self,
        translator: Translator,
        real: Tensor,
        extractor: Extractor,
        *,
        batch: int = 64,
        seed: int = 0,
        say: Callable[[str], object] = print,
    ):
        if len(real) < 2:
            raise UserError(f"FID and KID need 2 real images of the target, got {len(real)}")
        self.extractor = extractor
        again = decode_again(translator, real, batch=batch, seed=seed)
        self.references = {"real": self._features("real targets", to_images(real))}
        self.references["decoded"] = self._features("decoded real targets", again)
        floor = self._distances(self.references["decoded"], "real")
        say(f"decoded real targets against real ones: FID {floor['fid_real']:.4g}, KID {floor['kid_real']:.4g}")

    def _features(self, label: str, images: Tensor) -> Features:
        return gather_features(HeldImages(label, images), self.extractor, lambda mine: [mine])

    def _distances(self, made: Features, name: str) -> dict[str, float]:
        reference = self.references[name]
        size = min(_SUBSET, len(made), len(reference))
        options = FidelityOptions(metrics=("fid", "kid"), kid_subset_size=size)
        found: dict[str, float] = {}
        for row in measure(made, reference, options):
            metric, _, equal = row["metric"].partition("_")
            found["_".join(filter(None, (metric, name, equal)))] = row["value"]
            if equal:
                found[f"{metric}_{name}_spread"] = row["spread"]
        return found

    def of(self, label: str, images: Tensor) -> dict[str, object]:
        """Of images (N, 3, H, W) in [-1, 1]: `fid_real`, `kid_real`, `fid_decoded`, `kid_decoded`, the same of equal
        counts with their spread over draws, and what they were measured with."""
        made = self._features(label, images)
        found: dict[str, object] = {**self._distances(made, "real"), **self._distances(made, "decoded")}
        reference = self.references["real"]
        stamp = {key: made.stamp[key] for key in ("extractor", "resize", "weights", "valid")}
        size = min(_SUBSET, len(made), len(reference))
        return {**found, **stamp, "counts": [len(made), len(reference)], "kid_subset_size": size}
