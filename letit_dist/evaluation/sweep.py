"""A grid of autoencoders that differ in the size and dimension of their codebooks, and the table of their errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from letit_dist.autoencoders.base import load_autoencoder
from letit_dist.config import Count, StrictConfig
from letit_dist.data.reader import ShardDataset
from letit_dist.errors import UserError
from letit_dist.evaluation.reconstruction import measure_reconstruction, together
from letit_dist.evaluation.tables import markdown
from letit_dist.pretrained import find_folder


class SweepConfig(StrictConfig):
    """A file such as configs/eval/table8.yaml."""

    config: str = Field(description="of launch/pretrain.py")
    run: str = Field(description="folder of each run, with {codes} and {code_dim}")
    codes: tuple[Count, ...]
    code_dim: tuple[Count, ...]
    overrides: tuple[str, ...] = ()

    def cells(self) -> Iterator[tuple[int, int, Path, str]]:
        """(codes, code_dim, run folder, the command that trains it)."""
        for dim in self.code_dim:
            for codes in self.codes:
                run = self.run.format(codes=codes, code_dim=dim)
                changes = [f"autoencoder.codes={codes}", f"autoencoder.code_dim={dim}", *self.overrides]
                yield codes, dim, Path(run), f"launch/pretrain.py {self.config} --run {run} {' '.join(changes)}"


def sweep_table(
    sweep: SweepConfig, datasets: list[ShardDataset], *, batch: int = 16
) -> tuple[str, list[dict[str, Any]], list[str]]:
    """(table of the MSE: a row a dimension and a column a size, its cells as rows, commands of runs that are not
    there). Raises UserError for a run whose codebook is another than its place in the grid says."""
    rows: dict[int, dict[str, Any]] = {}
    cells, missing = [], []
    for codes, dim, run, command in sweep.cells():
        row = rows.setdefault(dim, {"dimension \\ codes": dim})
        if not run.is_dir():
            missing.append(command)
            row[str(codes)] = None
            continue
        autoencoder = load_autoencoder(find_folder(run))
        found = getattr(autoencoder.config, "codes", None), getattr(autoencoder.config, "code_dim", None)
        if found != (codes, dim):
            raise UserError(f"{run}: codes and code_dim are {found[0]} and {found[1]}, the sweep has {codes} and {dim}")
        parts = [measure_reconstruction(autoencoder, dataset, batch=batch) for dataset in datasets]
        cells.append({**together(parts).row(), "codes": codes, "code_dim": dim, "run": str(run)})
        row[str(codes)] = cells[-1]["mse"]
    return markdown(list(rows.values())), cells, missing
