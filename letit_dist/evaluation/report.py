"""Results on disk: one JSON line a method, and the sheet that goes with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from letit_dist.evaluation.scoring import Scores
from letit_dist.pictures import grid, save_picture


def write_report(scores: Scores, out: Path) -> None:
    """OUT/translation.jsonl and OUT/translation.png, each written beside and renamed."""
    out.mkdir(parents=True, exist_ok=True)
    beside = out / ".translation.jsonl.writing"
    beside.write_text("".join(json.dumps(row) + "\n" for row in scores.rows), encoding="utf-8")
    os.replace(beside, out / "translation.jsonl")
    save_picture(grid(scores.images), out / "translation.png")
