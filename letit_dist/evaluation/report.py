"""Results on disk: one JSON line a method or metric, and the sheet that goes with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from letit_dist.errors import UserError
from letit_dist.evaluation.scoring import Scores
from letit_dist.files import write_atomically
from letit_dist.pictures import grid, save_picture


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
