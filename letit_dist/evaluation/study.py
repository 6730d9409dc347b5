"""A human study (LETIT, table 4): which method's picture looks best, and which keeps most of its source.

Every rater sees every image once a question, the methods side by side in an order that is a function of the seed, and
chooses one. The share of votes is what the paper reports.
"""

from __future__ import annotations

import base64
import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from letit_dist import pretrained, rng
from letit_dist.data.transforms import IMAGE_EXTENSIONS, UnreadableImage, decode, encode, resize_crop
from letit_dist.errors import UserError
from letit_dist.evaluation.comparison import match_others
from letit_dist.evaluation.study_page import study_page

COLUMNS = ("study", "rater", "question", "trial", "position", "seconds")
_MOST_METHODS = 9  # keys of a keyboard
_DRAWS = 2000  # of the bootstrap
_Z = 1.959964  # of the normal distribution, 95 %


def make_study(
    methods: Mapping[str, Path],
    source: Path,
    *,
    seed: int = 0,
    count: int | None = None,
    side: int = 256,
    target: str = "the other domain",
    title: str = "Which picture?",
) -> tuple[str, dict[str, Any]]:
    """(page, key) for the first `count` images of `source` and each method's result of the same name.

    The page holds pictures of one size and coding, without names; the key says which method stood where. Raises
    UserError for one method, more than nine, missing or unreadable pictures.
    """
    if not 2 <= len(methods) <= _MOST_METHODS:
        raise UserError(f"{len(methods)} methods: a study compares 2 to {_MOST_METHODS}")
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder")
    images = [path for path in sorted(source.iterdir()) if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
    images = [path for path in images if not path.name.startswith(".")][:count]
    if not images:
        raise UserError(f"--source {source}: no images in it")
    matched = match_others(methods, [path.stem for path in images], option="--method")
    shuffled = torch.randperm(len(images), generator=rng.generator(seed, "study trials", 0)).tolist()
    trials, order = [], []
    for number, row in enumerate(shuffled):
        path = images[row]
        turn = torch.randperm(len(methods), generator=rng.generator(seed, "study order", number)).tolist()
        names = [list(methods)[i] for i in turn]
        pictures = [_picture(matched[name][path.stem], side) for name in names]
        trials.append({"source": _picture(path, side), "pictures": pictures})
        order.append({"image": path.stem, "methods": names})
    questions = [
        {"name": "quality", "text": f"Which picture looks most like a real picture of {target}?", "source": False},
        {"name": "faithfulness", "text": "Which picture keeps most of the one before: pose, place, light, background?",
         "source": True},
    ]  # fmt: skip
    identity = pretrained.tensors_fingerprint({"trials": trials, "order": order}, {})
    introduction = (
        f"You will see {len(trials)} sets of {len(methods)} pictures, twice, with one question each time. There is no "
        "right answer: take the first that comes to mind. You may stop at any time; this browser remembers your votes."
    )
    page = study_page(title, identity, questions, trials, introduction=introduction, side=side)
    names = [question["name"] for question in questions]
    return page, {"study": identity, "seed": seed, "questions": names, "methods": list(methods), "trials": order}


def _picture(path: Path, side: int) -> str:
    try:
        pixels = resize_crop(decode(path.read_bytes()), side)
    except (UnreadableImage, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return "data:image/jpeg;base64," + base64.b64encode(encode(pixels, "jpeg", 95)).decode()


@dataclass(frozen=True)
class Vote:
    """One choice; `method` by the key."""

    rater: str
    question: str
    trial: int
    method: str


def read_key(path: Path) -> dict[str, Any]:
    """The key of a study; UserError for another file."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        assert {"study", "questions", "methods", "trials"} <= key.keys()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, AssertionError, AttributeError):
        raise UserError(f"{path} is no key of a study: eval/study.py make writes it") from None
    return key


def read_votes(paths: Sequence[Path], key: Mapping[str, Any]) -> list[Vote]:
    """All votes of files that the page saved; UserError with every file that is of another study or repeats votes of
    another file, and every line that the study has no place for."""
    votes: list[Vote] = []
    seen: dict[tuple[str, str, int], Path] = {}
    problems = [f"{path}: given twice, name it once" for path, times in Counter(paths).items() if times > 1]
    for path in dict.fromkeys(paths):
        again: Counter[tuple[str, Path]] = Counter()
        try:
            rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if not rows or not set(COLUMNS) <= rows[0].keys():
            problems.append(f"{path}: no votes in it: columns {', '.join(COLUMNS)} were expected")
            continue
        for other in dict.fromkeys(row["study"] for row in rows):
            if other != key["study"]:
                remedy = "name the key that was written beside that page"
                problems.append(f"{path}: votes of study {other}, the key is of {key['study']}: {remedy}")
        for line, row in enumerate(rows, 2):
            if row["study"] != key["study"]:
                continue
            vote = _vote(row, key)
            if isinstance(vote, str):
                problems.append(f"{path}, line {line}: {vote}")
                continue
            place = (vote.rater, vote.question, vote.trial)
            if place in seen:
                again[vote.rater, seen[place]] += 1
                continue
            seen[place] = path
            votes.append(vote)
        for (rater, other), count in again.items():
            if other == path:
                problems.append(
                    f"{path}: rater {rater!r} has {count} votes more than once in it: keep one line of each"
                )
            else:
                remedy = "leave one file out, or, if two people took one name, rename one in the column rater"
                problems.append(f"{path}: rater {rater!r} has {count} votes in {other} already: {remedy}")
    if problems:
        more = f"\nand {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError("\n".join(problems[:8]) + more)
    return votes


def _vote(row: Mapping[str, Any], key: Mapping[str, Any]) -> Vote | str:
    if row["question"] not in key["questions"]:
        return f"question {row['question']!r}, the study has {', '.join(key['questions'])}"
    try:
        trial, position = int(row["trial"]), int(row["position"])
        if min(trial, position) < 0:
            raise IndexError
        method = key["trials"][trial]["methods"][position]
    except (ValueError, TypeError, IndexError):
        return f"trial {row['trial']}, position {row['position']}: the study has no such picture"
    return Vote(str(row["rater"]), row["question"], trial, method)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, square = successes / count, _Z**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _Z * ((share * (1 - share) + square / 4) / count) ** 0.5 / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(counts: Tensor, *, seed: int = 0) -> Tensor:
    """The 95 % intervals (M, 2) of the shares of M methods, from the votes (images, M) of each image: images are drawn
    anew, since the raters of one image agree more than chance."""
    draws = torch.randint(len(counts), (_DRAWS, len(counts)), generator=rng.generator(seed, "study bootstrap", 0))
    totals = counts.double()[draws].sum(1)
    shares = totals / totals.sum(1, keepdim=True)
    return shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).t()


def krippendorff(counts: Tensor) -> float | None:
    """Krippendorff's alpha for nominal data (Krippendorff 2004, section 11.3) of the votes (images, M): 1 for full
    agreement, 0 for chance. Images with one vote say nothing; None where no image has two, or all votes are the same.
    """
    counts = counts.double()
    counts = counts[counts.sum(1) > 1]
    totals = counts.sum(0)
    votes = totals.sum()
    expected = votes.square() - totals.square().sum()
    if not len(counts) or expected == 0:
        return None
    pairs = counts.sum(1)
    apart = ((pairs.square() - counts.square().sum(1)) / (pairs - 1)).sum()
    return float(1 - (votes - 1) * apart / expected)


def analyse(votes: Sequence[Vote], key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a question and method, in the order of the key."""
    rows = []
    for question in key["questions"]:
        counts = torch.zeros(len(key["trials"]), len(key["methods"]))
        raters = set()
        for vote in votes:
            if vote.question == question:
                counts[vote.trial, key["methods"].index(vote.method)] += 1
                raters.add(vote.rater)
        asked = counts[counts.sum(1) > 0]
        if not len(asked):
            continue
        total = int(asked.sum())
        for method, interval in enumerate(bootstrap(asked, seed=key.get("seed", 0)).tolist()):
            chosen = int(asked[:, method].sum())
            low, high = wilson(chosen, total)
            rows.append(
                {
                    "question": question,
                    "method": key["methods"][method],
                    "share": chosen / total,
                    "low": interval[0],
                    "high": interval[1],
                    "wilson_low": low,
                    "wilson_high": high,
                    "votes": total,
                    "images": len(asked),
                    "raters": len(raters),
                    "alpha": krippendorff(asked),
                }
            )
    if not rows:
        raise UserError("there is not a single vote")
    return rows
