#!/usr/bin/env python3
"""Stage 1: pretrain an autoencoder on image shards.

    accelerate launch --config_file launch/accelerate/gpu8.yaml launch/pretrain.py \\
        configs/pretrain/ffhq1024_vqvae2.yaml --run runs/ffhq1024_vqvae2

    python launch/pretrain.py configs/debug/vqvae2.yaml --run runs/try training.images=64000 data.train=[shards/a]

start_from=FOLDER (of weights, a run, or an id on the Hub, owner/name) begins with those weights in place of random
ones, to fine-tune them on other images: configs/pretrain/finetune_apple2orange_vqvae2.yaml.

The same command again resumes from the newest checkpoint in the run folder, after a stop or a kill. SIGTERM,
SIGUSR1 and Ctrl-C save a checkpoint first (exit code 75). The run folder holds config.yaml, environment.json,
stats.jsonl, samples/, checkpoints/ and, at the end, export/images-*/ with config.json, model.safetensors and a card.
training.trackers=[tensorboard], or [wandb], sends the numbers of stats.jsonl there as well: TensorBoard's files go to
RUN/tensorboard, Weights & Biases asks for `wandb login` once, or keeps all in RUN/wandb with WANDB_MODE=offline.
Any key of the configuration can be given as key=value; --check runs nothing and writes nothing: it refuses what would
refuse the run later, and says what each rank and the disk will hold. Before the data are packed, and for 8 ranks:

    python launch/pretrain.py configs/pretrain/ffhq1024_alae.yaml --check --without-data --ranks 8 \\
        --deepspeed launch/deepspeed/ffhq1024.json --gpu-memory 40
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from letit_dist import cards
from letit_dist.errors import UserError, reports_errors
from letit_dist.training.check_options import add_check_options, require_check_options


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, e.g. configs/pretrain/imagenet256_vqvae2.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. training.batch=64")
    parser.add_argument("--run", type=Path, help="run folder, new or to be resumed")
    add_check_options(parser)
    cards.add_options(parser)
    args = parser.parse_intermixed_args(argv)
    require_check_options(parser, args)
    return args


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from letit_dist.config import load_config
    from letit_dist.schemas import PretrainConfig

    config = load_config(PretrainConfig, args.config, args.overrides)

    from letit_dist.autoencoders.base import Autoencoder, build_autoencoder
    from letit_dist.ranks import launched_ranks
    from letit_dist.recipes.base import Recipe
    from letit_dist.registry import RECIPES
    from letit_dist.training.feeds import open_images
    from letit_dist.training.plan import plan_batches
    from letit_dist.training.run import export, open_run, starts_anew
    from letit_dist.training.setup import create_accelerator, main_decides, seed_weights
    from letit_dist.training.trainer import Trainer

    if config.recipe.kind == "latent_energy":
        raise UserError("recipe.kind: latent_energy trains energies (launch/train_energy.py), not autoencoders")
    recipe_class: Callable[..., Recipe] = RECIPES.get(config.recipe.kind)
    problems = config.recipe.problems(config.autoencoder, config.training)
    levels = [] if problems else config.recipe.levels(config.autoencoder)
    if config.start_from is not None and len(levels) > 1:
        problems.append(f"start_from: {config.start_from} is grown already, give recipe.growth=null")
    if problems:
        raise UserError("\n".join(problems))
    plans = plan_batches(config.training, args.ranks or launched_ranks(), len(levels))

    def build() -> Recipe:
        model = build_autoencoder(config.autoencoder)
        model.recompute(config.training.recompute_from)
        return recipe_class(
            config.recipe,
            model,
            seed=config.training.seed,
            precision=config.training.precision,
        )

    if args.check:
        from letit_dist.training.dry_run import DryRun

        dry = DryRun(config, plans, levels, args.run, args.deepspeed, args.gpu_memory)
        dry.images(build_autoencoder(config.autoencoder).start_from, look=not args.without_data)
        dry.network(build, lambda recipe: recipe.autoencoder)
        return dry.finish()

    feed = open_images(config)
    seed_weights(config.training.seed)
    recipe = build()
    accelerator = create_accelerator(
        several_phases=len(recipe.phases) > 1,
        timeout=config.training.timeout,
        trackers=config.training.trackers,
        run=args.run,
    )
    feed.device = accelerator.device
    origin = None
    if config.start_from is not None and main_decides(accelerator, lambda: starts_anew(args.run)):
        assert isinstance(recipe.autoencoder, Autoencoder)
        origin = recipe.autoencoder.start_from(config.start_from)
    changes = main_decides(accelerator, lambda: open_run(args.run, config))
    trainer = Trainer(
        accelerator,
        recipe,
        feed,
        run=args.run,
        training=config.training,
        intervals=config.intervals,
        max_bad_fraction=config.data.max_bad_fraction,
        origin=origin,
    )
    for line in changes:
        trainer.say(line)
    if origin:
        trainer.say(f"begins with the weights of {origin['parent']} ({origin['parent_fingerprint']})")
    if len(plans) == 1:
        trainer.say(f"batch: {plans[0]}")
    code = trainer.train()
    if feed.unverified:
        print(feed.unverified, flush=True)
    if code == 0:
        card = cards.Card(args.data, args.licence, cards.command_line("launch/pretrain.py", argv))
        export(trainer, card, data=", ".join(config.data.train))
    accelerator.end_training()
    return code


if __name__ == "__main__":
    sys.exit(main())
