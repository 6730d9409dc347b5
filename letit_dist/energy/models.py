"""Energies of latents: what all kinds have in common. `mlp` for any latents, `convolutional` for maps.

E(z) is low on the target domain, so that p(z) = exp(-E(z)) / Z (eq. 5), everywhere in this package. The
published code trains f = -E; `interchange.energy` flips the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from letit_dist import hub, pretrained
from letit_dist.cards import Card
from letit_dist.config import StrictConfig, as_tree, parse_kind
from letit_dist.errors import UserError
from letit_dist.registry import ENERGIES

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
        self.card: Card | None = None  # what its README.md says

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
        alone.extra, alone.card = self.extra, self.card
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
        """Write config.json and model.safetensors, `extra` beside the config, and with a `card` (or one that this was
        read with) a README.md; returns the fingerprint."""
        card = card or self.card
        text = None if card is None else self._card_text(card, extra)
        return pretrained.write_folder(folder, as_tree(self.config), self.state_dict(), extra, card=text)

    def push_to_hub(self, repo_id: str, *, card: Card | None = None, private: bool = True, **extra: Any) -> str:
        """Send what `save_pretrained` writes, `self.extra` included, to the Hugging Face Hub; returns its address."""
        kept, card = {**self.extra, **extra}, card or self.card or Card()
        return hub.push(lambda folder: self.save_pretrained(folder, card=card, **kept), repo_id, private=private)

    def add_metrics(self, folder: str | Path, metrics: Mapping[str, float]) -> None:
        """Put what was measured later onto the card of the folder that this was read from; a card that has it stays."""
        card = self.card or Card()
        if not metrics.keys() <= card.metrics.keys():
            card = replace(card, metrics={**card.metrics, **metrics})
            self.save_pretrained(folder, card=card, **self.extra)

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
        model.extra, model.card = pretrained.read_extra(folder), Card.read(folder)
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
