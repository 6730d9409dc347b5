"""Kinds of models and recipes by name: a new file in the package is enough to make a new kind known."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from letit_dist.errors import UserError

if TYPE_CHECKING:  # for a type checker alone: they import this
    from letit_dist.autoencoders.base import Autoencoder, AutoencoderConfig
    from letit_dist.energy.models import EnergyConfig, EnergyModel
    from letit_dist.recipes.base import Recipe, RecipeConfig


class Configured(Protocol):
    """A class that says by which schema it is configured."""

    config_class: ClassVar[type[Any]]


T = TypeVar("T", bound=type[Any])
M = TypeVar("M", bound=Configured)  # the base of the registered classes
C = TypeVar("C")  # the base of their schemas


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class Registry(Generic[M, C]):
    """Maps `kind` to a class. The package is scanned at the first look-up, so importing this costs nothing."""

    def __init__(self, noun: str, package: str):
        self.noun = noun
        self.package = package
        self._classes: dict[str, type[M]] = {}
        self._scanned = False

    def register(self, kind: str) -> Callable[[T], T]:
        """Class decorator: make the class known under `kind`."""

        def decorate(cls: T) -> T:
            known = self._classes.get(kind)
            if known is not None and _name(known) != _name(cls):
                raise ValueError(f"two classes for {self.noun} kind {kind!r}: {known} and {cls}")
            self._classes[kind] = cls
            return cls

        return decorate

    def _scan(self) -> None:
        if self._scanned:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._scanned = True

    def kinds(self) -> list[str]:
        """All known kinds, sorted."""
        self._scan()
        return sorted(self._classes)

    def get(self, kind: str) -> type[M]:
        """The class of `kind`; raises UserError with the known kinds and the nearest one."""
        self._scan()
        if isinstance(kind, str) and kind in self._classes:
            return self._classes[kind]
        near = difflib.get_close_matches(str(kind), self._classes, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown {self.noun} kind {kind!r}{hint} (known: {', '.join(self.kinds())})")

    def schema(self, kind: str) -> type[C]:
        """The `config_class` of the class of `kind`; raises like `get`."""
        return self.get(kind).config_class


AUTOENCODERS: Registry[Autoencoder, AutoencoderConfig] = Registry("autoencoder", "letit_dist.autoencoders")
ENERGIES: Registry[EnergyModel, EnergyConfig] = Registry("energy", "letit_dist.energy")
RECIPES: Registry[Recipe, RecipeConfig] = Registry("recipe", "letit_dist.recipes")
