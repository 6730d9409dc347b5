"""Model cards: the README.md of a folder of weights, with data, licence, command and metrics.

All four also stand in its YAML front matter, so that they are kept when the weights go into another folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from letit_dist.errors import UserError
from letit_dist.files import write_atomically
from letit_dist.ranks import known_place, launched_ranks

CARD = "README.md"
_UNKNOWN, _UNMEASURED = "not stated", "not yet measured"
# What a run takes from its launcher beside the number of ranks, and what stands there if it was not asked for.
_LAUNCHED = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE")
_UNSET = ("", "False", "false", "none")
# By the first words of a file called LICENSE.
_LICENCES = {"MIT License": "mit", "Apache License": "apache-2.0"}


@dataclass(frozen=True)
class Card:
    """What weights were made of and how good they are; what is left out is said to be left out."""

    data: str | None = None  # what they were trained on
    licence: str | None = None  # as the Hub spells it: apache-2.0, mit, cc-by-4.0, ...
    command: str | None = None  # that made them
    metrics: Mapping[str, Any] = field(default_factory=dict)  # name -> value

    def text(self, title: str, facts: Mapping[str, Any], use: str) -> str:
        """The card as Markdown: `facts` become a table, `use` is Python."""
        front: dict[str, Any] = {"library_name": "letit_dist", "tags": ["letit_dist", "image-to-image"]}
        front |= {} if self.licence is None else {"license": self.licence}
        own = {"data": self.data, "command": self.command, "metrics": dict(self.metrics)}
        front |= {"letit_dist": own} if (own := {key: value for key, value in own.items() if value}) else {}
        head = "\n".join(f"{key}: {_yaml(value)}" for key, value in front.items())
        metrics = _table(("metric", "value"), self.metrics) if self.metrics else _UNMEASURED
        command = _UNKNOWN if self.command is None else _fenced("", self.command)
        parts = {
            "What it is": _table(("", ""), facts),
            "Data": self.data or _UNKNOWN,
            "Licence": self.licence or _UNKNOWN,
            "Command": command,
            "Metrics": metrics,
            "Use": _fenced("python", use),
        }
        body = "\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items())
        return f"---\n{head}\n---\n\n# {title}\n\n{body}\n"

    @classmethod
    def read(cls, folder: str | Path) -> Card | None:
        """What the README.md of a folder says in its front matter, also where somebody else wrote it; None without."""
        try:
            text = (Path(folder) / CARD).read_text(encoding="utf-8")
            front = yaml.safe_load(text.removeprefix("---\n").split("\n---\n")[0]) if text.startswith("---\n") else None
        except (OSError, ValueError, yaml.YAMLError):
            return None
        if not isinstance(front, dict):
            return None
        own = found if isinstance(found := front.get("letit_dist"), dict) else {}
        metrics = found if isinstance(found := own.get("metrics"), dict) else {}
        data = _words(own.get("data", front.get("datasets")))
        return cls(data, _words(front.get("license")), _words(own.get("command")), metrics)

    @classmethod
    def together(cls, cards: Iterable[Card | None]) -> Card:
        """Of several: what they agree on, and all that was done; no metrics, which belong to each alone."""
        known = [card or cls() for card in cards]
        if len(known) == 1:
            return known[0]
        licences = {card.licence for card in known}
        data, command = (
            "\n".join(dict.fromkeys(text for text in texts if text)) or None
            for texts in ([card.data for card in known], [card.command for card in known])
        )
        return cls(data, licences.pop() if len(licences) == 1 else None, command)


def card_to_mend(folder: str | Path, option: str) -> Path:
    """The card of a folder of weights, for `add_metrics`; UserError that names `option` where none can be added to."""
    path = Path(folder) / CARD
    if not path.is_file():
        raise UserError(f"{option}: there is no {path}; name a run, or a folder of weights that has a model card")
    try:
        text = path.read_text(encoding="utf-8")
        front = yaml.safe_load(_split(text)[0])
    except (OSError, ValueError, yaml.YAMLError) as error:
        what = str(error).split("\n")[0]
        raise UserError(f"{option}: {path} cannot be read ({what}): mend or remove it") from None
    if not isinstance(front, dict) or not isinstance(front.get("letit_dist", {}), dict):
        raise UserError(f"{option}: {path} does not begin with the front matter of a model card: mend or remove it")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option}: {path.parent} cannot be written to")
    return path


def add_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Put metrics onto a card that is there: into its front matter and its table of metrics, in place of those of the
    same names. Every other line stays as it is, whoever wrote it; the file is replaced whole or not at all."""
    head, body = _split(path.read_text(encoding="utf-8"))
    own = yaml.safe_load(head).get("letit_dist", {})
    head = _with_key(head, "letit_dist", {**own, "metrics": {**(own.get("metrics") or {}), **metrics}})
    before, heading, rest = body.partition("\n## Metrics\n")
    section, following, after = rest.partition("\n## ")
    if not heading:
        before, heading = before.rstrip("\n") + "\n", "\n## Metrics\n"
    _write(path, head, f"{before}{heading}{_with_rows(section, metrics)}{following}{after}")


def restate(path: Path, *, data: str | None = None, licence: str | None = None) -> None:
    """Put other data or another licence onto a card that is there; every other line stays as it is."""
    head, body = _split(path.read_text(encoding="utf-8"))
    own = yaml.safe_load(head).get("letit_dist", {})
    if data is not None:
        head, body = _with_key(head, "letit_dist", {**own, "data": data}), _with_section(body, "Data", data)
    if licence is not None:
        head, body = _with_key(head, "license", licence), _with_section(body, "Licence", licence)
    _write(path, head, body)


def _yaml(value: Any) -> str:
    # JSON is YAML, and needs no thought about quotes; but two escapes for one character would not be YAML's.
    return json.dumps(value, ensure_ascii=False)


def _with_key(head: str, key: str, value: Any) -> str:
    """YAML with another value of a key, in place of it and of what is indented below it, as other tools write it."""
    line = f"{key}: {_yaml(value)}"
    head, found = re.subn(rf"^{key}:.*(?:\n[ \t].*)*", lambda _: line, head, count=1, flags=re.MULTILINE)
    return head if found else f"{head}\n{line}"


def _with_section(body: str, name: str, text: str) -> str:
    """Markdown with another text below a heading, where it has that heading."""
    before, heading, rest = body.partition(f"\n## {name}\n")
    _, following, after = rest.partition("\n## ")
    return f"{before}{heading}\n{text}\n{following}{after}" if heading else body


def _write(path: Path, head: str, body: str) -> None:
    try:
        write_atomically(path, f"---\n{head}\n---\n{body}".encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _split(text: str) -> tuple[str, str]:
    """(YAML, the rest) of a card; ValueError without front matter."""
    head, mark, body = text.removeprefix("---\n").partition("\n---\n")
    if not text.startswith("---\n") or not mark:
        raise ValueError("no front matter between two lines of ---")
    return head, body


def _with_rows(section: str, metrics: Mapping[str, Any]) -> str:
    """The text below the heading of the metrics, with these in its table."""
    lines = section.strip("\n").split("\n")
    lines = [line for line in lines if line.strip() != _UNMEASURED]
    rows = [number for number, line in enumerate(lines) if line.startswith("| ")]
    if not rows:
        kept = "\n".join(lines).strip("\n")
        return "\n" + (f"{kept}\n\n" if kept else "") + _table(("metric", "value"), metrics) + "\n"
    for name, value in metrics.items():
        row = f"| {_cell(name)} | {_cell(value)} |"
        same = [number for number in rows if lines[number].startswith(f"| {_cell(name)} | ")]
        if same:
            lines[same[0]] = row
        else:
            rows.append(rows[-1] + 1)
            lines.insert(rows[-1], row)
    return "\n" + "\n".join(lines) + "\n"


def licence_beside(path: Path) -> str | None:
    """What a published file or folder says of its licence: the front matter of the README.md beside it, or a LICENSE
    that is MIT's or Apache's; None where neither does."""
    folder = path if path.is_dir() else path.parent
    if folder.resolve() == Path(__file__).resolve().parent.parent:
        return None  # this repository's own, which is of no weights
    card = Card.read(folder)
    if card is not None and card.licence is not None:
        return card.licence
    for file in filter(Path.is_file, sorted(folder.glob("LICEN[CS]E*"))):
        first = file.read_text(encoding="utf-8", errors="replace").strip().split("\n")[0].strip()
        if first in _LICENCES:
            return _LICENCES[first]
    return None


def add_options(parser: argparse.ArgumentParser) -> None:
    """--data and --licence, which no program can find out by itself."""
    parser.add_argument("--data", metavar="WORDS", help="for the model card: what it is made of (default: the folders)")
    parser.add_argument("--licence", metavar="ID", help="for the model card: of the weights, e.g. apache-2.0")


def command_line(program: str, argv: Sequence[str] | None = None) -> str:
    """The command that runs `program` (its path in the repository) as this process runs.

    Several ranks are started by torchrun with the variables that the launcher has set, whichever it was (accelerate,
    DeepSpeed, Slurm): no launch file is needed, which may be the user's own. Of several machines each runs the command.
    """
    words = [program, *(sys.argv[1:] if argv is None else argv)]
    words = [re.sub(r"://[^/@\s]+@", "://", word) for word in words]  # names and passwords are not for a card
    asked = [f"{name}={shlex.quote(value)}" for name in _LAUNCHED if (value := os.environ.get(name, "")) not in _UNSET]
    ranks = launched_ranks()
    if ranks == 1 and not asked:
        return shlex.join(["python", *words])
    _, here = known_place() or (0, ranks)
    here = here if ranks % here == 0 else ranks
    meeting = ["--standalone"]
    if here < ranks:
        meeting = ["--nnodes", str(ranks // here), "--rdzv_backend", "c10d", "--rdzv_endpoint", "FIRST_MACHINE:29500"]
    # Without the two dashes torchrun takes the program's --run for an abbreviation of one of its own options.
    return " ".join([*asked, shlex.join(["torchrun", *meeting, "--nproc_per_node", str(here), "--", *words])])


def _words(value: Any) -> str | None:
    """A value of somebody's front matter, which may be a list."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) if value else None


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [head, ("---", "---"), *((_cell(name), _cell(value)) for name, value in rows.items())]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
