"""One optimiser for all networks, in which only the groups of the current phase move."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn

from letit_dist.errors import UserError
from letit_dist.recipes.base import OptimizerConfig, ParameterGroup


class _ActiveGroups(torch.optim.Optimizer):
    """Mixin: `step` visits only the groups whose `active` flag is set.

    Sharded optimisers replace the parameters of a group by flat partitions but keep the group's dict, so the
    flag survives where a list of parameters would not; and second moments outside the phase do not decay.
    """

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group.get("active", True)]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class Adam(_ActiveGroups, torch.optim.Adam):
    """torch's Adam over the active groups."""


class SGD(_ActiveGroups, torch.optim.SGD):
    """torch's SGD over the active groups."""


def build_optimizer(groups: Iterable[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """One optimiser over all groups of a recipe; `activate` sets their learning rates."""
    groups = list(groups)
    tables = [
        {"params": list(group.parameters), "name": group.name, "rate": group.rate, "active": True} for group in groups
    ]
    rate = config.rate_at(0)
    if config.kind == "sgd":
        return SGD(tables, lr=rate)
    # One pass over memory on a CPU. On a GPU, where it gains little, it would keep the counts of steps there.
    fused = all(parameter.device.type == "cpu" for group in groups for parameter in group.parameters)
    kernel = {"fused": True} if fused else {"foreach": True}
    return Adam(tables, lr=rate, betas=config.betas, eps=config.eps, **kernel)


def forget_gradients(optimizer: torch.optim.Optimizer) -> None:
    """`zero_grad`, past what torch wraps around it in every call."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@torch.no_grad()
def move(optimizer: torch.optim.Optimizer) -> None:
    """`step`: where Adam's one kernel does all the active groups, without what torch does around it in every step.

    Beside a small network that takes ten times as long as the kernel.
    """
    groups = [group for group in optimizer.param_groups if group["active"]]
    moving = [_fused_slots(optimizer, group) for group in groups]
    if not all(moving):
        optimizer.step()
        return
    for group, (parameters, gradients, first, second, steps) in zip(groups, moving, strict=True):
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            parameters,
            gradients,
            first,
            second,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _fused_slots(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[list[Tensor]]:
    """Parameters, gradients, both moments, counts of steps, as they are between two steps; else nothing."""
    if not (isinstance(optimizer, Adam) and group["fused"]):
        return []
    rows = []
    for parameter in group["params"]:
        slots = optimizer.state.get(parameter)
        if parameter.grad is None or not slots:
            return []
        rows.append((parameter, parameter.grad, slots["exp_avg"], slots["exp_avg_sq"], slots["step"]))
    return [list(column) for column in zip(*rows, strict=True)]


def activate(optimizer: torch.optim.Optimizer, names: Set[str], rate: float) -> None:
    """Let exactly the groups of these names move, at `rate` times their own."""
    for group in optimizer.param_groups:
        group["active"] = group["name"] in names
        group["lr"] = rate * group["rate"]


def require_gradients(groups: Iterable[ParameterGroup], names: Set[str]) -> None:
    """Ask autograd for the gradients of these groups alone: the others would be computed for nothing."""
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(group.name in names)


def state_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `slot/parameter name` -> tensor."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{slot}/{names[parameter]}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor], where: str
) -> None:
    """The inverse of `state_tensors`; an unknown parameter is a UserError."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        if name not in parameters:
            raise UserError(f"{where}: optimiser state for {name!r}, which this recipe does not have")
        parameter = parameters[name]
        if slot != "step":  # torch keeps the count of steps on the CPU
            if value.shape != parameter.shape:
                raise UserError(f"{where}: {key} is {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
            # In the parameter's memory format, so that a resumed run also runs at the same speed.
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][slot] = value
