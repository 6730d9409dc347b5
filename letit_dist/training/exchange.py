"""What ranks tell each other beside gradients: one sum for a phase, on its way while the backward pass computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def unusable(losses: Sequence[Tensor], limit: float | None) -> Tensor:
    """(N,) bool, which of N scalars are not finite or beyond `limit`; not read here: that waits for a GPU."""
    values = torch.stack(list(losses))
    return ~values.isfinite() | (values.abs() > (math.inf if limit is None else limit))


class Exchange:
    """Sums over the ranks, begun at once and read by `wait`. Collective: every rank makes them in the same order.

    A collective costs a step about as much for one number as for a whole codebook, and all of that where nothing is
    computed meanwhile. So everything goes in one, as float64.
    """

    def __init__(self, numbers: Tensor, sums: Sequence[Tensor], ranks: int):
        """`numbers` (N,); `sums` of any shapes, which are those of all ranks after `wait`."""
        self._numbers = numbers
        self._sums = sums
        self._work: torch.distributed.Work | None = None
        if ranks > 1:
            self._packed = torch.cat([part.detach().reshape(-1).double() for part in (numbers, *sums)])
            self._work = torch.distributed.all_reduce(self._packed, async_op=True)

    def wait(self) -> list[float]:
        """The numbers of all ranks. A RuntimeError if a rank is lost."""
        if self._work is None:
            return self._numbers.tolist()
        self._work.wait()
        sizes = [part.numel() for part in (self._numbers, *self._sums)]
        numbers, *sums = self._packed.split(sizes)
        for mine, whole in zip(self._sums, sums, strict=True):
            mine.copy_(whole.view_as(mine))
        return numbers.tolist()
