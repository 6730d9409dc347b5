"""The one training loop. It knows phases, images and intervals, and never a model's name."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from letit_dist import schedule
from letit_dist.errors import UserError
from letit_dist.pictures import grid, save_picture
from letit_dist.pretrained import load_exactly
from letit_dist.recipes.base import Batch, Phase, Recipe
from letit_dist.schemas import IntervalsConfig, TrainingConfig
from letit_dist.training.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from letit_dist.training.ema import WeightAverage
from letit_dist.training.ends import Problems, StopSignals, why_it_ended
from letit_dist.training.exchange import FLAGS, Exchange, unusable
from letit_dist.training.feeds import PREVIEW, Feed
from letit_dist.training.metrics import Means, StatsFile
from letit_dist.training.optim import activate, build_optimizer, forget_gradients, move, require_gradients
from letit_dist.training.plan import BatchPlan, plan_batches
from letit_dist.training.setup import (
    begin_trackers,
    change_deepspeed_batch,
    configure_deepspeed,
    is_deepspeed,
    main_decides,
    prepare,
    require_equal_weights,
)
from letit_dist.training.sharded import TrainingState

# Exit code of a run that was asked to stop and has saved itself: a scheduler may requeue it (EX_TEMPFAIL).
STOPPED = 75

_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


class Trainer:
    """Runs a recipe over a feed until `training.images`, resuming from the newest whole checkpoint in `run`.

    Every rank builds one. `accelerator` decides where and with whom; nothing else depends on it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        feed: Feed,
        *,
        run: Path,
        training: TrainingConfig,
        intervals: IntervalsConfig,
        max_bad_fraction: float = 1.0,
        preview: int = PREVIEW,
        origin: dict[str, str] | None = None,
    ):
        self.accelerator = accelerator
        self.feed = feed
        self.run = run
        self.origin = origin or {}  # whose weights a new run began with; of a resumed one the checkpoint says it
        self.training = training
        self.intervals = intervals
        self.max_bad_fraction = max_bad_fraction
        self.images_seen = 0
        self.plans = plan_batches(training, accelerator.num_processes, len(recipe.levels))
        self.level: int | None = None  # of the last batch; None before the first
        self.deepspeed = is_deepspeed(accelerator)
        self.dtype = _DTYPES[training.precision]
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format

        for module in (recipe, *recipe.companions):
            module.to(accelerator.device, self.dtype)
            if not self.deepspeed:  # its flat partitions and its broadcast need row-major weights
                module.to(memory_format=self.memory_format)
        self.recipe = recipe.train()
        self.average = (
            WeightAverage(recipe, training.ema_half_life, training.ema_warmup) if training.ema_half_life else None
        )
        require_equal_weights(accelerator, recipe)
        if self.deepspeed:
            configure_deepspeed(
                accelerator,
                self.plan,
                training,
                several_phases=len(recipe.phases) > 1,
                inner_gradients=recipe.inner_gradients,
            )
        self.groups = recipe.parameter_groups()
        optimizer = build_optimizer(self.groups, recipe.config.optimizer)
        self.model = prepare(accelerator, recipe, optimizer)
        # accelerate's and DeepSpeed's wrappers keep the dicts of these groups; flags and rates are set here.
        self.base_optimizer = optimizer
        self.state = TrainingState(self.model, recipe, optimizer)

        self.bad_samples = 0
        self.means = Means(accelerator.device)
        self.stats = StatsFile(run / "stats.jsonl")
        self.store = CheckpointStore(run / "checkpoints", intervals.keep)
        self._problems = Problems(self.store, lambda: self._saved)
        self._saved_at = -1
        self._batch_start = 0
        self._signals = StopSignals(several=accelerator.num_processes > 1)
        self._agreed = [0.0] * FLAGS  # over all ranks: asked to stop, bad samples of this batch, problems
        self._doing = "before the first batch"
        self._preview: Batch | None = None
        self._preview_count = preview

    # ---------------------------------------------------------------- the loop

    def train(self) -> int:
        """Run to the end. Returns 0, or STOPPED when a signal asked to stop and the state was saved."""
        with self._signals:
            return self._train_and_say()

    def _train_and_say(self) -> int:
        try:
            return self._train()
        except UserError as error:
            self._problems.add_to(error)
            raise
        except RuntimeError as error:
            where = f"{self._doing} at {self.images_seen} images"
            goes_on = f"{self._saved}, the same command continues from there"
            place = self.accelerator.process_index, self.accelerator.num_processes
            line = why_it_ended(error, *place, where, goes_on)
            if line is None:
                raise
            raise UserError(line) from error
        finally:
            # Whatever ends the run, what it says of its newest checkpoint is then true.
            self.store.wait()

    def _train(self) -> int:
        self.resume()
        total = self.training.images
        if self.images_seen >= total:
            self.say(f"complete: {self.images_seen} of {total} images were already seen")
            return 0
        begin_trackers(self.accelerator, self.run, self.images_seen)
        batches = None
        self._clock, self._clock_images = time.perf_counter(), self.images_seen
        if self.images_seen == 0:
            self.picture()
        with self._bar(total) as bar:
            while self.images_seen < total:
                level = self.recipe.level_at(self.images_seen)
                if batches is None or level != self.level:
                    batches = self._enter(level)
                batch = next(batches).to(self.accelerator.device, self.dtype, self.memory_format)
                before = self.images_seen
                self.learn(batch)
                stop = self._agree(batch)
                bar.update(self.images_seen - before)

                done = self.images_seen >= total
                # Not at a stop: the checkpoint carries the means, and stats.jsonl is that of an unbroken run.
                if done or schedule.crosses(self.intervals.report, before, self.images_seen):
                    self.report(bar)
                if done or schedule.crosses(self.intervals.samples, before, self.images_seen):
                    self.picture()
                if done or stop or schedule.crosses(self.intervals.checkpoint, before, self.images_seen):
                    self.save(background=not (done or stop))
                if stop and not done:
                    self.say(f"stopped at {self.images_seen} of {total} images; the same command continues")
                    return STOPPED
        return 0

    def learn(self, batch: Batch, watch: Callable[[str], object] | None = None) -> None:
        """Every phase whose turn it is, the average, `images_seen`; `watch` hears the name of each phase after it."""
        self._batch_start = self.images_seen
        number = self.images_seen // batch.global_batch
        phases = [phase for phase in self.recipe.phases if number % phase.every == 0]
        for phase in phases:
            self.step(phase, batch, closing=phase is phases[-1])
            if watch is not None:
                watch(phase.name)
        self._doing = "between two batches"
        if not phases:
            _, *self._agreed = self._exchange(batch, [], closing=True).wait()
        self.means.add(self.recipe.after_batch(batch))
        self.images_seen += batch.global_batch
        if self.average:
            with self.state.whole():
                self.average.update(self.recipe, batch.global_batch, self.images_seen)

    def step(self, phase: Phase, batch: Batch, *, closing: bool) -> None:
        """All microbatches of one phase, then one optimiser step over the phase's networks.

        The `closing` phase is the last one of the batch: what the recipe has summed over it is then complete.
        """
        self._doing = f"in phase {phase.name!r}"
        names = self.recipe.active_groups(phase, self.images_seen)
        activate(self.base_optimizer, names, self.recipe.rate_at(self.images_seen))
        require_gradients(self.groups, names)
        parts = batch.split(self.plan.microbatch)
        if not self.deepspeed:
            # Not accelerate's wrapper, which looks through the installed packages in every call.
            forget_gradients(self.base_optimizer)
        losses: list[torch.Tensor] = []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self._gradients_shared(last):
                # Past autograd only where nothing waits for it: no DDP, no DeepSpeed, no sum over microbatches.
                alone = self.model is self.recipe and len(parts) == 1
                closed = self.recipe.closed_step(phase.name, part) if alone else None
                result = self.model(phase.name, part) if closed is None else closed
                losses.append(result.loss.detach())
                if last:
                    exchange = self._exchange(batch, losses, closing=closing)
                    if self.deepspeed:  # its backward pass moves the weights
                        self._refuse_bad_loss(phase, losses, exchange)
                if closed is None:
                    self._backward(result.loss, last)
            name = "loss" if len(self.recipe.phases) == 1 else f"loss_{phase.name}"
            # In images of all ranks, so that a run may go on with another number of them in mid-interval.
            weight = part.size * self.accelerator.num_processes
            self.means.add({name: result.loss, **result.metrics}, weight=weight)
        if not self.deepspeed:
            self._refuse_bad_loss(phase, losses, exchange)
            move(self.base_optimizer)

    @property
    def plan(self) -> BatchPlan:
        """How the batch that starts at `images_seen` is spread."""
        return self.plans[self.recipe.level_at(self.images_seen)]

    def _enter(self, level: int) -> Iterator[Batch]:
        """The batches of a level, from `images_seen` on, with everything ready for them."""
        resolution = self.recipe.levels[level].resolution
        if len(self.recipe.levels) > 1:
            self.say(f"level {level}: {resolution} pixels, batch: {self.plan}")
            if self.deepspeed:
                change_deepspeed_batch(self.accelerator, self.model, self.plan)
        if self.level not in (None, level):
            # As published: second moments of the smaller network say little about the larger one.
            self.base_optimizer.state.clear()
        self.level = level
        ranks = self.accelerator.num_processes
        return self.feed.batches(self.images_seen, self.plan.batch, self.accelerator.process_index, ranks, resolution)

    def _gradients_shared(self, last: bool) -> contextlib.AbstractContextManager[object]:
        # DDP would all-reduce after every microbatch; DeepSpeed is told through sync_gradients instead.
        if self.deepspeed:
            self.accelerator.sync_gradients = last
        elif not last and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.deepspeed:
            self.accelerator.backward(loss)  # scales by the accumulation itself, and steps when `last`
        else:
            parts = self.plan.accumulation
            (loss / parts if parts > 1 else loss).backward()

    # ---------------------------------------------------------------- guards

    def _exchange(self, batch: Batch, losses: list[torch.Tensor], *, closing: bool) -> Exchange:
        """The only one of a phase beside that of gradients: bad losses, the flags of `_agreed`, the recipe's sums."""
        flags = [float(self._signals.asked), float(len(batch.bad)), float(self._problems.there_are(batch.problem))]
        sums = self.recipe.sums() if closing else []
        ranks, device = self.accelerator.num_processes, self.accelerator.device
        return Exchange(losses, self.recipe.loss_limit, flags, sums, ranks=ranks, device=device)

    def _refuse_bad_loss(self, phase: Phase, losses: list[torch.Tensor], exchange: Exchange) -> None:
        """Raise on every rank, before any weight can change, when the loss of one rank is unusable."""
        bad, *self._agreed = exchange.wait()
        if bad == 0:
            return
        self.recipe.discard()
        if not self.deepspeed:
            forget_gradients(self.base_optimizer)
        limit = self.recipe.loss_limit
        values = [float(loss) for loss in losses]
        mine = next((value for value in values if unusable(value, limit)), values[-1])
        why = "not finite" if limit is None else f"not finite or beyond recipe.loss_limit {limit:g}"
        raise UserError(
            f"the loss of phase {phase.name!r} is {why} at {self.images_seen} images "
            f"(this rank: {mine:g}); the weights were not changed by it and {self._saved}. "
            f"The same command with a lower recipe.optimizer.learning_rate "
            f"{'goes on from there' if self._saved_at > 0 else 'begins again'}{self.recipe.divergence_hint}"
        )

    def _agree(self, batch: Batch) -> bool:
        """Count bad samples over all ranks and decide together whether to stop."""
        stop, bad, problems = self._agreed
        if problems:
            self._problems.end()
        self.bad_samples += int(bad)
        for key, reason in batch.bad:
            print(f"unreadable sample replaced: {key}: {reason}", file=sys.stderr, flush=True)
        # The floor keeps one bad sample in the first batch from ending a run.
        allowed = self.max_bad_fraction * max(self.images_seen, 1000)
        if self.bad_samples > allowed:
            self.save()
            raise UserError(
                f"{self.bad_samples} of {self.images_seen} samples could not be read, data.max_bad_fraction allows "
                f"{self.max_bad_fraction:g}: check the shards with shards/check.py (the run is saved)"
            )
        return stop > 0

    # ---------------------------------------------------------------- what a person sees

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        """One line, from the main process, above the bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _bar(self, total: int) -> tqdm[NoReturn]:
        show = self.is_main and sys.stderr.isatty()
        return tqdm(total=total, initial=self.images_seen, unit="img", disable=not show, dynamic_ncols=True)

    def report(self, bar: tqdm[NoReturn]) -> None:
        """One line in stats.jsonl and in the log, with means over the interval and over the ranks."""
        self.means.synchronise()
        means = self.means.means()
        self.means.clear()
        now = time.perf_counter()
        status = self.recipe.status(self._batch_start)
        speed = (self.images_seen - self._clock_images) / max(now - self._clock, 1e-9)
        self._clock, self._clock_images = now, self.images_seen
        if not self.is_main:
            return
        record = {
            "images_seen": self.images_seen,
            **means,
            **status,
            "learning_rate": self.recipe.rate_at(self._batch_start),
            "bad_samples": self.bad_samples,
            "images_per_second": round(speed, 2),
        }
        with self._problems.writing(self.stats.path):
            self.stats.append(record)
        self.accelerator.log(record, step=self.images_seen)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in {**means, **status}.items())
        if bar.disable:
            self.say(f"{self.images_seen:>9}/{self.training.images} images  {shown}  {speed:.0f} img/s")
        else:
            bar.set_postfix_str(shown)

    def picture(self) -> None:
        """samples/images-*.png, from the averaged weights when there are any."""
        with self.whole_trained() as recipe:
            if not self.is_main:
                return
            if self._preview is None:
                batch = self.feed.preview(self._preview_count)
                self._preview = batch.to(self.accelerator.device, self.dtype, self.memory_format)
            recipe.eval()
            with torch.no_grad():
                rows = recipe.samples(replace(self._preview, images_seen=self.images_seen))
            recipe.train()
        path = self.run / "samples" / f"images-{self.images_seen:012d}.png"
        with self._problems.writing(path):
            save_picture(grid(rows), path)

    # ---------------------------------------------------------------- saving and resuming

    @property
    def trained(self) -> Recipe:
        """The recipe whose weights are the run's result: the average if there is one."""
        return self.average.module if self.average else self.recipe

    @contextlib.contextmanager
    def whole_trained(self) -> Iterator[Recipe]:
        """`trained`, with every weight in full while it lasts; every rank enters."""
        with contextlib.nullcontext() if self.average else self.state.whole():
            yield self.trained

    def save(self, *, background: bool = False) -> None:
        """A checkpoint; every rank calls this. In the background, training goes on once the state is copied."""
        if self._saved_at == self.images_seen:
            return
        self.means.synchronise()
        state = {"means": self.means.state(), "bad_samples": self.bad_samples, "level": self.level}
        state["origin"] = self.origin
        with self.state.whole():
            tensors = {"model": self.recipe.state_dict(), "optimizer": self.state.optimizer_tensors(keep=self.is_main)}
            if self.average:
                tensors["average"] = self.average.module.state_dict()

            def write() -> None:
                self.store.save(self.images_seen, tensors, state, background=background)
                if self._problems.first:
                    raise self._problems.first

            # What goes wrong here ends all ranks at once: nobody else would tell those that do not write.
            main_decides(self.accelerator, write)
        self._saved_at = self.images_seen

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one. The main process decides which; all load it."""

        def newest() -> str | None:
            checkpoint = self.store.latest(self.say)
            return None if checkpoint is None else str(checkpoint.folder)

        folder = main_decides(self.accelerator, newest)
        if folder is None:
            if self.is_main:
                self.stats.rewind(0)
            return
        checkpoint = open_checkpoint(Path(folder))
        self._load(checkpoint)
        self.images_seen = self._saved_at = checkpoint.images_seen
        self.bad_samples = checkpoint.state["bad_samples"]
        self.level = checkpoint.state.get("level")
        self.origin = checkpoint.state.get("origin", {})
        self.means.load(checkpoint.state["means"])
        if self.is_main:
            self.stats.rewind(self.images_seen)
        self.say(f"resumed at {self.images_seen} of {self.training.images} images from {checkpoint.folder}")

    @property
    def _saved(self) -> str:
        return f"the newest checkpoint is at {self._saved_at} images" if self._saved_at > 0 else "none is saved yet"

    def _load(self, checkpoint: Checkpoint) -> None:
        where = str(checkpoint.folder)
        self.state.load_weights(checkpoint.tensors("model"), where)
        if self.average:
            load_exactly(self.average.module, checkpoint.tensors("average"), where)
        self.state.load_optimizer(checkpoint.tensors("optimizer"), where)
