#!/usr/bin/env python3
"""What translating and encoding large images takes on this machine: stated before the run, and measured.

    python tests/large_images.py runs/large --autoencoder alae
    python tests/large_images.py runs/large --autoencoder vqvae2 --multiplier 8 --steps 35
    python tests/large_images.py runs/large --autoencoder alae --program encode --precision bf16 --count 1

Makes an autoencoder and an energy with random weights and a few pictures in the folder, runs launch/translate.py or
launch/encode_latents.py on them in a process of its own, and prints a row for the table of docs/experiments.md:
images at once, GiB stated and measured, seconds an image of processor time and on the clock. The weights decide what
comes out, not what it takes.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GIB = 1 << 30


def make_models(folder: Path, kind: str, resolution: int, *, multiplier: int = 1, steps: int = 20, **config) -> None:
    """folder/autoencoder and folder/energy with random weights: MLP for flat latents, convolutional for maps."""
    import torch

    from letit_dist.autoencoders.base import build_autoencoder
    from letit_dist.energy.convolutional import ConvEnergyConfig
    from letit_dist.energy.mlp import MLPEnergyConfig
    from letit_dist.energy.models import build_energy
    from letit_dist.registry import AUTOENCODERS

    torch.manual_seed(0)
    autoencoder = build_autoencoder(AUTOENCODERS.get(kind).config_class(resolution=resolution, **config))
    for name, parameter in autoencoder.named_parameters():
        if "noise" in name:  # zero at the start
            torch.nn.init.normal_(parameter, std=0.1)
    flat = len(autoencoder.latent_shape) == 1
    energy = build_energy(
        MLPEnergyConfig() if flat else ConvEnergyConfig(multiplier=multiplier), autoencoder.latent_shape
    )
    autoencoder.save_pretrained(folder / "autoencoder")
    energy.save_pretrained(
        folder / "energy",
        autoencoder_fingerprint=autoencoder.fingerprint(),
        langevin={"steps": steps, "step_size": 1.0},
        source="apple",
        target="orange",
    )


def make_pictures(folder: Path, resolution: int, count: int) -> Path:
    """A shard folder with `count` built-in apples."""
    pack = [sys.executable, ROOT / "shards/pack.py", "builtin:fruit", "--out", folder]
    subprocess.run([*pack, "--resolution", str(resolution), "--count", str(count), "--test", "1"], check=True)
    return folder / "apple/train"


@dataclass(frozen=True)
class Watched:
    """How a program ran."""

    code: int
    lines: list[str]
    errors: str
    peak: int  # bytes of resident memory
    elapsed: float  # seconds from its first line to its end
    computed: float  # seconds of processor time in between, of all threads: does not grow when others use the machine

    @property
    def stated(self) -> float:
        """GiB that its first line names."""
        assert self.lines[0].startswith("memory: about "), self.lines
        return float(self.lines[0].split()[2])


def watch(command: list, threads: int) -> Watched:
    """Run a program in a process of its own and look at its memory fifty times a second."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)
    peak = 0
    errors: list[str] = []

    def look() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            fields = dict(line.split(":", 1) for line in status.splitlines())
            # The program resets its own peak before it measures, so the largest that was ever seen counts.
            peak = max(peak, int(fields.get("VmHWM", "0 kB").split()[0]) * 1024)
            time.sleep(0.02)

    helpers = [threading.Thread(target=look), threading.Thread(target=lambda: errors.append(process.stderr.read()))]
    for helper in helpers:
        helper.start()
    lines, begun, computed = [], time.monotonic(), -_children_seconds()
    for line in process.stdout:
        if not lines:
            begun = time.monotonic()
            user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            computed -= (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        lines.append(line.rstrip("\n"))
    code, ended = process.wait(), time.monotonic()
    for helper in helpers:
        helper.join()
    return Watched(code, lines, errors[0], peak, ended - begun, computed + _children_seconds())


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--autoencoder", choices=("alae", "vqvae2"), default="alae")
    parser.add_argument("--program", choices=("translate", "encode"), default="translate")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--count", type=int, default=4, help="images")
    parser.add_argument("--steps", type=int, default=20, help="of the chain")
    parser.add_argument("--multiplier", type=int, default=1, help="width of the convolutional energy")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--path", action="store_true")
    parser.add_argument("--sheet", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    sys.path.insert(0, str(ROOT))
    models = args.folder / f"{args.autoencoder}-{args.resolution}-{args.multiplier}-{args.steps}"
    if not models.exists():
        make_models(models, args.autoencoder, args.resolution, multiplier=args.multiplier, steps=args.steps)
    pictures = args.folder / f"pictures-{args.resolution}-{args.count}"
    shards = pictures / "apple/train" if pictures.exists() else make_pictures(pictures, args.resolution, args.count)
    out = args.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    common = ["--autoencoder", models / "autoencoder", "--out", out, "--memory", args.memory]
    common += ["--precision", args.precision]
    if args.program == "translate":
        command = [ROOT / "launch/translate.py", shards, "--energy", models / "energy", *common]
        command += [f"--{name}" for name in ("path", "sheet") if getattr(args, name)]
    else:
        command = [ROOT / "launch/encode_latents.py", "--shards", shards, *common]
    done = watch(command, args.threads)
    print("\n".join(done.lines), done.errors, sep="\n", end="")
    if done.code == 0:
        at_once = done.lines[0].split(" at once")[0].split()[-2]
        seconds = [f"{part / args.count:.1f}" for part in (done.computed, done.elapsed)]
        cells = [
            args.program,
            args.autoencoder,
            args.precision,
            at_once,
            f"{done.stated:.1f}",
            f"{done.peak / GIB:.2f}",
        ]
        print("| " + " | ".join([*cells, *seconds]) + " |")
    sys.exit(done.code)


if __name__ == "__main__":
    main()
