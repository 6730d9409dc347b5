"""The accelerator, made so that it is what the launch file asked for, or refused.

On machines without a GPU, accelerate and DeepSpeed each need to be told: left alone, accelerate believes in
one process while there are two, or turns DeepSpeed into plain data parallelism without a word.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from letit_dist import rng
from letit_dist.errors import UserError
from letit_dist.ranks import launched_ranks
from letit_dist.schemas import TrainingConfig
from letit_dist.training.plan import BatchPlan

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

T = TypeVar("T")


def _on_cpu() -> bool:
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return asked or not torch.cuda.is_available()


def _prepare_deepspeed_on_cpu() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    # With this set, accelerate drops DeepSpeed in silence and trains with plain DDP.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    import deepspeed.ops

    # A shared-memory collective that would be compiled for minutes at the first start; gloo gives the same bits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def create_accelerator(
    *, several_phases: bool, timeout: float = 600.0, trackers: Sequence[str] = (), run: Path | None = None
) -> Accelerator:
    """An `Accelerator` whose world and distribution are those of the launch; raises UserError otherwise.

    `timeout` is how many seconds a rank waits for the others before a collective is given up; `trackers` are begun by
    `begin_trackers`, and those that write files do so in `run`.

    Mixed precision is never delegated: under DDP it would mean autocast and under DeepSpeed cast parameters.
    """
    require_trackers(trackers)
    wants_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    on_cpu = _on_cpu()
    # Buffers (codebooks, running means) are equal by construction; a broadcast a step would hide it if not.
    ddp: dict[str, Any] = {"find_unused_parameters": several_phases, "broadcast_buffers": False}
    if on_cpu:
        # DDP's own first bucket of 1 MiB overlaps with the backward pass; with gloo, which computes on the rank's own
        # cores, it only adds a collective. (accelerate does not hand on its default of 25.)
        ddp["bucket_cap_mb"] = 26
    handlers: list[Any] = [DistributedDataParallelKwargs(**ddp)]
    if launched_ranks() > 1:
        backend = {"backend": "gloo"} if on_cpu else {}
        # accelerate hands on only what is not its own default of 600 s; torch's is another, half an hour with gloo.
        asked = timedelta(seconds=timeout, microseconds=1)
        handlers.append(InitProcessGroupKwargs(timeout=asked, **backend))
    if wants_deepspeed and on_cpu:
        try:
            _prepare_deepspeed_on_cpu()
        except ImportError:
            raise UserError("the launch file asks for DeepSpeed: pip install 'letit_dist[deepspeed]'") from None
    accelerator = Accelerator(
        cpu=on_cpu and not wants_deepspeed,
        mixed_precision="no",
        kwargs_handlers=handlers,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(str(run), logging_dir=str(run / "tensorboard")) if run else None,
    )
    ranks = launched_ranks()
    if accelerator.num_processes != ranks or (
        torch.distributed.is_initialized() and torch.distributed.get_world_size() != ranks
    ):
        raise UserError(
            f"launched {ranks} processes, but accelerate sees {accelerator.num_processes}: "
            "start it with one of launch/accelerate/*.yaml"
        )
    if wants_deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise UserError(f"the launch file asks for DeepSpeed, but accelerate started {accelerator.distributed_type}")
    return accelerator


def join_ranks(timeout: float = 7 * 86_400.0) -> tuple[int, int, torch.device, Callable[[object], list[Any]]]:
    """(rank, world, device, gather) of this launch, for work that needs no training; `gather(mine)` gives what every
    rank gave, in their order, to all.

    Such ranks meet once, when their shares are done: one with a slower card or more left to do is late by hours, and
    its launcher notices one that has died. So `timeout` (seconds) is a week.
    """
    accelerator = create_accelerator(several_phases=False, timeout=timeout)
    place = accelerator.process_index, accelerator.num_processes, accelerator.device
    return *place, lambda mine: gather_object([mine])


def _installed(tracker: str) -> bool:
    names = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
    return any(importlib.util.find_spec(name) for name in names)


def require_trackers(trackers: Sequence[str]) -> None:
    """UserError for those that are not installed: accelerate would leave them out in silence."""
    missing = [name for name in trackers if not _installed(name)]
    if missing:
        raise UserError(f"training.trackers: {', '.join(missing)} not installed: pip install {' '.join(missing)}")


def begin_trackers(accelerator: Accelerator, run: Path, images_seen: int) -> None:
    """Open the trackers that the accelerator was made with, for a run that is at `images_seen`.

    Without trackers this does nothing. TensorBoard's files go to run/tensorboard, and hide what an interrupted run
    wrote past its checkpoint; on Weights & Biases a resumed run continues the one of its folder.
    """
    name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    options: dict[str, dict[str, Any]] = {
        "wandb": {"name": run.resolve().name, "id": name, "resume": "allow", "dir": str(run)}
    }
    if images_seen:
        options["tensorboard"] = {"purge_step": images_seen + 1}
    accelerator.init_trackers("letit_dist", init_kwargs=options)


def seed_weights(seed: int) -> None:
    """Make the weights that are built next a function of the run's seed, equal on every rank."""
    torch.manual_seed(rng.seed_for(seed, "weights", 0))


def main_decides(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run `function` on the main process and give its result to all; what it raises there ends every rank."""
    outcome: list[Any] = [None, True]
    caught: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1], caught = False, error
    broadcast_object_list(outcome)
    if caught is not None:
        raise caught
    if not outcome[1]:
        raise SystemExit(2)  # the main process says why
    return outcome[0]


def require_equal_weights(accelerator: Accelerator, module: nn.Module) -> None:
    """All ranks build the same weights from the same seed; anything else is a bug worth stopping for."""
    if accelerator.num_processes == 1:
        return
    total = sum((tensor.detach().double().abs().sum() for tensor in module.state_dict().values()), torch.zeros(()))
    every = [torch.zeros_like(total) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(every, total)
    if any(other.item() != every[0].item() for other in every):
        raise UserError("the ranks start from different weights: are all nodes on the same version and config?")


def prepare(accelerator: Accelerator, recipe: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """What training calls in place of `recipe`: itself, or wrapped so that ranks share their gradients."""
    model, _ = accelerator.prepare(recipe, optimizer)
    if isinstance(model, DistributedDataParallel) and model.find_unused_parameters:
        exchange_used_gradients(model)
    return model


def exchange_used_gradients(model: DistributedDataParallel) -> None:
    """Spare the exchange of gradients that nobody asked for.

    A phase asks for none of networks outside it; DDP alone would send their zeros to and fro.
    """

    def mean(bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if any(parameter.requires_grad for parameter in bucket.parameters()):
            return allreduce_hook(model.process_group, bucket)
        zeros: torch.futures.Future[Tensor] = torch.futures.Future()
        zeros.set_result(bucket.buffer())
        return zeros

    # A lambda: DDP compares annotations, and they are strings here.
    model.register_comm_hook(None, lambda _, bucket: mean(bucket))


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether a DeepSpeed engine wraps the model."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def read_deepspeed(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON, or a UserError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}: expected a DeepSpeed JSON, as in launch/deepspeed/"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def require_usable_deepspeed(
    config: Mapping[str, Any], training: TrainingConfig, *, several_phases: bool, inner_gradients: bool
) -> None:
    """Refuse what in a DeepSpeed JSON would change a run's result in silence."""
    if "gradient_clipping" not in config:
        raise UserError("the DeepSpeed JSON has no gradient_clipping: write 0.0, without it DeepSpeed clips at 1.0")
    low = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
    if low:
        raise UserError(
            f"the DeepSpeed JSON enables {low[0]}, which casts the parameters: use training.precision=bf16 (autocast)"
        )
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    stale = "which repeats old gradients for networks that a phase leaves out"
    if zero.get("stage", 0) == 3 and (several_phases or inner_gradients):
        why = stale if several_phases else "which has no parameters at hand where a step itself takes gradients"
        raise UserError(f"the DeepSpeed JSON asks for ZeRO stage 3, {why}: use stage 0, 1 or 2 for this recipe")
    if several_phases and offload != "none":
        raise UserError(
            f"the DeepSpeed JSON offloads the optimiser (device {offload}), {stale}: "
            "remove zero_optimization.offload_optimizer for a recipe of several phases"
        )
    if offload not in ("none", "cpu"):
        raise UserError(
            f"the DeepSpeed JSON offloads the optimiser to {offload}: to cpu, or not at all (it fits into host memory)"
        )
    if zero.get("offload_param", {}).get("device", "none") != "none":
        raise UserError("the DeepSpeed JSON offloads parameters: the networks are small, remove offload_param")
    if training.precision == "fp64":
        raise UserError("training.precision: fp64 is for equality checks under DDP, DeepSpeed does not offer it")


def configure_deepspeed(
    accelerator: Accelerator, plan: BatchPlan, training: TrainingConfig, *, several_phases: bool, inner_gradients: bool
) -> None:
    """Fill in what only the run knows; refuses what `require_usable_deepspeed` does."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    require_usable_deepspeed(config, training, several_phases=several_phases, inner_gradients=inner_gradients)
    # Without it accelerate replaces the optimiser by DeepSpeed's own, with other betas and eps.
    config["zero_force_ds_cpu_optimizer"] = False
    config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"] = plan.microbatch
    config["gradient_accumulation_steps"] = plan.accumulation
    accelerator.gradient_accumulation_steps = plan.accumulation


def change_deepspeed_batch(accelerator: Accelerator, engine: Any, plan: BatchPlan) -> None:
    """Tell a running engine of another batch: it divides the loss by the accumulation it knows of."""
    engine.set_train_micro_batch_size(plan.microbatch)
    engine.set_train_batch_size(plan.batch)
    accelerator.gradient_accumulation_steps = plan.accumulation
