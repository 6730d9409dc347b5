"""The weights and the optimiser's state of a run as plain tensors by name, whatever shards them while it trains.

A checkpoint therefore knows nothing of ranks or of DeepSpeed: what eight ranks saved under ZeRO-3 is continued by one
process without DeepSpeed, and the other way round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from letit_dist.pretrained import load_exactly
from letit_dist.training.optim import load_state_tensors, state_tensors


class TrainingState:
    """What the optimiser moves and what it remembers. Every rank calls every method, in the same order."""

    def __init__(self, model: nn.Module, recipe: nn.Module, optimizer: torch.optim.Optimizer):
        """`model` is what `accelerator.prepare` made of `recipe`, `optimizer` what it was given."""
        self.recipe = recipe
        self.optimizer = optimizer
        engine: Any = model  # perhaps DeepSpeed's, which has no types; nor has its optimiser
        stage = engine.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else 0
        self.zero: Any = engine.optimizer if stage > 0 else None
        self.partitioned = stage == 3

    @contextlib.contextmanager
    def whole(self, *, changed: bool = False) -> Iterator[None]:
        """Every parameter in full while it lasts; with `changed`, what the main process writes then is kept."""
        if not self.partitioned:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self.recipe.parameters()), modifier_rank=0 if changed else None):
            yield

    def optimizer_tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """`slot/parameter name` -> tensor; under ZeRO gathered over the ranks, and on the host of those that `keep`."""
        if self.zero is None:
            return state_tensors(self.optimizer, self.recipe)
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_optimizer_state

        names = {parameter: name for name, parameter in self.recipe.named_parameters()}
        found = {}
        for parameters, flat in self._groups():
            slots = self.zero.optimizer.state.get(flat, {})
            if not self.partitioned and slots:
                # DeepSpeed links a parameter to its slots once, at the first step; ours come and go with the levels.
                lazy_init_hp_params_optimizer_state(parameters, flat, self.zero.optimizer.state)
            for slot, value in sorted(slots.items()):
                for parameter in parameters:
                    full = value if slot == "step" else safe_get_full_optimizer_state(parameter, slot)
                    if keep:
                        found[f"{slot}/{names[parameter]}"] = full.cpu().clone()
        return found

    def held(self) -> dict[str, list[Tensor]]:
        """What this rank keeps between two steps: its share of the weights (buffers are whole), of what the optimiser
        remembers, and of the copies that a sharding optimiser moves in their place."""
        keeper = self if self.zero is None else self.zero
        parameters: Iterator[Any] = self.recipe.parameters()
        shares = [parameter.ds_tensor if self.partitioned else parameter for parameter in parameters]
        slots = keeper.optimizer.state.values()
        return {
            "weights": [*shares, *self.recipe.buffers()],
            "moments": [value for slot in slots for name, value in slot.items() if name != "step"],
            "copies": [] if self.zero is None else [flat for _, flat in self._groups()],
        }

    def load_weights(self, tensors: dict[str, Tensor], where: str) -> None:
        """Into the recipe, and into the copy that a sharding optimiser keeps."""
        with self.whole(changed=True):
            load_exactly(self.recipe, tensors, where)
        if self.zero is not None:
            self.zero.refresh_fp32_params()

    def load_optimizer(self, tensors: dict[str, Tensor], where: str) -> None:
        """The inverse of `optimizer_tensors`."""
        if self.zero is None:
            load_state_tensors(self.optimizer, self.recipe, tensors, where)
            return
        names = {parameter: name for name, parameter in self.recipe.named_parameters()}
        state = self.zero.optimizer.state
        state.clear()
        slots = sorted({key.partition("/")[0] for key in tensors})
        for parameters, flat in self._groups():
            # A group that never moved has no state; one that did has the same slots for each of its parameters.
            for slot in slots:
                first = tensors.get(f"{slot}/{names[parameters[0]]}")
                if first is None:
                    continue
                if slot == "step":
                    state[flat][slot] = first.clone()
                    continue
                state[flat][slot] = torch.zeros_like(flat)
                for parameter in parameters:
                    self._put(parameter, flat, state[flat][slot], tensors[f"{slot}/{names[parameter]}"])

    def _groups(self) -> Iterator[tuple[list[nn.Parameter], Tensor]]:
        """(parameters, this rank's flat share of their fp32 copies) of each shard of the optimiser."""
        if self.partitioned:
            return zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True)
        return zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True)

    def _put(self, parameter: Any, flat: Tensor, buffer: Tensor, value: Tensor) -> None:
        """Write this rank's share of `value` into its place in `buffer`, which is laid out like `flat`; `parameter` is
        one with DeepSpeed's attributes."""
        value = value.flatten().to(buffer)
        if self.partitioned:
            _, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            share = value[torch.distributed.get_rank() * parameter.ds_tensor.ds_numel :][:length]
            buffer[start : start + len(share)] = share  # the last rank's share may end in padding
        elif (place := parameter._hp_mapping) is not None:  # None: none of it lives on this rank
            here, there = place.hp_fragment_address, place.lp_fragment_address
            buffer[here.start :][: here.numel] = value[there.start :][: there.numel]
