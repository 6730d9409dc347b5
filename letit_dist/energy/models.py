"""Energies of latents: a small MLP for any latents, a residual convolutional network for maps.

E(z) is low on the target domain, so that p(z) = exp(-E(z)) / Z (eq. 5), everywhere in this package. The
published code trains f = -E; `interchange.energy` flips the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from letit_dist import hub, pretrained
from letit_dist.cards import Card
from letit_dist.config import StrictConfig, as_tree, parse_kind
from letit_dist.errors import UserError
from letit_dist.registry import ENERGIES

_SLOPE = 0.2  # of LeakyReLU
Weights = tuple[Tensor, Tensor]  # of one layer: weight, bias
Effective = tuple[Weights, list[tuple[Weights, ...]], tuple[Weights, ...]]  # stem, blocks, head
M = TypeVar("M", bound="EnergyModel")


_TO = " to "


def condition_of(on: Literal["target", "pair"], source: str, target: str) -> str:
    """Name of the condition under which `source` is translated to `target`, for a `condition_on`."""
    return target if on == "target" else f"{source}{_TO}{target}"


def conditions_of(on: Literal["target", "pair"], domains: Sequence[str]) -> list[str]:
    """All conditions between these domains."""
    return list(domains) if on == "target" else [condition_of(on, *pair) for pair in permutations(domains, 2)]


def split_condition(name: str) -> tuple[str, str]:
    """(source, target) of a condition of `condition_on: pair`."""
    source, _, target = name.partition(_TO)
    return source, target


class EnergyConfig(StrictConfig):
    """Base of every energy's schema."""

    kind: str
    latent_shape: tuple[PositiveInt, ...] | None = Field(
        None, description="shape of one sample's latents; null = the autoencoder's, filled in by the program"
    )
    latent_unit: PositiveFloat | Literal["auto"] = Field(
        1.0,
        description="the energy sees latents / latent_unit and its chains step in that unit; 1 = as published; "
        "auto = the latents' standard deviation, measured by the program, so that one setting of the chain suits "
        "autoencoders whose latents differ in scale",
    )
    condition_on: Literal["target", "pair"] | None = Field(
        None,
        description="one energy between several domains (data.domains), with a last layer for each target or for each "
        "pair of source and target; null = one source, one target",
    )
    conditions: tuple[str, ...] = Field((), description="their names; filled in by the program")


class EnergyModel(nn.Module):
    """Base of every energy: latents (B, *L) -> energies (B,), low on the target domain.

    With conditions, the last layer has a row for each of them, and `condition` (B,), int64, says which of the
    energies each sample is for; all share what lies below.
    """

    config_class: ClassVar[type[EnergyConfig]]
    last: str  # name of the last layer: the rows of its weight and bias belong to the conditions
    tiny: ClassVar[EnergyConfig]  # the smallest useful config: parametrised tests pick it up

    def __init__(self, config: EnergyConfig):
        super().__init__()
        if config.latent_shape is None:
            raise UserError(f"energy of kind {config.kind!r}: latent_shape is not known yet, use build_energy")
        if config.latent_unit == "auto":
            raise UserError(f"energy of kind {config.kind!r}: latent_unit is not measured yet, use build_energy")
        if config.condition_on is not None and not config.conditions:
            raise UserError(f"energy of kind {config.kind!r}: the conditions are not known yet, use build_energy")
        self.config = config
        self.extra: dict[str, Any] = {}  # what the folder that this was read from holds beside the weights

    @property
    def latent_shape(self) -> tuple[int, ...]:
        assert self.config.latent_shape is not None
        return self.config.latent_shape

    @property
    def unit(self) -> float:
        """What latents are divided by before the energy sees them; samplers step in this unit."""
        assert not isinstance(self.config.latent_unit, str)
        return self.config.latent_unit

    def forward(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, *L) -> (B,)"""
        raise NotImplementedError

    def folded(self) -> Callable[..., Tensor]:
        """The same function with all that depends on the weights alone computed once.

        For loops in which the weights do not change, such as a Langevin chain: a later change of the weights
        does not reach the returned function.
        """
        return self

    def at(self, condition: str) -> EnergyModel:
        """The energy of one condition, as one that knows of no conditions; its tensors are copies."""
        names = self.config.conditions
        if condition not in names:
            raise UserError(f"no such condition: {condition!r} (this energy has {', '.join(names) or 'none'})")
        alone = type(self)(self.config.model_copy(update={"condition_on": None, "conditions": ()}))
        row = names.index(condition)
        tensors = {
            name: tensor[row : row + 1] if name.rpartition(".")[0] == self.last else tensor
            for name, tensor in self.state_dict().items()
        }
        alone.load_state_dict(tensors)
        alone.extra = self.extra
        return alone.to(next(self.parameters()).device).train(self.training).requires_grad_(False)

    def _chosen(self, energies: Tensor, condition: Tensor | None) -> Tensor:
        """(B, conditions) -> (B,)"""
        if (condition is None) != (self.config.condition_on is None):
            raise ValueError("an energy with conditions needs one for every sample, one without takes none")
        return energies.squeeze(1) if condition is None else energies.gather(1, condition[:, None]).squeeze(1)

    def fingerprint(self) -> str:
        """16 hex digits that identify config and weights."""
        return pretrained.tensors_fingerprint(as_tree(self.config), self.state_dict())

    def save_pretrained(self, folder: str | Path, *, card: Card | None = None, **extra: Any) -> str:
        """Write config.json and model.safetensors, `extra` beside the config, and with `card` a README.md; returns
        the fingerprint."""
        text = None if card is None else self._card_text(card, extra)
        return pretrained.write_folder(folder, as_tree(self.config), self.state_dict(), extra, card=text)

    def push_to_hub(self, repo_id: str, *, card: Card | None = None, private: bool = True, **extra: Any) -> str:
        """Send what `save_pretrained` writes, `self.extra` included, to the Hugging Face Hub; returns its address."""
        kept, card = {**self.extra, **extra}, card or Card()
        return hub.push(lambda folder: self.save_pretrained(folder, card=card, **kept), repo_id, private=private)

    def _card_text(self, card: Card, extra: dict[str, Any]) -> str:
        facts = {
            "energy": self.config.kind,
            "latents": " x ".join(map(str, self.latent_shape)),
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "fingerprint": self.fingerprint(),
            **{name: value for name, value in extra.items() if value is not None},
        }
        use = 'import letit_dist\n\nenergy = letit_dist.load_energy("this folder, or its id on the Hub")'
        return card.text(f"{self.config.kind} energy of latents", facts, use)

    @classmethod
    def from_pretrained(cls: type[M], folder: str | Path) -> M:
        """The energy of a folder, of a run's newest export, or of an id on the Hub (see `pretrained.find_folder`);
        frozen and in eval mode, on the CPU; `extra` holds what was kept beside it.

        Raises UserError for a folder that is missing, damaged or changed, an unknown kind, another kind than
        this class, and for keys that are missing, left over or of another shape (all listed).
        """
        folder = pretrained.find_folder(folder)
        tree, tensors = pretrained.read_folder(folder)
        config = parse_kind(ENERGIES, tree, str(Path(folder) / pretrained.CONFIG))
        model = ENERGIES.get(config.kind)(config)
        if not isinstance(model, cls):
            raise UserError(f"{folder}: holds a {type(model).__name__} ({config.kind}), not a {cls.__name__}")
        pretrained.load_exactly(model, tensors, Path(folder) / pretrained.WEIGHTS)
        model.extra = pretrained.read_extra(folder)
        return model.eval().requires_grad_(False)


def build_energy(
    config: EnergyConfig,
    latent_shape: tuple[int, ...],
    *,
    measured_unit: float | None = None,
    conditions: Sequence[str] = (),
) -> EnergyModel:
    """A new energy for latents (B, *latent_shape), initialised from torch's default generator.

    `measured_unit` fills in `latent_unit: auto`, `conditions` those of `condition_on`. Raises UserError if the config
    names another latent shape, or if its kind cannot see this one.
    """
    latent_shape = tuple(latent_shape)
    if config.latent_shape not in (None, latent_shape):
        raise UserError(
            f"energy.latent_shape is {config.latent_shape}, but the autoencoder's latents are {latent_shape}"
        )
    known: dict[str, Any] = {"latent_shape": latent_shape}
    if config.latent_unit == "auto" and measured_unit is not None:
        known["latent_unit"] = measured_unit
    if conditions:
        known["conditions"] = tuple(conditions)
    return ENERGIES.get(config.kind)(config.model_copy(update=known))


def load_energy(folder: str | Path) -> EnergyModel:
    """The energy of a folder, a run or an id on the Hub, of whatever kind; see `EnergyModel.from_pretrained`."""
    return EnergyModel.from_pretrained(folder)


class MLPEnergyConfig(EnergyConfig):
    """Paper, section 5: 512-2048-1 with LeakyReLU on ALAE latents."""

    kind: Literal["mlp"] = "mlp"
    layers: Literal[0, 1, 2] = Field(
        1, description="hidden layers; 0 = linear, whose Langevin chain adds the same vector to every sample"
    )
    hidden: PositiveInt = Field(2048, description="width of the hidden layers (no effect with layers 0)")
    activation: Literal["leaky_relu", "gelu"] = Field("leaky_relu", description="leaky_relu has slope 0.2")


@ENERGIES.register("mlp")
class MLPEnergy(EnergyModel):
    """Linear layers on flattened latents of any shape: L-1, L-h-1 or L-h-h-1."""

    config_class = MLPEnergyConfig
    tiny = MLPEnergyConfig(latent_shape=(16,), hidden=24)
    config: MLPEnergyConfig

    def __init__(self, config: MLPEnergyConfig):
        super().__init__(config)
        widths = [math.prod(self.latent_shape), *[config.hidden] * config.layers, max(1, len(config.conditions))]
        self.last = f"layers.{2 * config.layers}"
        self.layers = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            if i > 0:
                self.layers.append(nn.GELU() if config.activation == "gelu" else nn.LeakyReLU(_SLOPE))
            self.layers.append(nn.Linear(inputs, outputs))

    def forward(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._chosen(self.layers(latents.flatten(1) / self.unit), condition)

    def slope(self, condition: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Latents (B, *L) to dE/dlatents (B, *L), without a graph, for weights that do not change meanwhile.

        In closed form: a chain through narrow layers would spend its time in autograd's bookkeeping.
        """
        first, inner = self._inner_slope(condition)

        @torch.no_grad()
        def run(latents: Tensor) -> Tensor:
            gradient = inner(latents.flatten(1))
            if self.config.layers:
                gradient = gradient @ first
            if self.unit != 1:
                gradient = gradient / self.unit
            if gradient.shape == latents.shape and gradient.dtype == latents.dtype:
                return gradient
            return gradient.expand(len(latents), -1).reshape(latents.shape).to(latents.dtype)

        return run

    def descent(self, condition: Tensor | None = None) -> Callable[[Tensor, float, int], Tensor] | None:
        """(latents (B, *L), length, steps) to where `steps` steps by -length * dE/dlatents lead, as `slope`; None where
        that has no use.

        The last product of the slope and the step are one operation: narrow chains are bound by their number.
        """
        # Under autocast the step would be taken in the lower precision, with the whole path.
        if not self.config.layers or torch.is_autocast_enabled(next(self.parameters()).device.type):
            return None
        first, inner = self._inner_slope(condition)
        unit = self.unit

        @torch.no_grad()
        def run(latents: Tensor, length: float, steps: int) -> Tensor:
            flat = latents.flatten(1).clone()
            for _ in range(steps):
                flat.addmm_(inner(flat), first, alpha=-length / unit)
            return flat.view(latents.shape)

        return run

    def contrast(self, target: Tensor, translated: Tensor) -> tuple[Tensor, Tensor] | None:
        """Latents (B, *L) and (B', *L) to mean E(target) - mean E(translated), and both means (2,), detached; only the
        parameters get a gradient. None with conditions, under autocast and where latents want a gradient.

        The gradient is taken in closed form at once: for narrow layers most of a step would be autograd's.
        """
        lowered = torch.is_autocast_enabled(target.device.type)
        if self.config.conditions or lowered or target.requires_grad or translated.requires_grad:
            return None
        flat = torch.cat([target, translated]).flatten(1)
        parameters = [tensor for layer in self.layers[::2] for tensor in (layer.weight, layer.bias)]
        activation = self.layers[1] if self.config.layers else nn.Identity()
        flat = flat if self.unit == 1 else flat / self.unit
        return _Contrast.apply(flat, len(target), activation, self._bend, *parameters)

    @property
    def _bend(self) -> Callable[[Tensor, Tensor], Tensor]:
        return _through_gelu if self.config.activation == "gelu" else _through_leaky_relu

    def _inner_slope(self, condition: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The first layer's weight (h, L), and flat latents (B, L) to dE/d what that layer puts out (1 or B, h);
        without hidden layers to the last layer's weight."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        *hidden, (last, _) = [(layer.weight.detach(), layer.bias.detach()) for layer in linear]
        bend, unit = self._bend, self.unit
        activation = self.layers[1] if hidden else nn.Identity()
        # (1, h) or (B, h): without conditions the same for every row, until a slope is multiplied in
        last = last if condition is None else last[condition]

        def run(x: Tensor) -> Tensor:
            inputs = []
            if unit != 1:
                x = x / unit
            for layer, (weight, bias) in enumerate(hidden, 1):
                inputs.append(F.linear(x, weight, bias))
                if layer < len(hidden):
                    x = activation(inputs[-1])
            gradient = last
            for layer in range(len(hidden) - 1, -1, -1):
                gradient = bend(gradient, inputs[layer])
                if layer:
                    gradient = gradient @ hidden[layer][0]
            return gradient

        return (hidden[0][0] if hidden else last), run


class _Contrast(torch.autograd.Function):
    """Flat latents, those of the target first, to the difference of the two means of an MLP, and to both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        count: int,
        activation: nn.Module,
        bend: Callable[[Tensor, Tensor], Tensor],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights, biases = parameters[::2], parameters[1::2]
        inputs, before = [x], []
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            before.append(F.linear(inputs[-1], weight, bias))
            inputs.append(activation(before[-1]))
        values = F.linear(inputs[-1], weights[-1], biases[-1])
        means = torch.stack([part.mean() for part in values.tensor_split([count])])
        gradient = torch.full_like(values, 1 / count)
        gradient[count:].fill_(-1 / (len(values) - count))
        found: list[Tensor] = []
        for layer in range(len(weights) - 1, -1, -1):
            found[:0] = [gradient.t() @ inputs[layer], gradient.sum(0)]
            if layer:
                gradient = bend(gradient @ weights[layer], before[layer - 1])
        ctx.save_for_backward(*found)
        ctx.mark_non_differentiable(means)
        return means[0] - means[1], means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(gradient * found for found in ctx.saved_tensors)


def _through_leaky_relu(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient (1 or B, h) of what comes out at x (B, h), as one of what goes in."""
    return torch.ops.aten.leaky_relu_backward(gradient.expand_as(x), x, _SLOPE, False)


def _through_gelu(gradient: Tensor, x: Tensor) -> Tensor:
    # d/dx x Phi(x) = Phi(x) + x phi(x), as (1 + erf(u) + 2 u exp(-u^2) / sqrt(pi)) / 2 for u = x / sqrt(2), which is
    # the fewest operations. torch's own kernel takes three times as long on maps as narrow as these.
    u = x * math.sqrt(0.5)
    inner = torch.erf(u).addcmul_(u, torch.exp_((u * u).neg_()), value=2 / math.sqrt(math.pi))
    half = gradient * 0.5
    return torch.addcmul(half, half, inner)


class ConvEnergyConfig(EnergyConfig):
    """The energy of the published code for VQ-VAE-2 latents."""

    kind: Literal["conv"] = "conv"
    multiplier: PositiveInt = Field(
        1, description="m: 32 m channels above 8 pixels, 64 m at 8 and 4; at most 512 below 64 pixels"
    )
    attention: bool = Field(False, description="self-attention after the block from 16 to 8 pixels")


# The published code's swish is x * sigmoid(x) / 1.1, whose slope is at most 1. The division, and that of a residual sum
# by sqrt(2), stand in the weights of the layers behind: maps are passed over once less.
_SWISH = 1 / 1.1


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution as a product of matrices, which a map in channels_last is: (B, C, S, S) -> (B, C', S, S)."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class EqualConv2d(nn.Module):
    """Equalised convolution: stored weights are N(0, 1), those that convolve are times sqrt(2 / fan_in).

    All layers then move at one rate under one optimiser setting, whatever their width.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = math.sqrt(2 / (inputs * kernel**2))

    def effective(self, scale: float = 1.0) -> Weights:
        """What convolves, for an input that was left `scale` times too small."""
        return (self.weight * (self.scale * scale)).contiguous(memory_format=torch.channels_last), self.bias

    def effective_pooled(self, scale: float = 1.0) -> Weights:
        """One convolution of stride 2 that equals this one followed by 2x2 average pooling.

        The average over four shifts of a k x k kernel is a (k+1) x (k+1) kernel: 16 products for each of a
        quarter of the pixels in place of 9 for each pixel.
        """
        weight = self.weight * (self.scale / 4 * scale)
        weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
        weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
        return weight.contiguous(memory_format=torch.channels_last), self.bias


class Block(nn.Module):
    """Residual block that halves the side: (B, C, S, S) -> (B, C', S/2, S/2), the latter divided by `OUT`."""

    OUT = _SWISH / math.sqrt(2)

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = EqualConv2d(inputs, outputs, 3)
        self.conv2 = EqualConv2d(outputs, outputs, 3)
        self.skip = EqualConv2d(inputs, outputs, 1)

    def effective(self, scale: float) -> tuple[Weights, ...]:
        weight, bias = self.skip.effective(scale / _SWISH)
        return self.conv1.effective(scale), self.conv2.effective_pooled(_SWISH), (weight, bias / _SWISH)

    @staticmethod
    def run(x: Tensor, conv1: Weights, conv2: Weights, skip: Weights) -> Tensor:
        y = F.silu(F.conv2d(x, *conv1, padding=1))
        y = F.silu(F.conv2d(y, *conv2, stride=2, padding=1))
        # A 1x1 convolution and pooling commute; pooling first leaves a quarter of the products.
        return y + _pointwise(F.avg_pool2d(x, 2), *skip)


class SelfAttention(nn.Module):
    """Dot-product attention among pixels, unscaled, added with a weight that starts at 0: (B, C, S, S) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        # (B, C, S, S) -> (B, 1, S*S, C): one head
        q, k, v = (f(x).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + self.gamma * attended.squeeze(1).transpose(1, 2).reshape(x.shape)


@ENERGIES.register("conv")
class ConvEnergy(EnergyModel):
    """Residual convolutional energy of latents (B, C, S, S), S a power of two, at least 8.

    1x1 convolution, blocks down to 4 pixels, 3x3 and 4x4 convolutions without a skip, one linear unit; swish
    throughout; equalised weights. Runs in channels_last, which is a quarter faster on a CPU.
    """

    config_class = ConvEnergyConfig
    tiny = ConvEnergyConfig(latent_shape=(4, 8, 8))
    config: ConvEnergyConfig
    last = "linear"

    def __init__(self, config: ConvEnergyConfig):
        super().__init__(config)
        shape = self.latent_shape
        size = shape[-1]
        if len(shape) != 3 or shape[1] != size or size < 8 or size & (size - 1):
            raise UserError(
                "energy of kind 'conv' needs latents (C, S, S) with S a power of two, at least 8; "
                f"the latents are {shape}: use kind 'mlp'"
            )
        if config.attention and size < 16:
            raise UserError(f"energy.attention acts between 16 and 8 pixels and has no effect on latents {shape}")
        sizes = [size >> i for i in range(size.bit_length() - 2)]  # size, ..., 8, 4
        widths = [self._channels(s) for s in sizes]
        self.stem = EqualConv2d(shape[0], widths[0], 1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
        self.attention = SelfAttention(widths[-2]) if config.attention else None
        self.conv1 = EqualConv2d(widths[-1], widths[-1], 3)
        self.conv2 = EqualConv2d(widths[-1], widths[-1], 4)
        self.linear = EqualConv2d(widths[-1], max(1, len(config.conditions)), 1)

    def _channels(self, size: int) -> int:
        channels = self.config.multiplier * (32 if size >= 16 else 64)
        return channels if size >= 64 else min(channels, 512)

    def _effective(self) -> Effective:
        scale, blocks = 1.0, []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            blocks.append(block.effective(scale))
            scale = 1.0 if self._attends_after(number) else Block.OUT
        head = (self.conv1.effective(scale), self.conv2.effective(_SWISH), self.linear.effective(_SWISH))
        return self.stem.effective(1 / self.unit), blocks, head

    def _attends_after(self, number: int) -> bool:
        return self.attention is not None and number == len(self.blocks) - 2  # at 8 pixels

    def _run(self, latents: Tensor, effective: Effective, condition: Tensor | None) -> Tensor:
        stem, blocks, (conv1, conv2, linear) = effective
        x = _pointwise(latents.contiguous(memory_format=torch.channels_last), *stem)
        for i, block in enumerate(blocks):
            x = Block.run(x, *block)
            if self.attention is not None and self._attends_after(i):
                x = self.attention(x * Block.OUT)
        x = F.silu(F.conv2d(x, *conv1, padding=1))
        x = F.silu(F.conv2d(x, *conv2))  # (B, C, 4, 4) -> (B, C, 1, 1)
        return self._chosen(_pointwise(x, *linear).flatten(1), condition)  # (B, conditions, 1, 1) -> (B,)

    def forward(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._run(latents, self._effective(), condition)

    def folded(self) -> Callable[..., Tensor]:
        effective = self._effective()
        return lambda latents, condition=None: self._run(latents, effective, condition)
