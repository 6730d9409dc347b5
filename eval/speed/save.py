"""what a checkpoint and a resume take of training"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from speed.arguments import Rows, at_least_one, without_effect


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--configs", type=Path, nargs="+", metavar="FILE", help="of pretrain.py (VQ-VAE-2 at 256, ALAE at 1024)")
    add("--batch", type=int, default=1, metavar="N", help="images of the iterations that are timed (1)")


def matches(args: argparse.Namespace) -> Rows:
    """A checkpoint and a resume of each configuration."""
    at_least_one(args, "batch")
    without_effect(args, "bf16", "compile", "plain", "flops")
    from letit_dist.config import load_config
    from letit_dist.evaluation.benchmark import Fact
    from letit_dist.schemas import PretrainConfig
    from speed.save_cost import save_cost

    shipped = [Path(f"configs/pretrain/{name}.yaml") for name in ("imagenet256_vqvae2", "ffhq1024_alae")]
    for path in args.configs or shipped:
        config = load_config(PretrainConfig, path)
        with tempfile.TemporaryDirectory() as folder:
            cost = save_cost(config, Path(folder), count=args.batch, repeats=args.repeats)
        interval = config.intervals.checkpoint
        yield Fact(
            path.stem,
            f"a checkpoint of {cost.bytes / 2**20:.0f} MiB every {interval} images: training stands still for "
            f"{cost.held:.2f} s of {interval * cost.image:.0f} s, {cost.share(interval):.4%} (target: below 1 %); "
            f"written behind it in {cost.behind:.1f} s; resumed in {cost.resumed:.1f} s (target: below 10 s)",
        )
