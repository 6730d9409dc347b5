"""LPIPS (1801.03924) as a training loss, from a backbone file on disk: nothing is downloaded."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from letit_dist.errors import UserError
from letit_dist.published import read_published, state_dict


class PerceptualLoss(nn.Module):
    """Mean LPIPS distance between two batches of images in [-1, 1], through the `lpips` package.

    `weights` is the torchvision ImageNet file of the backbone (vgg16-397923af.pth, alexnet-owt-7be5be79.pth,
    squeezenet1_1-b8a52dc0.pth, or another with these keys); the linear heads come with `lpips`.
    All of it is frozen; a recipe holds it as a companion, outside its own parameters and state dict.

    Raises UserError when the package or the file is missing, or when the file is of another network.
    """

    def __init__(self, weights: str | Path, net: Literal["vgg", "alex", "squeeze"] = "vgg"):
        super().__init__()
        try:
            from lpips import LPIPS
        except ImportError:
            raise UserError("the perceptual loss needs the package lpips: pip install 'letit_dist[eval]'") from None
        if not Path(weights).is_file():
            raise UserError(f"no such file: {weights} (the torchvision weights of the LPIPS backbone; not downloaded)")
        backbone = state_dict(read_published(weights), weights)
        # Random weights that are replaced below: not worth a change in everybody else's random numbers.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # lpips calls torchvision with its deprecated `pretrained`
            self.network = LPIPS(net=net, pnet_rand=True, verbose=False)
        _load_backbone(self.network.net, backbone, f"{weights} as the {net} backbone")
        self.eval().requires_grad_(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """(B, 3, H, W) twice, in [-1, 1], to a scalar; gradients flow to both arguments."""
        # Features are divided by their norm, which bfloat16 does not survive.
        dtype = self.network.scaling_layer.shift.dtype
        with torch.autocast(reconstruction.device.type, enabled=False):
            return self.network(reconstruction.to(dtype), images.to(dtype)).mean()


def _load_backbone(net: nn.Module, backbone: dict[str, Tensor], where: str) -> None:
    # lpips cuts torchvision's `features` into slices whose layers keep their numbers: slice2.3.x = features.3.x
    own = {name: re.sub(r"^slice\d+\.", "features.", name) for name in net.state_dict()}
    shapes = {own[name]: tensor.shape for name, tensor in net.state_dict().items()}
    found = {name: tensor for name, tensor in backbone.items() if not name.startswith("classifier.")}
    problems = [f"missing {name}" for name in shapes if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in shapes]
    problems += [
        f"{name}: expected shape {tuple(shape)}, got {tuple(found[name].shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{where}: another network's weights: {'; '.join(problems[:8])}{more}")
    net.load_state_dict({name: found[key] for name, key in own.items()})
