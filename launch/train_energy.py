#!/usr/bin/env python3
"""Stage 2: learn the energy that carries the latents of one domain to another.

    python launch/train_energy.py configs/energy/fruit.yaml --run runs/fruit/apple2orange \\
        autoencoder=runs/fruit/pretrain data.source=data/fruit-latents/apple data.target=data/fruit-latents/orange

    accelerate launch --config_file launch/accelerate/gpu8.yaml launch/train_energy.py ...

The latents come from launch/encode_latents.py. The same command again resumes from the newest checkpoint.
Swap data.source and data.target (and name another run folder) for the other direction; or learn all directions
between several domains at once (data.domains in place of both, see configs/energy/domains.yaml). The run folder ends
with export/images-*/: the energy with its chain's settings and its autoencoder's fingerprint.
Any key of the configuration can be given as key=value; --check runs nothing and writes nothing: it refuses what
would refuse the run later, and says what each rank and the disk will hold (--check --ranks 8).
autoencoder= takes a folder, a run, or an id on the Hub (owner/name). training.trackers=[tensorboard], or [wandb], sends
the numbers of stats.jsonl there as well: TensorBoard's files go to RUN/tensorboard, Weights & Biases asks for
`wandb login` once, or keeps all in RUN/wandb with WANDB_MODE=offline.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from letit_dist import cards
from letit_dist.errors import UserError, reports_errors
from letit_dist.training.check_options import add_check_options, require_check_options


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, e.g. configs/energy/fruit.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. training.batch=16")
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
    from letit_dist.schemas import TrainEnergyConfig

    config = load_config(TrainEnergyConfig, args.config, args.overrides)

    from letit_dist.autoencoders.base import Autoencoder, load_autoencoder
    from letit_dist.data.latents import LatentSet
    from letit_dist.energy.baselines import MeanShift
    from letit_dist.energy.models import build_energy, conditions_of, load_energy
    from letit_dist.evaluation.latents import all_latents, compare, measure_unit
    from letit_dist.evaluation.tables import markdown
    from letit_dist.hub import is_hub_id
    from letit_dist.pretrained import find_folder
    from letit_dist.ranks import launched_ranks
    from letit_dist.recipes.latent_energy import LatentEnergyConfig, LatentEnergyRecipe
    from letit_dist.training.feeds import LatentFeed
    from letit_dist.training.plan import plan_batches
    from letit_dist.training.run import export, open_run
    from letit_dist.training.setup import create_accelerator, main_decides, seed_weights
    from letit_dist.training.trainer import Trainer

    if not isinstance(config.recipe, LatentEnergyConfig):
        raise UserError(f"recipe.kind: {config.recipe.kind} trains autoencoders (launch/pretrain.py), not energies")
    if problems := config.recipe.problems(None, config.training):
        raise UserError("\n".join(problems))
    (plan,) = plan_batches(config.training, args.ranks or launched_ranks())

    def load() -> Autoencoder:
        return load_autoencoder(find_folder(config.autoencoder))

    opening: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if args.check:
        from letit_dist.training.dry_run import DryRun

        dry = DryRun(config, [plan], run=args.run, deepspeed=args.deepspeed, gpu_memory=args.gpu_memory)
        if args.without_data or is_hub_id(config.autoencoder):
            dry.unseen(LatentEnergyRecipe)
            return dry.finish()
        opening = dry.opening(
            LatentEnergyRecipe, lambda: load_autoencoder(find_folder(config.autoencoder)).fingerprint()
        )

    several, by_size = bool(config.data.domains), config.data.balance == "size"
    on = config.energy.condition_on
    with opening:
        autoencoder = load()
        fingerprint = autoencoder.fingerprint()
        sides = [LatentSet.open(folder, autoencoder_fingerprint=fingerprint) for folder in config.data.folders]
        feed = LatentFeed(*sides, seed=config.training.seed, every_way=several, by_size=by_size)
        unit = measure_unit(autoencoder, *sides)
        shifts = {
            (feed.names[source], feed.names[target]): MeanShift.fit(
                *(all_latents(autoencoder, sides[side], most=64 if args.check else None) for side in (source, target))
            )
            for source, target in feed.pairs
        }
        named = [] if on is None else conditions_of(on, feed.names)

    def build() -> LatentEnergyRecipe:
        assert isinstance(config.recipe, LatentEnergyConfig)
        energy = build_energy(config.energy, autoencoder.latent_shape, measured_unit=unit, conditions=named)
        seed, precision = config.training.seed, config.training.precision
        return LatentEnergyRecipe(config.recipe, energy, autoencoder, shifts, seed=seed, precision=precision)

    if args.check:
        from letit_dist.training.estimate import latents_of

        dry.latents(feed)
        dry.network(build, lambda recipe: recipe.energy, latents_of(autoencoder.latent_shape, several))
        return dry.finish()

    seed_weights(config.training.seed)
    recipe = build()
    accelerator = create_accelerator(
        several_phases=len(recipe.phases) > 1,
        timeout=config.training.timeout,
        trackers=config.training.trackers,
        run=args.run,
    )
    changes = main_decides(accelerator, lambda: open_run(args.run, config))
    trainer = Trainer(
        accelerator,
        recipe,
        feed,
        run=args.run,
        training=config.training,
        intervals=config.intervals,
    )
    for line in changes:
        trainer.say(line)
    sizes = [
        f"{name} ({len(side)} latents{'' if side.fields else ', read from disk: too large for memory'})"
        for name, side in zip(feed.names, sides, strict=True)
    ]
    trainer.say(f"{', '.join(sizes[:-1])} {'and' if config.data.domains else 'to'} {sizes[-1]}; batch: {plan}")
    code = trainer.train()
    if feed.unverified:
        print(feed.unverified, flush=True)
    if code == 0:
        ends = {"domains": feed.names} if config.data.domains else {"source": feed.names[0], "target": feed.names[1]}
        names = zip(feed.names, sides, config.data.folders, strict=True)
        made_of = ", ".join(f"{name} ({len(side)} latents, {folder})" for name, side, folder in names)
        card = cards.Card(args.data, args.licence, cards.command_line("launch/train_energy.py", argv))
        folder = export(trainer, card, data=made_of, autoencoder_fingerprint=fingerprint, **ends)
        metrics: dict[str, float] = {}
        with trainer.whole_trained() as trained:
            assert isinstance(trained, LatentEnergyRecipe)
            for direction, (source, target) in zip(trained.directions(), feed.pairs, strict=True):
                if not trainer.is_main:
                    break
                starts, goals = (all_latents(autoencoder, sides[side], most=512) for side in (source, target))
                way = f"{feed.names[source]} to {feed.names[target]}"
                rows = compare(direction.energy, direction.methods, starts, goals, unit)
                metrics |= {f"{way}: kernel distance, {row['method']}": row["kernel_distance"] for row in rows}
                print(f"{way}\n{markdown(rows)}")
        if trainer.is_main:
            load_energy(folder).add_metrics(folder, metrics)
    accelerator.end_training()
    return code


if __name__ == "__main__":
    sys.exit(main())
