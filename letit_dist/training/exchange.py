"""What ranks tell each other beside gradients: one sum for a phase, on its way while the backward pass computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def unusable(loss: float, limit: float | None) -> bool:
    """Whether a loss is not finite or beyond `limit`."""
    return not math.isfinite(loss) or (limit is not None and abs(loss) > limit)


FLAGS = 3  # of a phase: asked to stop, bad samples, problems


def exchanged_bytes(sums: Sequence[Tensor]) -> int:
    """What one exchange of a phase with these sums takes to and fro."""
    return 8 * (1 + FLAGS + sum(part.numel() for part in sums))


class Exchange:
    """Sums over the ranks, begun at once and read by `wait`. Collective: every rank makes them in the same order.

    A collective costs a step about as much for one number as for a whole codebook, and all of that where nothing is
    computed meanwhile. So everything goes in one, as float64. Losses are not read before `wait`: that waits for a GPU.
    """

    def __init__(
        self,
        losses: Sequence[Tensor],
        limit: float | None,
        flags: Sequence[float],
        sums: Sequence[Tensor],
        *,
        ranks: int,
        device: torch.device,
    ):
        """`losses` are scalars; `sums` of any shapes, which are those of all ranks after `wait`."""
        self._losses, self._limit, self._flags = losses, limit, flags
        self._sums = sums
        self._work: torch.distributed.Work | None = None
        if ranks > 1:
            bad = torch.zeros(1, dtype=torch.float64, device=device)
            if losses:
                values = torch.stack(list(losses)).double()
                bad += (~values.isfinite() | (values.abs() > (math.inf if limit is None else limit))).sum()
            numbers = torch.tensor(flags, dtype=torch.float64).to(device, non_blocking=True)
            parts = [part.detach().reshape(-1).double() for part in sums]
            self._packed = torch.cat([bad, numbers, *parts])
            self._work = torch.distributed.all_reduce(self._packed, async_op=True)

    def wait(self) -> list[float]:
        """[how many losses are `unusable`, *flags], of all ranks. A RuntimeError if a rank is lost."""
        if self._work is None:
            return [float(sum(unusable(float(loss), self._limit) for loss in self._losses)), *self._flags]
        self._work.wait()
        sizes = [part.numel() for part in self._sums]
        numbers, *sums = self._packed.split([1 + len(self._flags), *sizes])
        for mine, whole in zip(self._sums, sums, strict=True):
            mine.copy_(whole.view_as(mine))
        return numbers.tolist()
