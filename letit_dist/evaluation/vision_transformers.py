"""DINOv2 and CLIP as networks whose features are compared, from files in the layout of the Hugging Face Hub.

dinov2  ViT-L/14, the class token after the last norm: the Frechet distance FD-DINOv2 (2306.04675)
clip    ViT-L/14 at 336 pixels, the image embedding at unit length: CMMD (2401.09603)

Sizes are those of the published networks, and stand here: a file of another network does not fit them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from letit_dist.errors import UserError


@dataclass(frozen=True)
class Published:
    """A network, and what its paper's code does to an image before it."""

    name: str
    layer: str
    side: int
    crop: bool  # to the centred square first; otherwise the image is squeezed into one
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sizes: Mapping[str, Any]

    @property
    def resize(self) -> str:
        first = "centred square, " if self.crop else ""
        return f"{first}bicubic to {self.side}, antialiased, rounded"


_VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}

# Resize, mean and std: of dinov2 those of layer6ai-labs/dgm-eval (dgm_eval/models/dinov2.py, without --clean_resize),
# of clip those of google-research/cmmd (io_util.py, embedding.py) and OpenAI's CLIP.
PUBLISHED = {
    "dinov2": Published(
        "dinov2-vit-l14",
        "class token",
        224,
        False,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        {**_VIT_L, "mlp_ratio": 4, "image_size": 518, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    ),
    "clip": Published(
        "clip-vit-l14-336",
        "image embedding",
        336,
        True,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        {
            **_VIT_L,
            "intermediate_size": 4096,
            "projection_dim": 768,
            "image_size": 336,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    ),
}
_RANDOM_BLOCKS = 2  # of 24: random ones say no more the more there are
_OFFSET = 0.1


class VisionTransformer(nn.Module):
    """Images (B, 3, side, side), standardised -> features (B, D)."""

    def __init__(self, kind: str, network: nn.Module):
        super().__init__()
        self.kind, self.network = kind, network

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "dinov2":
            return self.network(pixel_values=images).last_hidden_state[:, 0]
        return F.normalize(self.network(pixel_values=images).image_embeds, dim=-1)


def build_random(kind: str) -> VisionTransformer:
    """The network with its first blocks alone, drawn from a fixed seed."""
    published = PUBLISHED[kind]
    few = min(_RANDOM_BLOCKS, published.sizes["num_hidden_layers"])
    model, config = _classes(kind, {**published.sizes, "num_hidden_layers": few})
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        network = VisionTransformer(kind, model(config))
    _fit_positions(network, published.side)
    return network


def build_from(kind: str, tensors: Mapping[str, Tensor], where: object) -> VisionTransformer:
    """The network with these published tensors; UserError, opened by `where`, if they are another network's."""
    published = PUBLISHED[kind]
    model, config = _classes(kind, dict(published.sizes))
    if kind == "clip":  # the file holds the reader of texts too
        image = ("vision_model.", "visual_projection.")
        tensors = {name: value for name, value in tensors.items() if name.startswith(image)}
        tensors.pop("vision_model.embeddings.position_ids", None)
    with torch.random.fork_rng(devices=[]), _quiet():
        network, found = model.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True, ignore_mismatched_sizes=True
        )
    # Items are names, or begin with one.
    problems = {
        word: sorted(item if isinstance(item, str) else item[0] for item in found[f"{key}_keys"])
        for word, key in (("missing", "missing"), ("unexpected", "unexpected"), ("of another shape", "mismatched"))
    }
    lines = [f"{len(names)} {word} ({', '.join(names[:2])}, ...)" for word, names in problems.items() if names]
    if lines:
        raise UserError(f"{where}: weights of another network than {published.name}: {'; '.join(lines)}")
    whole = VisionTransformer(kind, network.float())
    _fit_positions(whole, published.side)
    return whole


def check_installed(kind: str) -> None:
    """UserError unless the library that has these networks is there."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(f"--extractor {kind} needs the package transformers: pip install 'letit_dist[eval]'") from None


def _classes(kind: str, sizes: Mapping[str, Any]) -> tuple[Any, Any]:
    import transformers

    names = {"dinov2": ("Dinov2Model", "Dinov2Config"), "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig")}
    model, config = (getattr(transformers, name) for name in names[kind])
    # One formula on every device: what torch fuses depends on it.
    return model, config(**sizes, attn_implementation="eager")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's bar and its table of tensors: what is wrong with them is said once, by us."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


@torch.no_grad()
def _fit_positions(network: VisionTransformer, side: int) -> None:
    """Bring DINOv2's position embeddings (1, 1 + n * n, D) from the grid it was trained at to that of `side`.

    As facebookresearch/dinov2 does it, which adds 0.1 to the new side: that moves every sampling point a little, and
    transformers leaves it out.
    """
    if network.kind != "dinov2":
        return
    inside: Any = network.network.embeddings
    grid, old = side // PUBLISHED[network.kind].sizes["patch_size"], inside.position_embeddings
    own = round((old.shape[1] - 1) ** 0.5)
    if own == grid:
        return
    rows = old[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
    factor = (grid + _OFFSET) / own
    rows = F.interpolate(rows, scale_factor=(factor, factor), mode="bicubic").flatten(2).transpose(1, 2)
    inside.position_embeddings = nn.Parameter(torch.cat([old[:, :1], rows], dim=1))
