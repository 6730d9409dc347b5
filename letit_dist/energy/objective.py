"""What the energy learns from (eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from letit_dist.energy.mlp import MLPEnergy


def contrastive_loss(
    energy: nn.Module, target: Tensor, translated: Tensor, *, l2: float = 0.0, condition: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss whose gradient is eq. (2), and detached scalars to report.

    target: latents (B, *L) of the target domain; translated: latents (B', *L) at the end of the chains from
    the source, through which no gradient flows. `l2` weighs mean E(target)^2 + mean E(translated)^2, which
    holds the energies near 0 (an option of the published code, not in the paper). The gap reported,
    translated - target, is about 0 once the chains reach the target domain. `condition` (B,) belongs to the rows of
    both, for energies that have conditions.
    """
    if l2 == 0 and isinstance(energy, MLPEnergy):
        found = energy.contrast(target, translated.detach())  # eq. (2)
        if found is not None:
            loss, means = found
            return loss, {"energy_target": means[0], "energy_translated": means[1], "energy_gap": -loss.detach()}
    both = () if condition is None else (torch.cat([condition, condition]),)
    values = energy(torch.cat([target, translated.detach()]), *both)  # (B + B',)
    # Under bf16 autocast an energy of 100 is known to +-0.5 only: do not lose more in the means.
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    on_target, on_translated = values[: len(target)], values[len(target) :]
    of_target, of_translated = on_target.mean(), on_translated.mean()
    loss = of_target - of_translated  # eq. (2)
    metrics = {
        "energy_target": of_target.detach(),
        "energy_translated": of_translated.detach(),
        "energy_gap": -loss.detach(),
    }
    if l2 > 0:
        penalty = on_target.square().mean() + on_translated.square().mean()
        loss = loss + l2 * penalty
        metrics["energy_l2"] = penalty.detach()
    return loss, metrics
