"""What a run folder holds, and folders of results beside it; and what is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from letit_dist.config import read_tree
from letit_dist.errors import UserError

CONFIG, STATS, ENVIRONMENT = "config.yaml", "stats.jsonl", "environment.json"
_NOT_RESULTS = {"checkpoints", "export", "samples", "judge", "judge-kept", ".features"}
_PICTURES = (".png", ".jpg", ".webp", ".gif")
# Section, and the names of the pictures in it, as the programs write them.
FIGURES = {
    "Translations": ("translation", "compare", "sheet-*"),
    "Trajectories": ("trajectories",),
    "Latent shift": ("shift",),
    "Strength": ("strength",),
    "Reconstructions": ("[0-9]*-*",),
}
_MAKERS = {
    "Translations": "eval/translation.py, launch/translate.py --sheet, or eval/paper.py compare",
    "Trajectories": "eval/paper.py trajectories",
    "Latent shift": "eval/paper.py shift",
    "Strength": "eval/paper.py strength",
    "Reconstructions": "eval/reconstruction.py",
}


@dataclass
class RunFolder:
    """Everything that was found; `absent` has a line for each thing that was not."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    stats: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[int, Path]] = field(default_factory=list)  # (images seen, sheet)
    figures: dict[str, list[Path]] = field(default_factory=dict)
    tables: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)
    exports: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def section(self, name: str) -> dict[str, Any]:
        """A part of the configuration; empty where there is none, or something else stands in its place."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def is_energy(self) -> bool:
        """Whether it is a run of stage 2."""
        return isinstance(self.config.get("autoencoder"), str)

    @property
    def title(self) -> str:
        """What kind of run this is, in a few words."""
        kind = self.section("recipe").get("kind", "unknown recipe")
        if self.is_energy:
            data = self.section("data")
            sides = [Path(str(data[side])).name for side in ("source", "target") if data.get(side)]
            return f"stage 2: energy, {' to '.join(sides) or 'several domains'} ({kind})"
        autoencoder = self.section("autoencoder")
        return f"stage 1: {autoencoder.get('kind', kind)} at {autoencoder.get('resolution', '?')} pixels"


def read_run(folder: Path, also: Sequence[Path] = ()) -> RunFolder:
    """A run of launch/pretrain.py or launch/train_energy.py, and folders of results beside it.

    Raises UserError for what is no run folder; everything else that is missing or damaged gets a line in `absent`.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder (no {CONFIG}): name what --run was given in training")
    if missing := [path for path in also if not path.is_dir()]:
        raise UserError("\n".join(f"--also {path}: no such folder" for path in missing))
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{folder / CONFIG} is not UTF-8 text: it is damaged, or no configuration") from None
    except OSError as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error.strerror}") from None
    run = RunFolder(folder, text, read_tree(folder / CONFIG)[0])
    run.stats = [row for row in _lines(folder / STATS, run.absent) if isinstance(row.get("images_seen"), (int, float))]
    if not run.stats:
        run.absent.append(f"training curves: no line in {STATS}")
    if (folder / ENVIRONMENT).is_file():
        run.environment = next(iter(_objects(folder / ENVIRONMENT, run.absent)), {})
    else:
        run.absent.append(f"environment: no {ENVIRONMENT}")
    run.samples = sorted(_samples(folder / "samples"))
    if not run.samples:
        run.absent.append("sample grids over training: none in samples/")
    run.exports = sorted(path.name for path in folder.glob("export/*/") if (path / "config.json").is_file())
    if not run.exports:
        run.absent.append("exported weights: none in export/ yet")
    found = list(dict.fromkeys(path for root in (folder, *also) for path in _results(root)))
    _sort(run, found)
    return run


def _sort(run: RunFolder, found: Sequence[Path]) -> None:
    for section, names in FIGURES.items():
        pictures = [path for path in found if path.suffix in _PICTURES and any(map(path.with_suffix("").match, names))]
        run.figures[section] = sorted(pictures)
        if not pictures and run.is_energy == (section != "Reconstructions"):
            run.absent.append(f"{section.lower()}: {_MAKERS[section]} makes them")
    for path in found:
        if path.suffix in (".jsonl", ".json"):
            rows = _lines(path, run.absent) if path.suffix == ".jsonl" else _objects(path, run.absent)
            if rows:
                run.tables[path] = rows
    if not run.tables:
        run.absent.append("results: no JSON lines of eval/ in this folder; --also FOLDER names others")


def _samples(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("*.png"):
        number = path.stem.rpartition("-")[2]
        if number.isdigit():
            yield int(number), path


def _results(root: Path) -> Iterator[Path]:
    """Files below a folder that evaluation may have written, in order; other runs inside are left alone."""
    for path in sorted(root.iterdir()):
        if path.is_dir():
            if path.name not in _NOT_RESULTS and not path.name.startswith(".") and not (path / CONFIG).is_file():
                yield from _results(path)
        elif path.suffix in (*_PICTURES, ".jsonl", ".json") and path.name not in (STATS, ENVIRONMENT, "index.json"):
            yield path


def _lines(path: Path, absent: list[str]) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; a damaged line gets one in `absent`."""
    if not path.is_file():
        return []
    rows, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
    if damaged:
        absent.append(f"{damaged} damaged lines of {path.name} are left out")
    return rows


def _objects(path: Path, absent: list[str]) -> list[dict[str, Any]]:
    """The object of a JSON file, or its lines, as rows."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        return _lines(path, absent)
    return [tree] if isinstance(tree, dict) else []
