"""Line charts as SVG inside a page: dark ink on white, letters of the page's own font, nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 38
_COLOUR = "#0072B2"
_MOST = 800  # points of a line; more cannot be told apart
_LOGARITHMIC = 10  # from this ratio of the largest to the smallest value on


def chart(title: str, xs: Sequence[float], ys: Sequence[float], x_label: str = "images seen") -> str:
    """One line through (xs, ys), in order of xs; gaps where a value is not finite, which the title then says.

    The scale is logarithmic where all values are positive and span a factor of 10.
    """
    finite = [y for y in ys if math.isfinite(y)]
    lost = len(ys) - len(finite)
    note = f" ({lost} not finite)" if lost else ""
    if not finite:
        return _svg(title + note, ['<text x="50%" y="50%" text-anchor="middle">no finite value</text>'])
    logarithmic = min(finite) > 0 and max(finite) / min(finite) >= _LOGARITHMIC
    scale = math.log10 if logarithmic else float
    low, high = scale(min(finite)), scale(max(finite))
    if high == low:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    first, last = xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1

    def across(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in _log_ticks(low, high) if logarithmic else ticks(low, high):
        shown, y = (10**value if logarithmic else value), up(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{compact(shown)}</text>')
    for value in ticks(first, last, most=4):
        parts.append(
            f'<text x="{across(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{compact(value)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    every = max(1, -(-len(xs) // _MOST))
    places = [*range(0, len(xs) - 1, every), len(xs) - 1]
    pen, steps = "M", []
    for i in places:
        if not math.isfinite(ys[i]):
            pen = "M"
            continue
        steps.append(f"{pen}{across(xs[i]):.1f} {up(scale(ys[i])):.1f}")
        pen = "L"
    parts.append(f'<path class="line" d="{"".join(steps)}"/>')
    if len(places) <= 40:
        dots = (i for i in places if math.isfinite(ys[i]))
        parts += [f'<circle cx="{across(xs[i]):.1f}" cy="{up(scale(ys[i])):.1f}" r="2.2"/>' for i in dots]
    return _svg(title + note + (", log scale" if logarithmic else ""), parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    name = escape(title)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">'
        f'<text class="name" x="{_LEFT}" y="16">{name}</text>{"".join(parts)}</svg>'
    )


STYLE = f"""
.chart {{ width: 100%; height: auto; font-size: 11px; background: #fff; }}
.chart text {{ fill: #222; }}
.chart .name {{ font-size: 13px; font-weight: 600; }}
.chart .grid {{ stroke: #ddd; fill: none; }}
.chart .axis {{ stroke: #444; fill: none; }}
.chart .line {{ stroke: {_COLOUR}; stroke-width: 1.6; fill: none; stroke-linejoin: round; }}
.chart circle {{ fill: {_COLOUR}; }}
"""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most so many, 1, 2 or 5 times a power of ten apart; two at least."""
    span = high - low
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) < most)
    first = math.ceil(low / step - 1e-9)
    found = [count * step for count in range(first, math.floor(high / step + 1e-9) + 1)]
    return found if len(found) > 1 else [low, high]


def _log_ticks(low: float, high: float) -> list[float]:
    whole = list(range(math.ceil(low), math.floor(high) + 1))
    return [float(power) for power in whole[:: max(1, -(-len(whole) // 5))]]


def compact(value: float) -> str:
    """As few letters as a tick has room for: 20k, 1.5M, 0.02, 1e-07."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return "0" if abs(value) < 1e-300 else f"{value:.3g}"
