"""The report of a run as one HTML page: everything inside, nothing from outside, readable on paper."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from letit_dist.evaluation.curves import STYLE, chart
from letit_dist.evaluation.run_folder import RunFolder
from letit_dist.evaluation.web_page import page

_MOST_BYTES = 3 << 20  # of a picture as it is; a larger one is shown smaller
_MOST_WIDTH = 1800
_MOST_SAMPLES = 8
_MOST_FIGURES = 6  # of a section
_MOST_ROWS = 200
_MOST_COLUMNS = 9  # more are turned into rows where there are few rows
_MOST_ENTRIES = 24  # of a list
_TYPES = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "GIF": "gif"}

_STYLE = """
:root { color-scheme: light; font: 1rem/1.5 system-ui, sans-serif; color: #161616; background: #fff; }
body { margin: 0 auto; padding: 1rem 1.5rem 4rem; max-width: 78rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #bbb; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
nav a { margin-right: 1rem; white-space: nowrap; }
a { color: #00507a; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0 0 1.2rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption, .small { font-size: .9rem; color: #444; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 1px solid #888; }
td, tbody th { border-bottom: 1px solid #e4e4e4; }
tbody th { font-weight: 600; white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
.invalid { border-left: 4px solid #b33c00; padding-left: .6rem; font-weight: 600; }
"""


def run_page(run: RunFolder) -> str:
    """The page; pictures that cannot be read join what is absent."""
    absent = list(run.absent)
    sections: dict[str, str] = {}
    if run.stats:
        sections["Summary"] = _summary(run)
    if run.tables:
        sections["Results"] = "".join(_table_of(path, rows, run.folder) for path, rows in run.tables.items())
    if run.stats:
        sections["Training curves"] = _curves(run.stats)
    if run.samples:
        sections["Samples over training"] = _samples(run, absent)
    for name, paths in run.figures.items():
        shown = "".join(_figure(path, _where(path, run.folder), absent) for path in paths[:_MOST_FIGURES])
        more = len(paths) - _MOST_FIGURES
        if shown:
            sections[name] = shown + (f'<p class="small">and {more} more of these</p>' if more > 0 else "")
    sections["Configuration"] = f"<pre>{escape(run.config_text)}</pre>"
    if run.environment:
        sections["Environment"] = _pairs(run.environment)
    if absent:
        listed = "".join(f"<li>{escape(line)}</li>" for line in absent)
        sections["Not in this report"] = f"<ul>{listed}</ul>"
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    shown = "\n".join(
        f'<section id="{ids[name]}"><h2>{escape(name)}</h2>\n{text}</section>' for name, text in sections.items()
    )
    links = "\n".join(f'<a href="#{ids[name]}">{escape(name)}</a>' for name in sections)
    body = f'<p>{escape(run.title)}</p>\n<nav aria-label="Sections">{links}</nav>\n<main>\n{shown}\n</main>\n'
    return page(run.folder.resolve().name, _STYLE + STYLE, body)


def _where(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _summary(run: RunFolder) -> str:
    last = run.stats[-1]
    wanted = run.section("training").get("images")
    seen = f"{last['images_seen']:,}" + (f" of {wanted:,}" if isinstance(wanted, int) else "")
    facts = {"images seen": seen, "reports": len(run.stats), "exports": ", ".join(run.exports) or "none"}
    facts |= {name: value for name, value in last.items() if name != "images_seen"}
    return _pairs(facts)


def _pairs(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>" for name, value in facts.items())
    return f'<div class="wide"><table>{rows}</table></div>'


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)) and all(isinstance(v, (str, int, float)) for v in value):
        more = f" ... ({len(value)} of these)" if len(value) > _MOST_ENTRIES else ""
        return " ".join(map(_text, value[:_MOST_ENTRIES])) + more
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curves(stats: Sequence[Mapping[str, Any]]) -> str:
    names = [n for n in dict.fromkeys(name for row in stats for name in row) if n != "images_seen"]
    charts, still = [], []
    for name in names:
        points = [(row["images_seen"], row[name]) for row in stats if _is_number(row.get(name))]
        values = [float(y) for _, y in points]
        if points and len(set(values)) == 1 and len(values) > 1 and math.isfinite(values[0]):
            still.append(f"{name} {_text(values[0])}")
        elif points:
            charts.append(f"<div>{chart(name, [float(x) for x, _ in points], values)}</div>")
    every = max(1, -(-len(stats) // _MOST_ROWS))
    rows = [*stats[:-1:every], stats[-1]]
    label = "all numbers" if every == 1 else f"numbers of every {every}th report"
    constant = f'<p class="small">Constant: {escape(", ".join(still))}.</p>' if still else ""
    table = _table(rows, ["images_seen", *names])
    return f'<div class="charts">{"".join(charts)}</div>{constant}<details><summary>{label}</summary>{table}</details>'


def _samples(run: RunFolder, absent: list[str]) -> str:
    count = len(run.samples)
    chosen = sorted({round(i * (count - 1) / max(1, min(count, _MOST_SAMPLES) - 1)) for i in range(_MOST_SAMPLES)})
    chosen = [i for i in chosen if i < count]
    shown = "".join(_figure(run.samples[i][1], f"{run.samples[i][0]:,} images seen", absent) for i in chosen)
    less = f'<p class="small">{len(chosen)} of {count} sheets, evenly spread</p>' if len(chosen) < count else ""
    return less + shown


def _figure(path: Path, caption: str, absent: list[str]) -> str:
    try:
        kind, data, size, note = _picture(path)
    except Exception as error:
        absent.append(f"{path}: not an image that can be read ({type(error).__name__})")
        return ""
    encoded = base64.b64encode(data).decode()
    return (
        f'<figure><figcaption>{escape(caption + note)}</figcaption><img alt="{escape(caption)}" '
        f'width="{size[0]}" height="{size[1]}" src="data:image/{kind};base64,{encoded}"></figure>\n'
    )


def _picture(path: Path) -> tuple[str, bytes, tuple[int, int], str]:
    """(type, bytes, (width, height), what to say of it), made smaller where it is large."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        if len(data) <= _MOST_BYTES and picture.format in _TYPES:
            return _TYPES[picture.format], data, picture.size, ""
        whole = picture.size
        small = picture.convert("RGB")
    small.thumbnail((_MOST_WIDTH, 8 * _MOST_WIDTH))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    return "jpeg", stream.getvalue(), small.size, f" (of {whole[0]}x{whole[1]} pixels, shown smaller)"


def _table_of(path: Path, rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    same = [n for n in names if len(rows) > 1 and all(n in row and row[n] == rows[0][n] for row in rows)]
    varying = [name for name in names if name not in same]
    invalid = any(row.get("valid") is False for row in rows)
    warning = '<p class="invalid">Not valid: measured with random or unverified weights.</p>' if invalid else ""
    common = "; ".join(f"{name}: {_text(rows[0][name])}" for name in same)
    below = f'<p class="small">In all rows: {escape(common)}</p>' if common else ""
    if len(rows) == 1:
        return f"<h3>{escape(_where(path, folder))}</h3>{warning}{_pairs(rows[0])}"
    table = _turned(rows, varying) if len(rows) < _MOST_COLUMNS < len(varying) else _table(rows[:_MOST_ROWS], varying)
    return f"<h3>{escape(_where(path, folder))}</h3>{warning}{table}{below}"


def _turned(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The first name is the head of every column, each other one a row."""
    first, *others = names
    columns = [_text(row.get(first)) for row in rows]
    if len({first, *columns}) <= len(columns):
        columns = [f"{column} ({number})" for number, column in enumerate(columns, 1)]
    turned = [{first: name, **{c: row.get(name) for c, row in zip(columns, rows, strict=True)}} for name in others]
    return _table(turned, [first, *columns])


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    numeric = {name: all(_is_number(row[name]) for row in rows if row.get(name) is not None) for name in names}
    kind = {name: ' class="number"' if numeric[name] else "" for name in names}
    head = "".join(f"<th{kind[name]}>{escape(name)}</th>" for name in names)

    def cell(row: Mapping[str, Any], name: str) -> str:
        shown = "" if row.get(name) is None else escape(_text(row[name]))
        return f"<th>{shown}</th>" if name == names[0] and not numeric[name] else f"<td{kind[name]}>{shown}</td>"

    body = "".join(f"<tr>{''.join(cell(row, name) for name in names)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
