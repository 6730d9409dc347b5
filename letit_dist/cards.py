"""Model cards: the README.md of a folder of weights, with data, licence, command and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CARD = "README.md"
_UNKNOWN = "not stated"


@dataclass(frozen=True)
class Card:
    """What weights were made of and how good they are; what is left out is said to be left out."""

    data: str | None = None  # what they were trained on
    licence: str | None = None  # as the Hub spells it: apache-2.0, mit, cc-by-4.0, ...
    command: str | None = None  # that made them
    metrics: Mapping[str, Any] = field(default_factory=dict)  # name -> value

    def text(self, title: str, facts: Mapping[str, Any], use: str) -> str:
        """The card as Markdown: `facts` become a table, `use` is Python."""
        # JSON is YAML, and needs no thought about quotes.
        front = {"library_name": "letit_dist", "tags": ["letit_dist", "image-to-image"]}
        front |= {} if self.licence is None else {"license": self.licence}
        head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
        metrics = _table(("metric", "value"), self.metrics) if self.metrics else "not yet measured"
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


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [head, ("---", "---"), *((_cell(name), _cell(value)) for name, value in rows.items())]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
