"""Tables of the paper as jobs: published numbers beside what given runs reach, measured where that is still to do."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from letit_dist.config import StrictConfig, load_config, read_tree
from letit_dist.energy.translate import METHOD, Translator, open_translators
from letit_dist.errors import UserError
from letit_dist.evaluation.extractors import Extractor, Kind, open_extractor
from letit_dist.evaluation.features import check_alike, forget, gather_features, stamp_of, working_folder
from letit_dist.evaluation.fidelity import FidelityOptions, measure
from letit_dist.evaluation.image_sets import ImageSet, TranslatedImages, open_image_set
from letit_dist.evaluation.protocols import ProtocolConfig, load_protocol
from letit_dist.evaluation.report import write_lines
from letit_dist.evaluation.tables import markdown
from letit_dist.memory import peak_bytes

UNMEASURED = "not yet measured"
_NEEDED = {"identity", "headline", "value", "valid", "protocol"}  # of a row of the record
Pair = tuple[str, str]  # source, target
Runs = dict[tuple[str | None, str | None], Translator]


class CellConfig(StrictConfig):
    """What a column holds, and how it is measured."""

    measure: Literal["fid", "kid", "days", "memory", "parameters", "days_of_both"]
    data: str | None = Field(default=None, description="folder below --data")
    domains: tuple[str, ...] = Field(default=(), description="the mean over all ordered pairs of these")
    pair: Pair | None = Field(default=None, description="or this pair alone")
    protocol: str | None = None
    scale: float = 1.0

    @model_validator(mode="after")
    def _measurable(self) -> CellConfig:
        missing = [name for name in ("data", "protocol") if getattr(self, name) is None]
        if self.measure in ("fid", "kid") and missing:
            raise ValueError(f"measure {self.measure} needs {' and '.join(missing)}")
        return self

    @property
    def pairs(self) -> list[Pair]:
        """The ordered pairs that the cell is the mean of."""
        return [self.pair] if self.pair else list(itertools.permutations(self.domains, 2))


class TableConfig(StrictConfig):
    """One table."""

    title: str
    note: str = ""
    columns: dict[str, CellConfig]
    published: dict[str, tuple[float | str | None, ...]]

    @model_validator(mode="after")
    def _whole_rows(self) -> TableConfig:
        count = len(self.columns)
        wrong = [f"{method!r} has {len(cells)}" for method, cells in self.published.items() if len(cells) != count]
        if wrong:
            raise ValueError(f"{count} columns, but of published {', '.join(wrong)}: write null where nothing is known")
        return self


class TablesConfig(StrictConfig):
    """configs/eval/paper_tables.yaml."""

    source: str
    tables: dict[str, TableConfig]


@dataclass
class Job:
    """What the cells of one table are measured with."""

    data: Path | None
    out: Path
    protocols: Path
    weights: Path
    random_weights: bool = False
    batch: int = 16
    seed: int = 0
    say: Callable[[str], object] = print
    extractors: dict[str, Extractor] = field(default_factory=dict)

    def extractor(self, kind: Kind, device: torch.device) -> Extractor:
        """Opened once."""
        if kind not in self.extractors:
            opened = open_extractor(kind, folder=self.weights, random_weights=self.random_weights)
            self.extractors[kind] = opened.to(device)
        return self.extractors[kind]

    @property
    def record(self) -> Path:
        """Every measured number; what stands here is not measured again."""
        return self.out / "measured.jsonl"

    def measured(self) -> list[dict[str, Any]]:
        """Its rows."""
        try:
            text = self.record.read_text(encoding="utf-8") if self.record.is_file() else ""
            rows = [json.loads(line) for line in text.splitlines()]
            if not all(isinstance(row, dict) and row.keys() >= _NEEDED for row in rows):
                raise ValueError
            return rows
        except ValueError:
            raise UserError(f"{self.record} is damaged: remove it, and everything is measured again") from None


def open_runs(runs: Sequence[str]) -> Runs:
    """The translators of all runs by where they go; UserError for two that go the same way."""
    found: Runs = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for run in runs:
        for translator in open_translators(run):
            way = (translator.energy.extra.get("source"), translator.energy.extra.get("target"))
            if way in found:
                raise UserError(f"--run {run} and {found[way].origin} both go from {way[0]} to {way[1]}: name one")
            found[way] = translator.to(device)
    return found


def shards_of(data: Path | None, name: str, domain: str, split: str) -> Path:
    """Where docs/data.md packs this split; held-out images are called test or val."""
    if data is None:
        raise UserError("--data is needed: the folder of the packed sets")
    tried = [split, *({"test": "val", "val": "test"}.get(split, ()),)]
    places = [data / name / domain / part for part in tried if part]
    for place in places:
        if (place / "index.json").is_file():
            return place
    raise UserError(f"no shards in {places[0]}: docs/data.md has the command that packs {name}")


def measure_pair(job: Job, cell: CellConfig, translator: Translator, pair: Pair) -> dict[str, Any]:
    """The protocol's headline row of one direction, from the record if it stands there."""
    assert cell.protocol is not None and cell.data is not None
    protocol = load_protocol(cell.protocol, job.protocols)
    source = open_image_set(shards_of(job.data, cell.data, pair[0], protocol.source_split))
    reference = open_image_set(shards_of(job.data, cell.data, pair[1], protocol.reference_split), protocol.resize)
    protocol = _outputs_that_differ(protocol, translator, job.say)
    made = TranslatedImages(
        translator, source, outputs=protocol.outputs, seed=job.seed, batch=job.batch, side=protocol.resize
    )
    options = FidelityOptions(
        metrics=(cell.measure,), kid_subsets=protocol.kid.subsets, kid_subset_size=protocol.kid.subset_size
    )
    options.check(len(made), len(reference))
    counts = {"sources": len(source), "outputs": protocol.outputs, "reference": len(reference)}
    splits = source.split, reference.split
    protocol.check(**counts, splits=splits)
    extractor = job.extractor(protocol.extractor, translator.device)
    stamps = [stamp_of(side, extractor) for side in (made, reference)]
    check_alike(*stamps)
    decided = [protocol.model_dump(mode="json"), dataclasses.asdict(options)]
    tree = json.dumps([stamps, *decided, cell.measure], sort_keys=True)
    identity = hashlib.sha256(tree.encode()).hexdigest()[:16]
    rows = job.measured()
    for row in rows:
        if row["identity"] == identity and row["headline"]:
            return row
    kept = [working_folder(job.out, stamp) for stamp in stamps]
    sides: list[ImageSet] = [made, reference]
    ours, real = (
        gather_features(side, extractor, lambda mine: [mine], keep=keep) for side, keep in zip(sides, kept, strict=True)
    )
    extra = {"identity": identity, "pair": list(pair), "splits": splits}
    found = measure(ours, real, options, snapshot=made.snapshot, extra=extra)
    new = [protocol.annotate(row) for row in found]
    write_lines([*rows, *new], job.record)
    forget(kept)
    return next(row for row in new if row["headline"])


def _outputs_that_differ(
    protocol: ProtocolConfig, translator: Translator, say: Callable[[str], object]
) -> ProtocolConfig:
    noisy = translator.sampler.config.noise_scale > 0 or translator.autoencoder.decodes_with_noise
    if protocol.outputs == 1 or noisy:
        return protocol
    say(f"{translator.origin}: its chain has no noise, one output a source instead of {protocol.outputs} equal ones")
    return protocol.model_copy(update={"outputs": 1})


def training_days(run: Path) -> float | None:
    """Days that a run has trained, by the rates of its stats.jsonl; None without."""
    path = run / "stats.jsonl"
    if not path.is_file():
        return None
    seconds, before = 0.0, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            seconds += (row["images_seen"] - before) / row["images_per_second"]
            before = row["images_seen"]
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # a line cut by a kill, or one without a rate
    return seconds / 86_400 if before else None


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.3g}"


def _run_of(translator: Translator) -> Path:
    assert translator.origin is not None  # as `open_translators` says
    return translator.origin


def _both_days(translator: Translator) -> str:
    run = _run_of(translator)
    parts = (training_days(Path(read_tree(run / "config.yaml")[0]["autoencoder"])), training_days(run))
    return " + ".join(UNMEASURED if days is None else f"{days:.2g}" for days in parts)


def _gigabytes(translator: Translator) -> float:
    """Of translating one image: tensors at the peak, weights included."""
    networks = (translator.autoencoder, translator.energy)
    held = sum(t.numel() * t.element_size() for n in networks for t in (*n.parameters(), *n.buffers()))
    side = translator.autoencoder.config.resolution
    grey = torch.zeros(1, 3, side, side, device=translator.device)
    noise = translator.noise(0, [0])
    run = peak_bytes(lambda: translator.translate(grey, noise=noise), translator.device)
    return (held + run) / 1e9


def going(runs: Runs, pair: Pair) -> Translator | None:
    """The one for this pair, or one that goes to its target from any domain."""
    return runs.get(pair) or runs.get((None, pair[1]))


def measure_cell(job: Job, cell: CellConfig, runs: Runs) -> tuple[Any, dict[str, Any]]:
    """(what the table shows, what its JSON line says) of one cell of our row."""
    there = {pair: translator for pair in cell.pairs if (translator := going(runs, pair)) is not None}
    if not there:
        return UNMEASURED, {"value": None}
    first = next(iter(there.values()))
    if cell.measure == "days":
        days = training_days(_run_of(first))
        return (UNMEASURED if days is None else days), {"value": days}
    if cell.measure == "memory":
        value = _gigabytes(first)
        return value, {"value": value}
    rows = [measure_pair(job, cell, translator, pair) for pair, translator in there.items()]
    value = cell.scale * math.fsum(row["value"] for row in rows) / len(rows)
    valid = all(row["valid"] for row in rows)
    notes = [f"{len(there)} of {len(cell.pairs)} pairs"] if len(there) < len(cell.pairs) else []
    notes += [] if valid else ["not valid"]
    details = {"value": value, "valid": valid, "pairs": list(there), "protocol": rows[0]["protocol"]}
    return (f"{value:.4g} ({', '.join(notes)})" if notes else value), details


def write_table(name: str, config: Path, runs: Sequence[str], job: Job) -> Iterator[str]:
    """The table as Markdown, and OUT/NAME.jsonl; yields the lines to print."""
    tables = load_config(TablesConfig, config)
    if name not in tables.tables:
        raise UserError(f"{config} has no {name}, it has {', '.join(tables.tables) or 'no table'}")
    table = tables.tables[name]
    rows = [{"method": method, "from": tables.source, **dict(zip(table.columns, cells, strict=True))}
            for method, cells in table.published.items()]  # fmt: skip
    opened = open_runs(runs)
    used = {pair for cell in table.columns.values() for pair in cell.pairs}
    if used:
        for way, translator in opened.items():
            if way not in used and (way[0] is not None or way[1] not in {target for _, target in used}):
                where = f"from {way[0] or 'any domain'} to {way[1]}"
                yield f"notice: {translator.origin} goes {where}, which is no part of {name}"
        found = {column: measure_cell(job, cell, opened) for column, cell in table.columns.items()}
        rows.append({"method": METHOD, "from": "measured here", **{c: shown for c, (shown, _) in found.items()}})
        lines = [{"table": name, "column": column, **details} for column, (_, details) in found.items()]
    else:
        lines = []
        for translator in opened.values():
            counts = " + ".join(map(_millions, (translator.autoencoder, translator.energy)))
            told = {"parameters": counts, "days_of_both": _both_days(translator)}
            cells = {column: told.get(cell.measure, UNMEASURED) for column, cell in table.columns.items()}
            rows.append({"method": f"{METHOD}: {_run_of(translator).name}", "from": "counted here", **cells})
            lines.append({"table": name, "run": str(translator.origin), **cells})
        if not opened:
            rows.append({"method": METHOD, "from": "counted here", **dict.fromkeys(table.columns, UNMEASURED)})
    yield f"{name}: {table.title}"
    yield markdown(rows)
    if table.note:
        yield table.note
    write_lines(lines, job.out / f"{name}.jsonl")
