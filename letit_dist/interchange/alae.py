"""Published ALAE checkpoints (podgorskiy's) to `ALAE` and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from letit_dist.autoencoders.alae import ALAE, ALAEConfig
from letit_dist.config import parse_config
from letit_dist.errors import UserError
from letit_dist.pretrained import check_exactly, load_exactly
from letit_dist.published import read_published, state_dict

# The networks of a file; each but the last has a running average beside it, with this suffix.
_NETWORKS = ("discriminator", "generator", "mapping_tl", "mapping_fl", "dlatent_avg")
_TWIN = "_s"
# Later names of two of them.
_RENAMED = {"mapping_d": "mapping_tl", "mapping_f": "mapping_fl"}
# Classes of the published training code that its files hold among the statistics of the losses.
_STATISTICS = ("tracker.RunningMeanTorch", "tracker.RunningMean")

State = Mapping[str, Tensor]


def import_alae(path: str | Path, *, weights: Literal["average", "training"] = "average") -> ALAE:
    """Read a published checkpoint, `torch.save` of {"models": {...}, "auxiliary": {...}}, frozen, in eval mode.

    "average" takes the running averages (LETIT does), "training" the weights that were trained. Every size comes
    from the shapes; `max_channels` is therefore the largest width there is, also where the published
    configuration allowed more. Raises UserError for a file that is no such checkpoint, with all networks or all
    keys missing, left over or mis-shaped, under their published names.
    """
    if weights not in ("average", "training"):
        raise UserError(f"unknown weights {weights!r} of an ALAE checkpoint (known: average, training)")
    twin = _TWIN if weights == "average" else ""
    networks = _read(Path(path))
    published = _choose(networks, twin, path)
    model = ALAE(_infer(published, twin, path))
    expected = {
        f"{_title(network, twin)}.{key}": tensor
        for network, state in _networks(model).items()
        for key, tensor in state.items()
    }
    check_exactly(expected, published, path)
    blurs = [name for name in expected if name.endswith(".blur.weight")]
    wrong = [name for name in blurs if not torch.allclose(published[name].float(), expected[name], rtol=0, atol=1e-6)]
    if wrong:
        raise UserError("\n".join(f"{path}: {name}: not the blur [1 2 1] x [1 2 1] / 16" for name in wrong))
    tensors = {ours: published[f"{_title(network, twin)}.{theirs}"] for network, theirs, ours in _pairs(model.config)}
    load_exactly(model, tensors, path)
    return model.eval().requires_grad_(False)


def export_alae(model: ALAE, average: ALAE | None = None) -> dict[str, dict[str, Any]]:
    """What the published code loads once it is saved by `torch.save`; the tensors are the models' own.

    `average` becomes the twins of the averages; without it, `model` stands in both places. The mean of w has
    no twin and is that of `model`. Raises UserError for two models of different configurations.
    """
    if average is not None and average.config != model.config:
        raise UserError(f"an average of another network: {average.config} beside {model.config}")
    models = _networks(model)
    twins = _networks(model if average is None else average)
    models |= {f"{network}{_TWIN}": twins[network] for network in _NETWORKS[:-1]}
    return {"models": models, "auxiliary": {}}


def _networks(model: ALAE) -> dict[str, dict[str, Tensor]]:
    """The published state dicts of one set of weights, by network."""
    own = model.state_dict()
    networks: dict[str, dict[str, Tensor]] = {network: {} for network in _NETWORKS}
    for network, theirs, ours in _pairs(model.config):
        networks[network][theirs] = own[ours]
    line = own["generator.const"].new_tensor([1.0, 2.0, 1.0]) / 4
    for level in range(model.config.levels):
        blur = torch.outer(line, line).repeat(model.config.channels(level), 1, 1, 1)
        networks["generator"][f"decode_block.{level}.blur.weight"] = blur
        networks["discriminator"][f"encode_block.{model.top - level}.blur.weight"] = blur
    return networks


def _pairs(config: ALAEConfig) -> Iterator[tuple[str, str, str]]:
    """(network, published key, our key) of every tensor; published encoders count from the highest level down."""
    for level in range(config.levels):
        from_top = config.levels - 1 - level
        for part in ("weight", "bias"):
            yield "discriminator", f"from_rgb.{from_top}.from_rgb.{part}", f"encoder.from_rgb.{level}.{part}"
            yield "generator", f"to_rgb.{level}.to_rgb.{part}", f"generator.to_rgb.{level}.{part}"
        for i in (1, 2):
            theirs, ours = f"encode_block.{from_top}", f"encoder.blocks.{level}"
            yield "discriminator", f"{theirs}.conv_{i}.weight", f"{ours}.conv{i}.weight"
            yield "discriminator", f"{theirs}.bias_{i}", f"{ours}.bias{i}"
            for part in ("weight", "bias"):
                yield "discriminator", f"{theirs}.style_{i}.{part}", f"{ours}.style{i}.{part}"
            theirs, ours = f"decode_block.{level}", f"generator.blocks.{level}"
            if level or i == 2:
                yield "generator", f"{theirs}.conv_{i}.weight", f"{ours}.conv{i}.weight"
            yield "generator", f"{theirs}.noise_weight_{i}", f"{ours}.styled{i}.noise"
            yield "generator", f"{theirs}.bias_{i}", f"{ours}.styled{i}.bias"
            for part in ("weight", "bias"):
                yield "generator", f"{theirs}.style_{i}.{part}", f"{ours}.styled{i}.style.{part}"
    yield "generator", "const", "generator.const"
    for part in ("weight", "bias"):
        for i in range(3):
            yield "mapping_tl", f"map_blocks.{i}.{part}", f"critic.layers.{i}.{part}"
        for i in range(config.mapping_layers):
            yield "mapping_fl", f"map_blocks.{i}.fc.{part}", f"mapping.layers.{i}.{part}"
    yield "dlatent_avg", "buff", "w_mean"


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file by network, under the names of `_NETWORKS` and their twins."""
    found = read_published(path, keep="models", ignored=_STATISTICS)
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, dict):
        keys = f" with keys {', '.join(map(str, list(found)[:5]))}" if isinstance(found, dict) else ""
        raise UserError(
            f"{path}: no published ALAE: expected a dict with 'models', found a {type(found).__name__}{keys}"
        )
    networks: dict[str, dict[str, Tensor]] = {}
    for title, state in models.items():
        if state is None:  # how the published code saves a network that it did not build
            continue
        stem, twin = (title[: -len(_TWIN)], _TWIN) if str(title).endswith(_TWIN) else (str(title), "")
        name = _RENAMED.get(stem, stem) + twin
        if name in networks:
            raise UserError(f"{path}: models/{title} stands beside another {name}, which is the same network")
        networks[name] = state_dict(state, f"{path}: models/{title}")
    return networks


def _title(network: str, twin: str) -> str:
    return network if network == _NETWORKS[-1] else network + twin


def _choose(networks: Mapping[str, State], twin: str, where: str | Path) -> dict[str, Tensor]:
    """The tensors of one set of weights, under "network.key"."""
    known = {_title(network, twin) for network in _NETWORKS for twin in ("", _TWIN)}
    wanted = [_title(network, twin) for network in _NETWORKS]
    problems = [f"missing network {name}" for name in wanted if name not in networks]
    problems += [f"unexpected network {name}" for name in networks if name not in known]
    if problems:
        problems.append(f"the file holds {', '.join(networks) or 'none'}")
        problems.append(f"weights='average' reads the networks with {_TWIN}, weights='training' those without")
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))
    return {f"{name}.{key}": tensor for name in wanted for key, tensor in networks[name].items()}


def _infer(state: State, twin: str, where: str | Path) -> ALAEConfig:
    encoder, generator, mapping = (_title(network, twin) for network in ("discriminator", "generator", "mapping_fl"))
    levels = _count(state, rf"{encoder}\.(?:from_rgb|encode_block)\.(\d+)\..*")
    others = _count(state, rf"{generator}\.(?:to_rgb|decode_block)\.(\d+)\..*")
    if levels != others:
        raise UserError(f"{where}: networks of different sizes: {encoder} has {levels} levels, {generator} {others}")
    top, bottom = f"{encoder}.encode_block.0", f"{encoder}.encode_block.{levels - 1}"
    rgb = f"{encoder}.from_rgb.0.from_rgb"
    # Each size at several places, (key, dimension), so that a wrong one is named and not believed.
    places = {
        "start_channels": [(f"{rgb}.weight", 0), (f"{rgb}.bias", 0), (f"{top}.bias_1", 1)],
        "max_channels": [(f"{bottom}.conv_2.weight", 0), (f"{bottom}.bias_2", 1), (f"{generator}.const", 1)],
        "latent_dim": [("dlatent_avg.buff", 1), (f"{top}.style_1.bias", 0), (f"{bottom}.style_2.bias", 0)],
    }
    sizes = {}
    for size, keys in places.items():
        found = Counter(state[key].shape[dim] for key, dim in keys if key in state and state[key].ndim > dim)
        if not found:
            raise UserError(f"{where}: no published ALAE: no {' and no '.join(key for key, _ in keys)}")
        sizes[size] = found.most_common(1)[0][0]
    layers = _count(state, rf"{mapping}\.map_blocks\.(\d+)\..*")
    tree = {"kind": "alae", "resolution": 2 << levels, "mapping_layers": layers, **sizes}
    return parse_config(ALAEConfig, tree, where=str(where))


def _count(state: State, pattern: str) -> int:
    # By any of a layer's keys, so that one that is missing is reported under its own name.
    return len({found[1] for name in state if (found := re.fullmatch(pattern, name))})
