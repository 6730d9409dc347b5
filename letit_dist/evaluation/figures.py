"""Figures with matplotlib: readable without zooming, safe for colour-blind eyes, titled with what made them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from letit_dist.errors import UserError
from letit_dist.evaluation.pies import SOURCE, TARGET, PiesConfig, PiesResult
from letit_dist.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by all common forms of colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#888888"
_SHOWN = 1500  # points a cloud; more are a blot


def need_matplotlib() -> None:
    """Raise UserError where it is not installed: before the work whose figure could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib: pip install matplotlib")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; raises UserError without matplotlib."""
    need_matplotlib()
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display.
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_atomically(path, drawn.getvalue())


def pies_figure(result: PiesResult, config: PiesConfig) -> Figure:
    """Figure 3 of the paper: the translated points at the watched epochs, and the shift of every dimension."""
    epochs = sorted(result.translated)
    figure = new_figure(4 * (len(epochs) + 1), 4.4)
    axes = figure.subplots(1, len(epochs) + 1)
    every = max(1, len(result.source) // _SHOWN)
    for axis, epoch in zip(axes, epochs, strict=False):
        clouds = (
            ("source", result.source, GREY),
            ("target", result.target, ORANGE),
            ("translated", result.translated[epoch], BLUE),
        )
        for name, points, colour in clouds:
            axis.scatter(*points[::every].T.tolist(), s=4, c=colour, label=name, alpha=0.6, linewidths=0)
        for centre in (SOURCE, TARGET):
            turn = torch.linspace(0, 2 * torch.pi, 100)
            axis.plot((turn.cos() + centre[0]).tolist(), (turn.sin() + centre[1]).tolist(), c="black", lw=0.8)
        axis.set(xlim=(-2, 2), ylim=(-1.5, 2.5), aspect="equal", xlabel="content", ylabel="style")
        axis.set_title(f"epoch {epoch}: {100 * result.inside(epoch):.1f} % inside")
    axes[0].legend(loc="lower left", markerscale=3, framealpha=0.9)
    last = epochs[-1]
    # Sorted along the content, so that a shift that depends on it would show as a slope.
    rows = result.shift[last][result.source[:, 0].argsort()][:: max(1, len(result.source) // 400)]
    image = axes[-1].imshow(rows.T.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    axes[-1].set(xlabel="points, by content", ylabel="latent dimension", yticks=range(config.latent_dim))
    still = ", ".join(map(str, sorted(result.still_dimensions(last)))) or "none"
    axes[-1].set_title(f"latent shift; still: {still}")
    figure.colorbar(image, ax=axes[-1], label="sum of |dE/dz| over the steps")
    figure.suptitle(f"two pies, {config.steps} steps of {config.step_size:g}, seed {config.seed}")
    return figure


def energy_curve(
    steps: Sequence[float], energies: Sequence[float], shown: Sequence[int], limits: tuple[float, float], height: int
) -> Image.Image:
    """The energy along one path as a picture `height` pixels high, with a point at every step whose frame is shown;
    `limits` are the lowest and the highest energy of all paths, which get one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(3.2, 2.1)
    # In proportion to the frames beside it, letters too.
    figure.set_dpi(height / 2.1)
    axis = figure.subplots()
    axis.plot(steps, energies, c=BLUE, lw=1.5)
    axis.plot([steps[t] for t in shown], [energies[t] for t in shown], "o", c=ORANGE, mec="black", mew=0.5)
    room = 0.08 * (limits[1] - limits[0]) or 1.0
    axis.set(xlabel="step", ylabel="energy", ylim=(limits[0] - room, limits[1] + room))
    places = axis.xaxis.get_major_locator()
    assert isinstance(places, MaxNLocator)
    places.set_params(integer=True)
    axis.grid(alpha=0.4)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
