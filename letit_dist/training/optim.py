"""One optimiser for all networks, in which only the groups of the current phase move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from letit_dist.errors import UserError
from letit_dist.recipes.base import OptimizerConfig, Phase


class _ActiveGroups:
    """Mixin: `step` visits only the groups whose `active` flag is set.

    Sharded optimisers replace the parameters of a group by flat partitions but keep the group's dict, so the
    flag survives where a list of parameters would not; and second moments outside the phase do not decay.
    """

    def step(self, closure=None):
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


def build_optimizer(recipe: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """One group for each child network of the recipe, named after it."""
    groups = [
        {"params": [p for p in child.parameters() if p.requires_grad], "name": name, "active": True}
        for name, child in recipe.named_children()
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "sgd":
        return SGD(groups, lr=config.learning_rate)
    return Adam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, foreach=True)


def activate(optimizer: torch.optim.Optimizer, phase: Phase, rate: float) -> None:
    """Let exactly the networks of `phase` move, at `rate`."""
    for group in optimizer.param_groups:
        group["active"] = group["name"] in phase.modules
        group["lr"] = rate


def state_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `slot/parameter name` -> tensor."""
    names = {parameter: name for name, parameter in module.named_parameters()}
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
