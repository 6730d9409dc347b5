#!/usr/bin/env python3
"""One pair of domains on several backbones: the table that says which one to take.

    python eval/backbones.py configs/eval/backbones_emoji.yaml --out runs/backbones/table
    python eval/backbones.py configs/eval/backbones_emoji.yaml --out runs/backbones/table backbones.mine=runs/mine

The file names a pair (image shards of training and test images), one setting of the energy, and the backbones: your
own, transferred from another set, fine-tuned on the pair, other people's. For each this makes what is missing: encodes
the training images, learns the energy (launch/train_energy.py), translates the test images, and measures

  psnr, ssim, lpips_*   of the reconstructed test images of both domains; LPIPS where its weights are there
  reconstruction_accuracy, mean_shift_accuracy, target_accuracy   share of the source's test images that a judge, the
                        same for all and trained on real images, takes for the target: reconstructed, moved by the mean
                        shift, translated
  content_error, pair_error, l2_to_source, moved_lpips_*   of the translations, see eval/translation.py
  encode_seconds, train_seconds, translate_seconds   of both domains' training images; of the energy, by its own log; of
                        moving and decoding all test images. A dash where it was not done in one go
  latents               shape of one image's

and prints one table. OUT/backbones.jsonl has a line a backbone, OUT/backbones.png rows of sources with a reconstruction
and a translation by each, OUT/NAME all that was made. The same command again continues, and uses what is finished.
Any key of the file can be given as key=value.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from letit_dist.errors import UserError, reports_errors
from letit_dist.files import require_folder

ROOT = Path(__file__).resolve().parent.parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file, e.g. configs/eval/backbones_emoji.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. backbones.mine=runs/mine")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all that is made")
    parser.add_argument("--lpips", nargs="*", choices=("alex", "vgg", "squeeze"), default=["alex"], help="(alex)")
    parser.add_argument(
        "--weights", metavar="DIR", help="weight files ($LETIT_WEIGHTS, or ~/.cache/letit_dist/weights)"
    )
    parser.add_argument("--batch", type=int, default=64, help="at most so many images at once (64)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="for encoding (4; GPU: 80 %% of what is free)")
    return parser.parse_intermixed_args(argv)


def train(arguments: list[str], run: Path) -> None:
    """launch/train_energy.py in a process of its own, as a user calls it."""
    print(f"$ python {shlex.join(['launch/train_energy.py', *arguments])}", flush=True)
    code = subprocess.call([sys.executable, str(ROOT / "launch/train_energy.py"), *arguments])
    if code:
        raise UserError(f"{run}: launch/train_energy.py ended with code {code} (see above): the same command continues")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.batch < 1:
        raise UserError("--batch must be at least 1")
    require_folder(args.out, "--out")
    from letit_dist.config import load_config
    from letit_dist.evaluation.backbones import BackbonesConfig, Job, compare_backbones

    config = load_config(BackbonesConfig, args.config, args.overrides)
    import torch

    from letit_dist.evaluation.reconstruction import find_backbones
    from letit_dist.evaluation.weights import weights_folder
    from letit_dist.losses.perceptual import PerceptualLoss
    from letit_dist.memory import budget_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths, missing = find_backbones(weights_folder(args.weights), args.lpips)
    for line in missing:
        print(f"notice: {line}", file=sys.stderr)
    nets: dict[str, torch.nn.Module] = {
        net: PerceptualLoss(path, net=net).to(device).network for net, path in paths.items()
    }
    job = Job(config, args.out, train, device, budget_bytes(args.memory, device), nets, args.batch)
    for line in compare_backbones(job):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
