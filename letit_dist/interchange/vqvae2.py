"""Published VQ-VAE-2 checkpoints, rosinality's and LETIT's, to `VQVAE2` and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from torch import Tensor

from letit_dist.autoencoders.vqvae2 import VQVAE2, VQVAE2Config
from letit_dist.config import parse_config
from letit_dist.errors import UserError
from letit_dist.pretrained import check_exactly, load_exactly
from letit_dist.published import read_published, state_dict

# Names under which training scripts put the state dict when they save more than it.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
# Our attributes by published ones; the quantisers hold buffers, the rest convolutions.
_STACKS = {"enc_b": "bottom_encoder", "enc_t": "top_encoder", "dec_t": "top_decoder", "dec": "decoder"}
_CONVS = {
    "quantize_conv_t": "top_projection",
    "quantize_conv_b": "bottom_projection",
    "upsample_t": "top_upsample",
}
_QUANTIZERS = {"quantize_t": "top_quantizer", "quantize_b": "bottom_quantizer"}
# The published codebooks are (code_dim, codes), ours (codes, code_dim).
_TRANSPOSED = ("embed", "embed_avg")


def import_vqvae2(
    path: str | Path, *, resolution: int, variant: Literal["rosinality", "letit"] = "rosinality"
) -> VQVAE2:
    """Read a published checkpoint (`torch.save` of a state dict, bare or wrapped), frozen, in eval mode.

    Widths, depths, codebook size and layer noise come from the shapes. The shapes do not tell `resolution`
    (the side of the training images) nor `variant`: LETIT's residual skips carry ReLU(x), rosinality's x.
    Raises UserError for a file that is no such checkpoint, with all keys missing, left over or mis-shaped.
    """
    if variant not in ("rosinality", "letit"):
        raise UserError(f"unknown variant {variant!r} of VQ-VAE-2 (known: rosinality, letit)")
    published = _read(Path(path))
    config = _infer(published, resolution, relu_skip=variant == "letit", where=path)
    model = VQVAE2(config)
    check_exactly(export_vqvae2(model), published, path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".updates")}
    for theirs, ours in _pairs(config):
        tensor = published[theirs]
        tensors[ours] = tensor.t().contiguous() if ours.endswith(_TRANSPOSED) else tensor
    load_exactly(model, tensors, path)
    return model.eval().requires_grad_(False)


def export_vqvae2(model: VQVAE2) -> dict[str, Tensor]:
    """The weights under the published keys and in the published layout, on the model's device."""
    own = model.state_dict()
    return {
        theirs: own[ours].t().contiguous() if ours.endswith(_TRANSPOSED) else own[ours]
        for theirs, ours in _pairs(model.config)
    }


def _pairs(config: VQVAE2Config) -> Iterator[tuple[str, str]]:
    """(published key, our key) of every tensor; published layers are numbered with the ReLUs between them."""
    layers = dict(_CONVS)
    for theirs, ours in _STACKS.items():
        noise = config.noise and theirs == "dec"
        if theirs.startswith("enc"):
            convs = 3 if theirs == "enc_b" else 2
            layers |= {f"{theirs}.blocks.{2 * i}": f"{ours}.convs.{i}" for i in range(convs)}
            first = 2 * convs - 1
        else:
            layers[f"{theirs}.blocks.0"] = f"{ours}.conv"
            first = 1
            up = first + config.residual_blocks + 1
            layers[f"{theirs}.blocks.{up}"] = f"{ours}.ups.0"
            if theirs == "dec":
                layers[f"{theirs}.blocks.{up + 2 + noise}"] = f"{ours}.ups.1"
            if noise:
                yield f"{theirs}.blocks.{up + 1}.weight", f"{ours}.noise.weight"
        for block in range(config.residual_blocks):
            at, to = f"{theirs}.blocks.{first + block}.conv", f"{ours}.blocks.{block}"
            layers |= {f"{at}.1": f"{to}.conv1", f"{at}.{3 + noise}": f"{to}.conv2"}
            if noise:
                yield f"{at}.2.weight", f"{to}.noise1.weight"
                yield f"{at}.5.weight", f"{to}.noise2.weight"
    for theirs, ours in layers.items():
        yield f"{theirs}.weight", f"{ours}.weight"
        yield f"{theirs}.bias", f"{ours}.bias"
    for theirs, ours in _QUANTIZERS.items():
        for buffer in ("embed", "cluster_size", "embed_avg"):
            yield f"{theirs}.{buffer}", f"{ours}.{buffer}"


def _read(path: Path) -> dict[str, Tensor]:
    found = read_published(path)
    for name in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    return state_dict(found, path)


def _infer(tensors: dict[str, Tensor], resolution: int, *, relu_skip: bool, where: str | Path) -> VQVAE2Config:
    needed = {"enc_b.blocks.2.weight": 4, "enc_b.blocks.5.conv.1.weight": 4, "quantize_t.embed": 2}
    wrong = [name for name, ndim in needed.items() if name not in tensors or tensors[name].ndim != ndim]
    if wrong:
        raise UserError(f"{where}: not a published VQ-VAE-2: no {', '.join(wrong)} of the expected rank")
    blocks = sum(bool(re.fullmatch(r"enc_b\.blocks\.\d+\.conv\.1\.weight", name)) for name in tensors)
    code_dim, codes = tensors["quantize_t.embed"].shape
    tree = {
        "kind": "vqvae2",
        "resolution": resolution,
        "channels": tensors["enc_b.blocks.2.weight"].shape[0],
        "residual_blocks": blocks,
        "residual_channels": tensors["enc_b.blocks.5.conv.1.weight"].shape[0],
        "code_dim": code_dim,
        "codes": codes,
        # Layer noise shifts the decoder's numbering; its first layer sits where a ReLU is without it.
        "noise": "dec.blocks.1.conv.2.weight" in tensors,
        "relu_skip": relu_skip,
    }
    return parse_config(VQVAE2Config, tree, where=str(where))
