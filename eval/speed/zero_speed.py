"""`throughput.py zero`: the same steps under DDP and under DeepSpeed's files, started as a user starts them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from letit_dist.errors import UserError
from letit_dist.training.plan import plan_batches
from letit_dist.training.setup import read_deepspeed, require_usable_deepspeed
from speed.agreement import require_agreement
from speed.programs import ROOT
from speed.zero_rank import built, configuration

DDP = "DDP"
# Of the way that DDP has moved the weights: rounding is far below, a gradient or a moment that is lost far above.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Taken:
    """What one start took; bytes of the rank that has most, by the kind of device where they lie."""

    rate: float  # images a second of all ranks
    peak: int | None
    weights: dict[str, int]
    moments: dict[str, int]
    copies: dict[str, int]
    apart: float  # the weights from DDP's, in units of how far DDP has moved them


def way_apart(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far `found` is from `expected`, in units of the way from `start`: norms over all tensors that `start` has."""

    def square(one: Tensor, other: Tensor) -> float:
        return float((one.double() - other.double()).square().sum())

    far = sum(square(found[name], expected[name]) for name in start)
    return (far / sum(square(expected[name], value) for name, value in start.items())) ** 0.5


class ZeroSpeed:
    """Steps of a configuration on two ranks of a CPU, or on every GPU."""

    def __init__(self, folder: Path, path: Path, overrides: Sequence[str], *, device: str, steps: int):
        self.folder, self.path, self.overrides, self.steps = folder, path, list(overrides), steps
        self.device = device
        self.ranks = torch.cuda.device_count() if device == "cuda" else 2
        free = self.ranks if device == "cuda" else len(os.sched_getaffinity(0))
        if min(free, self.ranks) < 2:
            raise UserError(f"stages shard over ranks, at least two: found {free} {device.upper()} for them")
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError("DeepSpeed is not installed: pip install 'letit_dist[deepspeed]'")
        self.config = configuration(str(path), overrides)
        self.batch = plan_batches(self.config.training, self.ranks)[0].batch
        recipe = built(self.config)
        self._phases, self._inner = len(recipe.phases), recipe.inner_gradients
        self._start = {name: value.detach() for name, value in recipe.named_parameters()}
        self._reference: dict[str, Tensor] = {}  # DDP's weights after the steps
        self._count = 0

    def require_usable(self, file: Path) -> None:
        """UserError for a DeepSpeed JSON that this recipe does not allow."""
        several, tree = self._phases > 1, read_deepspeed(file)
        try:
            require_usable_deepspeed(tree, self.config.training, several_phases=several, inner_gradients=self._inner)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def start(self, file: Path | None) -> Taken:
        """A start under DDP (None), which the next ones are compared with, or under a DeepSpeed JSON."""
        self._count += 1
        out = self.folder / f"run{self._count}"
        out.mkdir()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self._launch(out, file))]
        own_core = [] if self.device == "cuda" else ["eval/speed/own_core.py"]
        command += [*own_core, "eval/speed/zero_rank.py", str(out), str(self.steps), str(self.path), *self.overrides]
        paths = (str(ROOT / "eval"), str(ROOT), os.environ.get("PYTHONPATH", ""))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            # Of several threads of a rank each would take the core of the other one.
            env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise UserError(f"{file or DDP} failed: {' '.join(command)}\n{done.stdout[-2000:]}")
        found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(self.ranks)]
        weights = load_file(next((out / "checkpoints").glob("images-*")) / "model.safetensors")
        shutil.rmtree(out)
        if file is None:
            self._reference = weights
        apart = way_apart(weights, self._reference, self._start)
        require_agreement({f"weights of {file or DDP} and {DDP}": apart}, _TOLERANCE)
        kinds = ("weights", "moments", "copies")
        held = {kind: max((one[kind] for one in found), key=lambda sizes: sum(sizes.values())) for kind in kinds}
        seconds = max(one["seconds"] for one in found)
        peaks = [one["peak"] for one in found]
        rate = found[0]["images"] / seconds
        print(f"{file or DDP}: {rate:.3g} images/s", file=sys.stderr, flush=True)
        return Taken(rate, None if None in peaks else max(peaks), apart=apart, **held)

    def _launch(self, folder: Path, file: Path | None) -> Path:
        """One of the shipped launch files with these ranks and this JSON."""
        many = "8" if self.device == "cuda" else "_cpu2"
        name = f"deepspeed{many}" if file else "gpu8" if self.device == "cuda" else "cpu2"
        tree = yaml.safe_load((ROOT / f"launch/accelerate/{name}.yaml").read_text())
        tree["num_processes"] = self.ranks
        if file:
            tree["deepspeed_config"]["deepspeed_config_file"] = str(file.resolve())
        path = folder / "launch.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path
