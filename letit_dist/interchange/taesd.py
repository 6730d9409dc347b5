"""Published state dicts of the TAESD family to `TAESD`; the layers are read off the tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from letit_dist.autoencoders.taesd import TAESD, TAESDConfig
from letit_dist.config import parse_config
from letit_dist.errors import UserError
from letit_dist.pretrained import load_exactly
from letit_dist.published import read_tensors

State = dict[str, Tensor]
_SIDES = ("encoder", "decoder")


def import_taesd(path: str | Path, *, decoder: str | Path | None = None, **settings: Any) -> TAESD:
    """A frozen model in eval mode, in float32, from the encoder's file `path` and the `decoder`'s.

    Without `decoder`, `path` is a folder with one file of each (`*encoder*`, `*decoder*`), or one file of both whose
    keys open with encoder. and decoder. (diffusers' AutoencoderTiny, with its own numbers, is one). `settings` are
    those of `TAESDConfig` that no tensor tells: the resolution, and the scale, shift and tile.

    Raises UserError for files that are no such autoencoder, with all keys missing, left over or mis-shaped.
    """
    states = _read(Path(path), None if decoder is None else Path(decoder))
    tree = {**settings, **_infer(states, path)}
    model = TAESD(parse_config(TAESDConfig, tree))
    tensors = {f"{side}.{name}": tensor.float() for side in _SIDES for name, tensor in states[side].items()}
    load_exactly(model, tensors, path)
    return model.eval().requires_grad_(False)


def _read(path: Path, decoder: Path | None) -> dict[str, State]:
    if decoder is None and path.is_dir():
        paths = {side: _only(path, side) for side in _SIDES}
        return {side: read_tensors(file) for side, file in paths.items()}
    if decoder is not None:
        return {"encoder": read_tensors(path), "decoder": read_tensors(decoder)}
    found = read_tensors(path)
    states = {
        side: {k.removeprefix(f"{side}."): v for k, v in found.items() if k.startswith(f"{side}.")} for side in _SIDES
    }
    if not all(states.values()) or sum(map(len, states.values())) < len(found):
        raise UserError(
            f"{path}: expected the tensors of both sides (encoder.*, decoder.*), found {', '.join(list(found)[:5])}; "
            "of two files give the encoder's, and the decoder's as --decoder"
        )
    if all(name.startswith("layers.") for state in states.values() for name in state):
        # diffusers numbers the decoder without its first layer, which has no weights.
        states = {side: {_shifted(name, side == "decoder"): t for name, t in states[side].items()} for side in _SIDES}
    return states


def _shifted(name: str, by: int) -> str:
    _, number, rest = name.split(".", 2)
    return f"{int(number) + by}.{rest}"


def _only(folder: Path, side: str) -> Path:
    files = sorted(p for p in folder.iterdir() if side in p.name and p.suffix in (".pth", ".pt", ".safetensors"))
    if len(files) != 1:
        listed = ", ".join(p.name for p in files) or "none"
        raise UserError(f"{folder}: one file of weights with {side!r} in its name is needed, found {listed}")
    return files[0]


def _infer(states: dict[str, State], where: str | Path) -> dict[str, Any]:
    """What the names and shapes tell: blocks and branches of each level, width, latent channels."""
    found: dict[str, Any] = {}
    for side in _SIDES:
        state = states[side]
        blocks, branches = [0], [False]
        places = sorted({int(name.split(".")[0]) for name in state if re.match(r"\d+\.", name)})
        for place in places:
            if f"{place}.conv.0.weight" in state:
                blocks[-1] += 1
                branches[-1] |= f"{place}.pool.0.weight" in state
            elif f"{place}.weight" in state and f"{place}.bias" not in state:  # where the size changes
                blocks.append(0)
                branches.append(False)
        # The decoder's layer 0 has no weights.
        first = 1 if side == "decoder" else 0
        if not places or places[0] != first or 0 in blocks:
            raise UserError(
                f"{where}: no {side} of the TAESD family: expected numbered convolutions and blocks "
                f"({first}.weight, {1 + 2 * first}.conv.0.weight), found {', '.join(list(state)[:5]) or 'nothing'}"
            )
        found |= {f"{side}_blocks": blocks, f"{side}_branches": branches}
        last = state.get(f"{places[-1]}.weight")
        if side == "encoder" and last is not None and last.ndim == 4:
            found |= {"latent_channels": last.shape[0], "width": last.shape[1]}
    return found
