"""Networks whose features metrics compare, each with the resize that goes with it.

compat       torch-fidelity's Inception, resize and all
clean        the same network behind an antialiased bicubic resize, as in clean-fid (2104.11222)
pytorch-fid  the same network behind torch's bilinear resize, as in pytorch-fid
torchvision  torchvision's Inception, trained anew on ImageNet, as StarGAN v2 uses it
dinov2, clip transformers, with metrics of their own (vision_transformers.py)
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from letit_dist import pretrained
from letit_dist.errors import UserError
from letit_dist.evaluation.vision_transformers import PUBLISHED, Published, build_from, build_random, check_installed
from letit_dist.evaluation.weights import FILES, find_weights, read_state_dict

Kind = Literal["compat", "clean", "pytorch-fid", "torchvision", "dinov2", "clip"]
LAYERS = {"64": 64, "192": 192, "768": 768, "2048": 2048}  # of torch-fidelity's Inception, with their widths
_SIDE = 299
_RANDOM, UNVERIFIED = "random ", "unverified "  # before the digits of weights that make numbers valid for nothing

RESIZES = {
    "compat": "bilinear to 299 as in TensorFlow 1, not antialiased",
    "clean": "bicubic to 299, antialiased, in float",
    "pytorch-fid": "bilinear to 299 by torch, not antialiased",
    "torchvision": "bilinear to 299, antialiased, rounded",
    **{kind: published.resize for kind, published in PUBLISHED.items()},
}


def _clean(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, 3, 299, 299), each channel resized as floats by Pillow and clipped to 0..255."""

    def resized(channel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        image = Image.fromarray(channel.astype(np.float32))
        return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)).clip(0, 255)

    planes = [resized(channel) for channel in pixels.flatten(0, 1).cpu().numpy()]
    return (torch.from_numpy(np.stack(planes)).unflatten(0, (-1, 3)) - 128) / 128


def _plain(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels.float() / 255, (_SIDE, _SIDE), mode="bilinear", align_corners=False) * 2 - 1


def _imagenet(pixels: Tensor) -> Tensor:
    return _standardised(resize_pixels(pixels, _SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _as_published(pixels: Tensor, published: Published) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, 3, side, side)."""
    if published.crop:
        height, width = pixels.shape[2:]
        least = min(height, width)
        top, left = (height - least) // 2, (width - least) // 2
        pixels = pixels[..., top : top + least, left : left + least]
    resized = resize_pixels(pixels, published.side, Image.Resampling.BICUBIC)
    return _standardised(resized, published.mean, published.std)


def _standardised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    centre, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels.float() / 255 - centre) / scale


def resize_pixels(pixels: Tensor, side: int, by: Image.Resampling = Image.Resampling.BILINEAR) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, side, side) by a filter of Pillow, all antialiased, on the CPU."""
    images = (Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in pixels.cpu())
    rows = [np.asarray(image.resize((side, side), by)) for image in images]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


class Extractor(nn.Module):
    """pixels uint8 (B, 3, H, W) -> {"features": (B, D)}, and "logits" (B, 1008) where they were asked for.

    `stamp` says what produced the features, as plain values that results and stored features keep.
    """

    def __init__(self, kind: Kind, network: nn.Module, stamp: dict[str, Any]):
        super().__init__()
        self.kind, self.network, self.stamp = kind, network, stamp
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        # TF32 would round a GPU's features to three digits, and the choice of a kernel by speed differs between runs.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self._features(pixels)

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        device = next(self.network.parameters()).device
        if self.kind in PUBLISHED:
            return {"features": self.network(_as_published(pixels, PUBLISHED[self.kind]).to(device))}
        if self.kind == "torchvision":
            return {
                "features": self._observe(self.network.get_submodule("avgpool"), _imagenet(pixels).to(device)).flatten(
                    1
                )
            }
        if self.kind == "compat":
            return self._named(self.network(pixels.to(device)))
        prepared = {"clean": _clean, "pytorch-fid": _plain}[self.kind](pixels).to(device)
        # The network's own front end takes uint8 alone: what its first layer gets is replaced behind it.
        first = self.network.get_submodule("Conv2d_1a_3x3")
        hook = first.register_forward_pre_hook(lambda *_: (prepared,))
        try:
            return self._named(self.network(pixels.new_zeros(len(pixels), 3, _SIDE, _SIDE).to(device)))
        finally:
            hook.remove()

    def _named(self, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(("features", "logits"), values, strict=False))

    def _observe(self, layer: nn.Module, images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            self.network(images)
        finally:
            hook.remove()
        return seen[0]


def open_extractor(
    kind: Kind = "compat",
    *,
    folder: Path,
    layer: str = "2048",
    logits: bool = False,
    random_weights: bool = False,
    sha256: str | None = None,
) -> Extractor:
    """The extractor with the weights that `folder` holds, on the CPU.

    `layer` is one of torch-fidelity's (64, 192, 768, 2048); the others have one. With `random_weights` no file is
    read, and the stamp says valid: false. So it does for weights whose hash is not known here, unless `sha256` has its
    first digits. Raises UserError for weights that are missing, damaged, or another network's.
    """
    if kind not in RESIZES:
        raise UserError(f"extractor {kind!r}, known: {', '.join(RESIZES)}")
    fidelity = kind in ("compat", "clean", "pytorch-fid")
    if layer not in LAYERS or (layer != "2048" and not fidelity):
        known = ", ".join(LAYERS) if fidelity else "2048" if kind == "torchvision" else "one alone: leave --layer out"
        raise UserError(f"layer {layer!r}, the extractor {kind} has {known}")
    if logits and not fidelity:
        raise UserError("the Inception score needs torch-fidelity's network: --extractor compat")
    if sha256 and random_weights:
        raise UserError("--weights-sha256 and --random-weights exclude each other")
    published = PUBLISHED.get(kind)
    key = kind if published else "inception" if fidelity else "inception-torchvision"
    # A missing package is said before anybody fetches weights for it.
    if published:
        check_installed(kind)
    else:
        network = _fidelity_network(layer, logits) if fidelity else _torchvision_network()
    path, digest = (None, "") if random_weights else find_weights(key, folder, sha256)
    if published:
        network = build_from(kind, read_state_dict(path), path) if path else build_random(kind)
    elif path:
        load_network(network, path)
    if random_weights:
        _randomise(network)
        weights = _RANDOM + pretrained.tensors_fingerprint({}, network.state_dict())
    else:
        weights = ("" if sha256 or FILES[key].sha256 else UNVERIFIED) + digest[:16]
    stamp = {
        "extractor": published.name if published else "inception-v3-compat" if fidelity else key,
        "layer": published.layer if published else layer,
        "resize": RESIZES[kind],
        "weights": weights,
        "valid": not weights.startswith((_RANDOM, UNVERIFIED)),
    }
    return Extractor(kind, network, stamp)


def load_network(network: nn.Module, path: Path) -> None:
    """Load a weights file whole; UserError that lists what is missing, left over or of another shape."""
    found = read_state_dict(path)
    # Files from before torch counted batches have no such entries, and nothing reads them here.
    own = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    pretrained.load_exactly(network, {**own, **found}, f"{path}: weights of another network")


def _fidelity_network(layer: str, logits: bool) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError("fidelity needs the package torch-fidelity: pip install 'letit_dist[eval]'") from None

    class Unfilled(FeatureExtractorInceptionV3):
        """Its weights come later, by a reader that runs no code from the file."""

        filled = False

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(*args, **kwargs) if self.filled else None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    wanted = [layer, *(["logits_unbiased"] if logits else [])]
    with torch.random.fork_rng(devices=[]):
        network = Unfilled("inception-v3-compat", wanted, feature_extractor_weights_path=empty)
    network.filled = True
    return network


def _torchvision_network() -> nn.Module:
    from torchvision.models import inception_v3

    with torch.random.fork_rng(devices=[]):
        return inception_v3(weights=None, aux_logits=True, init_weights=False, transform_input=False).eval()


@torch.no_grad()
def _randomise(network: nn.Module, *, seed: int = 0) -> None:
    """He's initialisation, and batch norms, if there are any, calibrated on noise: a function of the seed.

    With plainly random weights all images have nearly the same features, and any two sets a distance of 0.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    if not norms:
        return
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    noise = torch.randint(0, 256, (4, 3, 38, 38), generator=generator, dtype=torch.uint8)
    network(_imagenet(noise) if hasattr(network, "aux_logits") else noise)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
        module.eval()
