"""Langevin dynamics on a frozen energy (eq. 6): the only sampler of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from letit_dist.config import StrictConfig

Noise = Callable[[int], Tensor]  # step -> N(0, 1) draws (B, *L)


class LangevinConfig(StrictConfig):
    """One chain. The noise is off by default although eq. (6) has it at scale 1: the published code samples
    without it, and unit noise on 512-dimensional latents made training diverge.
    """

    steps: int = Field(ge=0, description="T of eq. (6); 20 for ALAE")
    step_size: float = Field(
        gt=0,
        description="eta of eq. (6), whose move is half of it: the published code's 1.0 is 2.0 here",
    )
    noise_scale: float = Field(0.0, ge=0, description="times sqrt(step_size) on N(0, 1); eq. (6) has 1")


@dataclass(frozen=True)
class LangevinResult:
    """A finished chain, detached. `path` and `energies` are there if they were asked for; `shift` is, unless
    `keep_shift` was off."""

    latents: Tensor  # (B, *L), z(T)
    shift: Tensor | None  # (B, *L), sum over t of |dE/du|, u = z / unit: the code shift of section 4.2
    steps: Tensor  # (B,), how many steps each chain took
    path: Tensor | None = None  # (T+1, B, *L), from the start to z(T)
    energies: Tensor | None = None  # (T+1, B), E along the path


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; the flags are as before afterwards, whatever happens."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class LangevinSampler:
    """Moves latents down an energy, each sample on its own: no statistic is taken over the batch."""

    def __init__(self, config: LangevinConfig):
        self.config = config

    def sample(
        self,
        energy: nn.Module,
        start: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: Noise | None = None,
        keep_path: bool = False,
        watch: Callable[[Tensor], object] | None = None,
        condition: Tensor | None = None,
        until: Callable[[Tensor], Tensor] | None = None,
        keep_shift: bool = True,
    ) -> LangevinResult:
        """Run `config.steps` steps of eq. (6) from `start` (B, *L).

        `energy` maps (B, *L) to (B,). Its parameters get no gradient and keep their flags; the result carries
        no graph; the caller may be under no_grad or inference_mode. With 0 steps the result is the start.
        With noise_scale > 0 give either a `generator` or `noise(step)`, which returns N(0, 1) draws (B, *L)
        (of each sample's own index, say, so that the result does not depend on the batch); ValueError
        otherwise. With noise_scale 0 neither is touched. `watch` is called with every point of the path (B, *L),
        the start included, as the chain reaches it; it must not change it. `condition` (B,) goes to energies that
        have conditions. `until` (B, *L) -> (B,) bool is asked at every point, the start included: a chain for which
        it is true stays there. Without `keep_shift` the same chain, up to rounding, in fewer operations.
        """
        config = self.config
        if config.noise_scale > 0 and (generator is None) == (noise is None):
            raise ValueError("noise_scale > 0 needs exactly one of `generator` and `noise`")
        # The path stays in the latents' own precision under autocast: only the energy's layers are lowered.
        given = () if condition is None else (condition,)
        # Eq. (6) in units of the energy: for u = z / unit, du = -eta/2 dE/du is dz = -eta/2 unit^2 dE/dz.
        unit = getattr(energy, "unit", 1.0)
        length = config.step_size / 2 * unit**2
        descent = None if keep_shift or until is not None else getattr(energy, "descent", None)
        with torch.inference_mode(False):
            descend = None if descent is None else descent(*given)
            if descend and not keep_path and watch is None and config.noise_scale == 0:
                end = descend(start.detach(), length, config.steps)  # eq. (6), all steps
                return LangevinResult(end, None, torch.full((len(end),), config.steps, device=end.device))
        with torch.inference_mode(False), torch.enable_grad(), frozen(energy):
            z = start.detach().clone()
            slope = None if descend else _slope(energy, *given)
            shift = torch.zeros_like(z) if keep_shift else None
            steps = torch.full((len(z),), config.steps, device=z.device)
            path = [z]
            if watch is not None:
                watch(z)
            for step in range(config.steps):
                before = z
                if descend:
                    z = descend(z, length, 1)  # eq. (6)
                else:
                    assert slope is not None
                    gradient = slope(z)
                    z = torch.sub(z, gradient, alpha=length)  # eq. (6)
                if config.noise_scale > 0:
                    eps = noise(step) if noise is not None else _normal(z, generator)
                    assert eps.shape == z.shape, f"noise of shape {tuple(eps.shape)} for latents {tuple(z.shape)}"
                    z = z + config.noise_scale * config.step_size**0.5 * unit * eps.to(z)  # eq. (6)
                stays = None
                if until is not None:
                    steps = torch.where(until(before), steps.clamp_max(step), steps)
                    stays = (steps <= step).view(-1, *[1] * (z.ndim - 1))
                    z = torch.where(stays, before, z)
                if shift is not None:
                    moved = gradient.abs()
                    shift.add_(moved if stays is None else moved.masked_fill(stays, 0), alpha=unit)  # section 4.2
                if watch is not None:
                    watch(z)
                if keep_path:
                    path.append(z)
            if not keep_path:
                return LangevinResult(z, shift, steps)
            with torch.no_grad():
                energy_of = getattr(energy, "folded", lambda: energy)()
                energies = torch.stack([energy_of(point, *given) for point in path])
            return LangevinResult(z, shift, steps, torch.stack(path), energies)


def _slope(energy: nn.Module, *condition: Tensor) -> Callable[[Tensor], Tensor]:
    """Latents (B, *L) to dE/dz (B, *L), without a graph: in closed form where the energy has one."""
    if (slope := getattr(energy, "slope", None)) is not None:
        return slope(*condition)
    energy_of = getattr(energy, "folded", lambda: energy)()

    def by_autograd(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        value = energy_of(z, *condition)  # (B,)
        assert value.shape == z.shape[:1], f"energies of shape {tuple(value.shape)} for {len(z)} samples"
        return torch.autograd.grad(value.sum(), z)[0]

    return by_autograd


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    assert generator is not None
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
