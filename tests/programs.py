"""The programs, called in this process as a user calls them; and one small chain of runs that test files share."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
STYLES = ("apple", "orange")

# Overrides that make configs/debug/vqvae2.yaml a matter of seconds. Codes restart often: after so few steps all
# latents would be alike otherwise.
TINY = (
    "autoencoder.resolution=32",
    "autoencoder.channels=16",
    "autoencoder.residual_blocks=1",
    "autoencoder.residual_channels=8",
    "autoencoder.code_dim=8",
    "autoencoder.codes=32",
    "autoencoder.restart_below=1.0",
    "autoencoder.restart_every=2",
    "recipe.optimizer.learning_rate=3e-3",
    "recipe.optimizer.decay=null",
    "training.images=960",
    "training.batch=16",
    "intervals.report=320",
    "intervals.samples=960",
    "intervals.checkpoint=480",
)
TINY_ENERGY = (
    "recipe.langevin.steps=3",
    "recipe.langevin.step_size=20",
    "recipe.optimizer.learning_rate=4e-3",
    "recipe.optimizer.betas=[0.5, 0.999]",
    "recipe.optimizer.decay=null",
    "training.images=256",
    "training.batch=16",
    "intervals.report=128",
    "intervals.samples=256",
    "intervals.checkpoint=128",
)


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


@functools.cache
def _program(name: str):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_").removesuffix(".py"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> Done:
    """Call the program `name` (its path in the repository) with a command line."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = _program(name).main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


def files(*folders: Path) -> dict[str, str]:
    """Every file below the folders, with a hash of what it holds."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Chain:
    """Packed fruit, an autoencoder, latents of both styles and an energy a direction, all by the programs."""

    def __init__(self, root: Path):
        self.root = root
        self.fruit = root / "fruit"
        self.autoencoder = root / "pretrain"
        self.pack = ("shards/pack.py", "builtin:fruit", "--out", self.fruit)
        self.pack += ("--resolution", 32, "--count", 24, "--test", 8)
        self.pretrain = ("launch/pretrain.py", ROOT / "configs/debug/vqvae2.yaml", "--run", self.autoencoder)
        self.pretrain += (f"data.train=[{self.images('apple')},{self.images('orange')}]", *TINY)
        self.done = {"pack": run(*self.pack), "pretrain": run(*self.pretrain)}
        for style in STYLES:
            self.done[f"encode {style}"] = run(*self.encode(style))
        for direction in (STYLES, STYLES[::-1]):
            self.done["energy {} {}".format(*direction)] = run(*self.train_energy(*direction))
        failed = {name: done.err for name, done in self.done.items() if done.code != 0}
        assert not failed, failed

    def images(self, style: str, split: str = "train") -> Path:
        return self.fruit / style / split

    def latents(self, style: str) -> Path:
        return self.root / "latents" / style

    def energy(self, source: str = "apple", target: str = "orange") -> Path:
        return self.root / f"{source}2{target}"

    def encode(self, style: str) -> tuple:
        """The command that encodes a style."""
        shards, out = ("--shards", self.images(style)), ("--out", self.latents(style))
        return ("launch/encode_latents.py", "--autoencoder", self.autoencoder, *shards, *out, "--flip", "--crops", 1)

    def train_energy(self, source: str, target: str) -> tuple:
        """The command that trains one direction."""
        command = ("launch/train_energy.py", ROOT / "configs/energy/fruit.yaml", "--run", self.energy(source, target))
        places = {"autoencoder": self.autoencoder, "data.source": self.latents(source)}
        places["data.target"] = self.latents(target)
        return (*command, *(f"{key}={value}" for key, value in places.items()), *TINY_ENERGY)


_chains: list[Chain] = []


def shared_chain(tmp_path_factory) -> Chain:
    """The one chain of this session: read it, never write into it."""
    if not _chains:
        _chains.append(Chain(tmp_path_factory.mktemp("chain")))
    return _chains[0]
