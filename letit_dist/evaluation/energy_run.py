"""A trained energy as figures need it: its translator, the words that name it, and the latents it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from letit_dist.config import read_tree
from letit_dist.data.index import Index
from letit_dist.data.latents import LatentSet
from letit_dist.energy.classifier import LatentClassifier
from letit_dist.energy.translate import Translator, choose_translator
from letit_dist.errors import UserError
from letit_dist.evaluation.latents import all_latents

_MOST = 1024  # latents of each domain that a classifier learns from


@dataclass(frozen=True)
class EnergyRun:
    """A run folder of launch/train_energy.py, or its export, opened."""

    folder: Path
    translator: Translator

    @property
    def name(self) -> str:
        """The run folder's name, also where an export in it was given."""
        folder = self.folder.resolve()
        return folder.parent.parent.name if folder.parent.name == "export" else folder.name

    @property
    def direction(self) -> str:
        extra = self.translator.energy.extra
        return f"{extra.get('source') or 'any'} to {extra.get('target') or 'target'}"

    def title(self, seed: int, separator: str = ", ") -> str:
        """Which run, and how far it is trained, and the seed."""
        seen = self.translator.energy.extra.get("images_seen")
        seen = "unknown" if seen is None else f"{seen:,}"
        return f"{self.name}: {self.direction}{separator}{seen} images seen, seed {seed}"

    def record(self, seed: int) -> dict[str, Any]:
        """The same for a line of JSON, with the fingerprints that tell two trainings apart."""
        energy = self.translator.energy
        return {
            "run": self.name,
            "source": energy.extra.get("source"),
            "target": energy.extra.get("target"),
            "images_seen": energy.extra.get("images_seen"),
            "seed": seed,
            "autoencoder": energy.extra.get("autoencoder_fingerprint"),
            "energy": energy.fingerprint(),
        }

    def latent_folder(self, side: Literal["source", "target"]) -> Path:
        """Where the run's configuration says that these latents are; UserError if it does not, or they are not."""
        config = self.folder / "config.yaml"
        if not config.is_file():
            raise UserError(f"{self.folder} is no run folder (no config.yaml): name its latents with --latents")
        data = read_tree(config)[0].get("data")
        data = data if isinstance(data, dict) else {}
        if data.get("domains"):
            return self._domain(data["domains"], self.translator.energy.extra.get(side), config)
        folder = data.get(side)
        if not isinstance(folder, str):
            raise UserError(f"{config}: no data.{side}: name its latents with --latents")
        if not Path(folder).is_dir():
            raise UserError(f"{config}: its data.{side} {folder} is not there: name it with --latents")
        return Path(folder)

    def _domain(self, folders: Sequence[str], name: str | None, config: Path) -> Path:
        for folder in folders if name is not None else ():
            if Path(folder).is_dir() and Index.read(folder).meta.get("domain") == name:
                return Path(folder)
        asked = "give --from" if name is None else f"none of its data.domains is {name} and there"
        raise UserError(f"{config}: an energy between several domains: {asked}, or name the latents with --latents")

    def fit_classifier(self, folders: Sequence[str | Path] | None = None) -> LatentClassifier:
        """What tells apart the latents of both domains: of those in `folders`, or that the configuration names."""
        folders = folders or [self.latent_folder(side) for side in ("source", "target")]
        sides = [all_latents(self.translator.autoencoder, self.open_latents(folder), most=_MOST) for folder in folders]
        return LatentClassifier.fit(*sides)

    def open_latents(self, folder: str | Path) -> LatentSet:
        """The latents of a folder; UserError if another autoencoder made them."""
        return LatentSet.open(folder, autoencoder_fingerprint=self.translator.autoencoder.fingerprint())


def open_run(
    energies: Sequence[str], autoencoder: str | None = None, to: str | None = None, source: str | None = None
) -> EnergyRun:
    """The energy among these that goes `to` this domain from `source`, on the GPU if there is one; see
    `choose_translator`."""
    translator = choose_translator(energies, autoencoder, to, source)
    assert translator.origin is not None
    return EnergyRun(translator.origin, translator.to("cuda" if torch.cuda.is_available() else "cpu"))


def open_back(forth: EnergyRun, energy: str, autoencoder: str | None = None) -> EnergyRun:
    """The energy of the other direction, on the same autoencoder; UserError if it is not that."""
    source, target, expected = (
        forth.translator.energy.extra.get(key) for key in ("source", "target", "autoencoder_fingerprint")
    )
    try:
        back = open_run([energy], autoencoder, source, target)
    except UserError as error:
        raise UserError(f"--back: {error}") from None
    found = back.translator.energy.extra["autoencoder_fingerprint"]
    if expected != found:
        raise UserError(
            f"--back {energy} was trained on the latents of autoencoder {found}, {forth.folder} on those of "
            f"{expected}: their dimensions have nothing to do with each other"
        )
    # One autoencoder in memory: the fingerprints say that the two are the same.
    shared = Translator(forth.translator.autoencoder, back.translator.energy, back.translator.sampler)
    return EnergyRun(back.folder, shared)
