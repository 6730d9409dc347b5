"""Published LETIT energies to ours and back.

Theirs return f = -E and ascend it; ours return E and descend it. The last layer is linear, so negating it is
the whole conversion of the sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from letit_dist.config import parse_config
from letit_dist.energy.convolutional import ConvEnergy, ConvEnergyConfig
from letit_dist.energy.mlp import MLPEnergy, MLPEnergyConfig
from letit_dist.energy.models import EnergyConfig, EnergyModel, build_energy
from letit_dist.errors import UserError
from letit_dist.pretrained import check_exactly, load_exactly
from letit_dist.published import read_published, state_dict

State = Mapping[str, Tensor]


def import_energy(path: str | Path, *, key: str | None = None) -> EnergyModel:
    """Read a published energy (`torch.save` of a state dict), frozen, in eval mode, with our sign.

    Kind and config come from the shapes; `key` names the state dict in a file that holds several (the energy
    and its average, say). Raises UserError for a file that is no such checkpoint, with all keys missing, left
    over or mis-shaped.
    """
    published = _read(Path(path), key)
    config = _infer(published, path)
    assert config.latent_shape is not None
    energy = build_energy(config, config.latent_shape)
    assert isinstance(energy, (MLPEnergy, ConvEnergy))
    check_exactly(export_energy(energy), published, f"{path} as {config.kind} on latents {config.latent_shape}")
    own = energy.state_dict()
    tensors = {
        ours: (_sign(energy, ours) * published[theirs]).reshape(own[ours].shape) for ours, theirs in _pairs(energy)
    }
    load_exactly(energy, tensors, path)
    return energy.eval().requires_grad_(False)


def export_energy(energy: EnergyModel) -> dict[str, Tensor]:
    """The state that the published code loads; raises UserError for what it cannot express."""
    if isinstance(energy, MLPEnergy) and energy.config.activation != "leaky_relu":
        raise UserError(f"published energies have leaky_relu only, this one has {energy.config.activation}")
    if not isinstance(energy, (MLPEnergy, ConvEnergy)):
        raise UserError(f"no published form of energies of kind {energy.config.kind!r}")
    if energy.config.conditions:
        raise UserError(
            "no published form of an energy with conditions: export that of one of them (`energy.at(name)`)"
        )
    if energy.unit != 1:
        raise UserError(f"published energies see latents as they are, this one in units of {energy.unit:g}")
    own = energy.state_dict()
    published = {theirs: (_sign(energy, ours) * own[ours]).contiguous() for ours, theirs in _pairs(energy)}
    # Our last unit is a 1x1 convolution, theirs a linear layer.
    linear = "linear.linear.weight_orig"
    return {name: value.flatten(1) if name == linear else value for name, value in published.items()}


def _read(path: Path, key: str | None) -> dict[str, Tensor]:
    found = read_published(path)
    if key is None:
        hint = " (name the entry that is one as `key`)" if isinstance(found, dict) else ""
        return state_dict(found, f"{path}{hint}")
    if not isinstance(found, dict) or key not in found:
        entries = ", ".join(map(str, list(found)[:8])) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{path}: no entry {key!r} (it holds {entries})")
    return state_dict(found[key], f"{path}: {key}")


def _infer(state: State, where: str | Path) -> EnergyConfig:
    first = state.get("mlp.0.weight")
    if first is not None and first.ndim == 2:
        layers = len(_numbers(state, r"mlp\.(\d+)\..*")) - 1
        if layers > 2:
            raise UserError(f"{where}: {layers} hidden layers, published MLP energies have 0, 1 or 2")
        hidden = {} if layers == 0 else {"hidden": len(first)}
        found = {"layers": layers, "latent_shape": (first.shape[1],), **hidden}
        return parse_config(MLPEnergyConfig, found, where=str(where))
    stem = state.get("convs.0.conv.weight_orig")
    if stem is not None and stem.ndim == 4:
        size = 4 * 2 ** len(_numbers(state, r"convs\.(\d+)\.(?:conv1|conv2|skip)\..*"))
        attention = bool(_numbers(state, r"convs\.(\d+)\.(?:gamma|query_conv|key_conv|value_conv).*"))
        multiplier = max(1, len(stem) // (32 if size >= 16 else 64))
        return ConvEnergyConfig(latent_shape=(stem.shape[1], size, size), multiplier=multiplier, attention=attention)
    keys = ", ".join(list(state)[:5]) or "nothing"
    raise UserError(f"{where}: no published energy: neither mlp.0.weight nor convs.0.conv.weight_orig, but {keys}")


def _numbers(state: State, pattern: str) -> set[str]:
    # By any of a layer's keys, so that one that is missing is reported under its own name.
    return {found[1] for name in state if (found := re.fullmatch(pattern, name))}


def _pairs(energy: MLPEnergy | ConvEnergy) -> Iterator[tuple[str, str]]:
    """(our key, published key) of every tensor."""
    if isinstance(energy, MLPEnergy):
        yield from ((name, name.replace("layers.", "mlp.", 1)) for name in energy.state_dict())
        return
    modules = {"stem": "convs.0.conv", "linear": "linear.linear"}
    modules |= {f"conv{i}": f"final_conv.conv{i}.0.conv" for i in (1, 2)}
    attended = len(energy.blocks) - 2 if energy.config.attention else len(energy.blocks)
    for i in range(len(energy.blocks)):
        theirs = f"convs.{1 + i + (i > attended)}"  # their attention takes a number of its own
        for part in ("conv1", "conv2", "skip"):
            modules[f"blocks.{i}.{part}"] = f"{theirs}.{part}.0.conv"
    for ours, theirs in modules.items():
        yield f"{ours}.weight", f"{theirs}.weight_orig"
        yield f"{ours}.bias", f"{theirs}.bias"
    if energy.config.attention:
        theirs = f"convs.{attended + 2}"
        yield "attention.gamma", f"{theirs}.gamma"
        for part in ("query", "key", "value"):
            yield f"attention.{part}.weight", f"{theirs}.{part}_conv.weight"
            yield f"attention.{part}.bias", f"{theirs}.{part}_conv.bias"


def _sign(energy: EnergyModel, ours: str) -> int:
    last = f"layers.{2 * energy.config.layers}" if isinstance(energy, MLPEnergy) else "linear"
    return -1 if ours in (f"{last}.weight", f"{last}.bias") else 1
