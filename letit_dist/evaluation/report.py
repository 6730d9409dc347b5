"""Results on disk: one JSON line a method or metric, and the sheet that goes with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from letit_dist import hub
from letit_dist.cards import card_to_mend
from letit_dist.energy.folders import is_translator_folder
from letit_dist.errors import UserError
from letit_dist.evaluation.scoring import Scores
from letit_dist.files import write_atomically
from letit_dist.pictures import grid, save_picture
from letit_dist.pretrained import find_folder


def card_of(scored: str | Path, option: str) -> Path:
    """The model card of what is scored: of a run's newest export, or of a folder of weights or of translators.
    UserError that names `option` where there is none to add to."""
    if hub.is_hub_id(scored):
        raise UserError(f"{option}: {scored} is on the Hub; name a folder of yours")
    folder = Path(scored)
    return card_to_mend(folder if is_translator_folder(folder) else find_folder(folder), option)


def write_lines(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One JSON line a row, written beside and renamed."""
    try:
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_report(scores: Scores, out: Path) -> None:
    """OUT/translation.jsonl, OUT/translation.md and OUT/translation.png, each written beside and renamed."""
    write_lines(scores.rows, out / "translation.jsonl")
    try:
        write_atomically(out / "translation.md", f"{scores.table(whole=True)}\n".encode())
    except OSError as error:
        raise UserError(f"cannot write {out / 'translation.md'}: {error.strerror or error}") from None
    save_picture(grid(scores.images), out / "translation.png")
