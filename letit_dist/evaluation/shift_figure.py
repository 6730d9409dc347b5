"""The figure of the latent shift (LETIT, figure 5), and its numbers beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from letit_dist.data.latents import LatentSet
from letit_dist.evaluation.energy_run import EnergyRun
from letit_dist.evaluation.figures import BLUE, ORANGE, need_matplotlib, new_figure, save_figure
from letit_dist.evaluation.latent_shift import Example, LatentShift, correlation, measure_shift, shift_record
from letit_dist.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_SHIFT = "sum of |dE/du| over the steps"
_BARS = 64  # more cannot be told apart in one row
_SAMPLES = 256  # rows of the heat map
_EXAMPLES = 4  # images, of maps


def shift_figure(shifts: Mapping[str, LatentShift], heading: str) -> Figure:
    """One column a direction, under its title: flat latents by dimension and by sample, map latents by channel and by
    position, with a few images and where in them their latents moved."""
    is_map = any(shift.is_map for shift in shifts.values())
    figure = new_figure((10 if len(shifts) == 1 else 8.5) * len(shifts), 9.8 if is_map else 8.5)
    figure.suptitle(heading, fontsize=15)
    for column, (title, shift) in zip(figure.subfigures(1, len(shifts), squeeze=False)[0], shifts.items(), strict=True):
        column.suptitle(title, fontsize=12)
        (_draw_maps if is_map else _draw_vectors)(column, shift)
    return figure


def _draw_vectors(figure: SubFigure, shift: LatentShift) -> None:
    many = len(shift.vector) > _BARS
    axes = figure.subplots(3 if many else 2, 1, height_ratios=[4, 1, 4] if many else [4, 5])
    _bars(axes[0], shift)
    if many:
        _strip(axes[1], shift)
    shown = min(_SAMPLES, len(shift.rows))
    rows = shift.rows[torch.arange(shown) * len(shift.rows) // shown]
    # The few largest would leave all others in the dark; the colour bar's tip says that there is more.
    top = float(np.quantile(rows, 0.995))
    look = {"aspect": "auto", "cmap": "viridis", "interpolation": "nearest", "vmin": 0, "vmax": top or 1}
    image = axes[-1].imshow(rows.numpy(), **look)
    axes[-1].set(xlabel="latent dimension", ylabel="sample", title=f"each of {len(rows)} samples")
    axes[-1].figure.colorbar(image, ax=axes[-1], label=_SHIFT, extend="max")


def _draw_maps(figure: SubFigure, shift: LatentShift) -> None:
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[4, 5.8])
    many = len(shift.vector) > _BARS
    axes = upper.subplots(2 if many else 1, 1, squeeze=False, height_ratios=[4, 1] if many else [1])[:, 0]
    _bars(axes[0], shift)
    if many:
        _strip(axes[1], shift)
    ((left, right),) = lower.subfigures(1, 2, squeeze=False, width_ratios=[4, 6])
    axis = left.subplots()
    image = axis.imshow(shift.positions.numpy(), cmap="viridis", vmin=0)
    axis.set(xlabel="column", ylabel="row", title="by position")
    left.colorbar(image, ax=axis, label=_SHIFT, location="bottom")
    if shift.examples:
        _draw_examples(right, shift.examples)


def _draw_examples(figure: SubFigure, examples: Sequence[Example]) -> None:
    axes = figure.subplots(3, len(examples), squeeze=False)
    # One scale for all: which image moves more is part of what they show.
    top = max(float(example.shift.max()) for example in examples)
    for column, example in zip(axes.T, examples, strict=True):
        column[0].imshow(example.source.permute(1, 2, 0).numpy())
        image = column[1].imshow(example.shift.numpy(), cmap="viridis", vmin=0, vmax=top or 1)
        column[2].imshow(example.translated.permute(1, 2, 0).numpy())
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("decoded", "its shift", "translated"), strict=True):
        axis.set_ylabel(name, fontsize=11)
    figure.colorbar(image, ax=axes.ravel().tolist(), label=_SHIFT, location="bottom", shrink=0.8)


def _bars(axis: Axes, shift: LatentShift) -> None:
    """A bar for every dimension in order; of many only those that move most and least, in the order of their move."""
    many = len(shift.vector) > _BARS
    half = _BARS // 2
    most, least = shift.most_moved(half), shift.least_moved(half)[::-1]
    dims = [*most, *least] if many else list(range(len(shift.vector)))
    groups = {"": (0, len(dims), BLUE)}
    if many:
        groups = {f"most moved {half}": (0, half, BLUE), f"least moved {half}": (half, 2 * half, ORANGE)}
    for label, (first, last, colour) in groups.items():
        axis.bar(range(first, last), shift.vector[dims[first:last]].tolist(), color=colour, label=label or None)
    axis.set_xticks(range(len(dims)), [str(dim) for dim in dims], rotation=90, fontsize=8)
    axis.set(xlim=(-0.7, len(dims) - 0.3), ylabel=_SHIFT, xlabel=f"latent {shift.noun}", title=f"by {shift.noun}")
    axis.grid(axis="y", alpha=0.4)
    axis.set_axisbelow(True)
    if many:
        axis.legend()


def _strip(axis: Axes, shift: LatentShift) -> None:
    image = axis.imshow(shift.vector[None].numpy(), aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axis.set(yticks=[], xlabel=f"latent {shift.noun}", title=f"all {len(shift.vector)} {shift.noun}s")
    axis.figure.colorbar(image, ax=axis)


def write_shift(
    runs: Sequence[EnergyRun], sides: Sequence[LatentSet], out: Path, *, count: int | None = None, seed: int = 0
) -> Iterator[str]:
    """Measure and draw one direction, or both, each with the latents of its source: OUT/shift.png and OUT/shift.json;
    yields lines that say what was found."""
    need_matplotlib()
    measured = [
        (run, measure_shift(run.translator, side, count=count, seed=seed, examples=_EXAMPLES))
        for run, side in zip(runs, sides, strict=True)
    ]
    records = [shift_record(run, shift, seed) for run, shift in measured]
    record, heading = {**records[0], "back": None, "correlation": None}, "latent shift"
    if len(measured) == 2:
        record["back"], record["correlation"] = records[1], correlation(*(shift for _, shift in measured))
        told = "undefined" if record["correlation"] is None else f"{record['correlation']:.3f}"
        heading += f" of both directions, correlation {told}"
    titles = [
        f"{run.title(seed)}\nmean over {len(shift.rows):,} of {shift.stored:,} latents" for run, shift in measured
    ]
    save_figure(
        shift_figure(dict(zip(titles, (shift for _, shift in measured), strict=True)), heading), out / "shift.png"
    )
    write_atomically(out / "shift.json", (json.dumps(record) + "\n").encode())
    for run, shift in measured:
        yield f"{run.name}, {run.direction}: {len(shift.rows)} of {shift.stored} latents"
        for name, dims in (("most", shift.most_moved()), ("least", shift.least_moved())):
            told = ", ".join(f"{dim} ({shift.vector[dim]:.3g})" for dim in dims)
            yield f"  {name} moved {shift.noun}s: {told}"
    if len(measured) == 2:
        yield heading
    yield f"figure: {out / 'shift.png'}"
