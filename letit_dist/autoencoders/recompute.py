"""Layers whose results are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

R = TypeVar("R")


def recomputed(layer: Callable[..., R], *inputs: object, when: bool) -> R:
    """`layer(*inputs)`; `when`, with none of what the backward pass needs kept but `inputs`.

    The layer must draw no random numbers of its own: they would be others the second time.
    """
    if not (when and torch.is_grad_enabled()):
        return layer(*inputs)
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
