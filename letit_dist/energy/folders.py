"""Folders of translators: energies with the settings of their chains, and which autoencoder they belong to.

    config.json  README.md  energies/apple2orange/{config.json, model.safetensors}  [autoencoder/]

The autoencoder's fingerprint stands in config.json; the autoencoder itself may be in the folder or elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import letit_dist
from letit_dist import hub, pretrained
from letit_dist.cards import CARD, Card
from letit_dist.config import as_tree
from letit_dist.errors import UserError

if TYPE_CHECKING:
    from letit_dist.energy.translate import Translator

KIND = "translator"
_ENERGIES, _AUTOENCODER = "energies", "autoencoder"


def is_translator_folder(folder: Path) -> bool:
    """Whether `folder` holds translators (and not weights, or nothing of ours)."""
    try:
        return json.loads((folder / pretrained.CONFIG).read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def save_translators(
    translators: Sequence[Translator], folder: str | Path, *, card: Card | None = None, with_autoencoder: bool = False
) -> None:
    """Write translators of one autoencoder to a folder, whole or not at all; a README.md that is there stays unless
    there is a `card`, and a new one without says what the energies' own cards do. Raises UserError for a folder that
    holds anything else, and for several autoencoders."""
    folder = Path(os.path.abspath(folder))
    autoencoder = translators[0].autoencoder
    fingerprint = autoencoder.fingerprint()
    if any(one.autoencoder is not autoencoder and one.autoencoder.fingerprint() != fingerprint for one in translators):
        raise UserError("translators of different autoencoders: save each in a folder of its own")
    if folder.exists() and not is_translator_folder(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"will not replace {folder}: it holds no translators of letit_dist; name a new folder")
    beside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        energies: dict[str, dict[str, Any]] = {}
        for translator in translators:
            extra = translator.energy.extra
            name = _name(extra.get("source"), extra.get("target"), energies)
            extra = {**extra, "autoencoder_fingerprint": fingerprint, "langevin": as_tree(translator.sampler.config)}
            known = translator.energy.card or card or Card()
            translator.energy.save_pretrained(beside / _ENERGIES / name, card=known, **extra)
            energies[name] = {key: extra.get(key) for key in ("source", "target", "langevin")}
            energies[name]["fingerprint"] = translator.energy.fingerprint()
        named = {"fingerprint": fingerprint, "kind": autoencoder.config.kind, "origin": _origin(translators[0])}
        if with_autoencoder:
            known = autoencoder.card or Card()
            autoencoder.save_pretrained(beside / _AUTOENCODER, card=known, **autoencoder.extra)
            named["origin"] = _AUTOENCODER
        tree = {
            "kind": KIND,
            "autoencoder": named,
            "resolution": autoencoder.config.resolution,
            "energies": energies,
            "letit_dist_version": letit_dist.__version__,
        }
        (beside / pretrained.CONFIG).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if card is None and (folder / CARD).is_file():
            shutil.copyfile(folder / CARD, beside / CARD)
        else:
            own = card or Card.together(translator.energy.card for translator in translators)
            (beside / CARD).write_text(_card_text(own, tree, autoencoder.card or Card()), encoding="utf-8")
        pretrained.swap_in(beside, folder)
    except OSError as error:
        raise UserError(f"cannot write translators to {folder}: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _origin(translator: Translator) -> str | None:
    """Where its autoencoder came from, if that will mean the same elsewhere or later."""
    origin = translator.autoencoder_origin
    return None if origin is None else str(origin) if hub.is_hub_id(origin) else os.path.abspath(origin)


def _name(source: str | None, target: str | None, taken: dict[str, Any]) -> str:
    plain = re.sub(r"[^\w.-]+", "-", f"{source or 'any'}2{target or 'target'}")
    name, number = plain, 1
    while name in taken:
        number += 1
        name = f"{plain}-{number}"
    return name


def _card_text(card: Card, tree: dict[str, Any], of_autoencoder: Card) -> str:
    ways = {
        f"{one['source'] or 'any'} to {one['target'] or 'target'}": f"{one['langevin']['steps']} steps of "
        f"{one['langevin']['step_size']:g}, noise {one['langevin']['noise_scale']:g}, energy {one['fingerprint']}"
        for one in tree["energies"].values()
    }
    facts = {**ways, "images": f"{tree['resolution']} pixels"}
    facts["autoencoder"] = f"{tree['autoencoder']['kind']}, fingerprint {tree['autoencoder']['fingerprint']}"
    described = {"data": of_autoencoder.data, "licence": of_autoencoder.licence}
    facts |= {f"{name} of the autoencoder": value for name, value in described.items() if value}
    several = f', to="{next(iter(tree["energies"].values()))["target"]}"' if len(ways) > 1 else ""
    use = (
        "import letit_dist\nfrom PIL import Image\n\n"
        f'translator = letit_dist.Translator.from_pretrained("this folder, or its id on the Hub"{several})\n'
        'letit_dist.translate_picture(translator, Image.open("picture.jpg")).save("translated.png")'
    )
    return card.text(f"Translation: {', '.join(ways)}", facts, use)


def read_translators(path: str | Path, autoencoder: str | Path | None = None) -> list[Translator]:
    """The translators of a folder or of an id on the Hub, on the CPU.

    The autoencoder is `autoencoder` if given, else the one in the folder, else the one that config.json names, which
    the Hub is asked for only if `path` came from there. Raises UserError for a folder that is missing, damaged or
    newer, and for another autoencoder.
    """
    from letit_dist.energy.translate import load_translators

    fetched = hub.is_hub_id(path)
    folder = hub.fetch(str(path)) if fetched else Path(path)
    where = folder / pretrained.CONFIG
    tree = pretrained.read_config(folder, (pretrained.CONFIG,))
    energies, named = tree.get("energies"), tree.get("autoencoder")
    if tree.get("kind") != KIND or not isinstance(energies, dict) or not energies or not isinstance(named, dict):
        raise UserError(f"{where}: not the config of translators (kind {tree.get('kind')!r}, expected {KIND!r})")
    if strange := [name for name in energies if Path(name).name != name or name in ("", ".", "..")]:
        raise UserError(f"{where}: energies: {strange[0]!r} is no name of a folder")
    chosen = autoencoder if autoencoder is not None else _find_autoencoder(folder, named, fetched)
    found = [part for name in energies for part in load_translators(chosen, folder / _ENERGIES / name)]
    for translator in found:
        translator.autoencoder = found[0].autoencoder  # one in memory, not one for each energy
        translator.origin = folder
    return found


def _find_autoencoder(folder: Path, named: dict[str, Any], fetched: bool) -> str | Path:
    inside, origin = folder / _AUTOENCODER, named.get("origin")
    if (inside / pretrained.CONFIG).is_file():
        return inside
    if isinstance(origin, str) and (Path(origin).exists() or (fetched and hub.is_hub_id(origin))):
        return origin
    hint = f", which was {origin}" if origin else ""
    raise UserError(
        f"{folder}: its autoencoder {named.get('fingerprint')} ({named.get('kind')}{hint}) is neither in it nor there: "
        "name its folder (Translator.from_pretrained(..., autoencoder=FOLDER), or --autoencoder FOLDER)"
    )
