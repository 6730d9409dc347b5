"""The light Schroedinger bridge (LightSB, 2310.01174): entropic transport between latents as a mixture of Gaussians.

With potentials v(y) = sum_k a_k N(y | r_k, eps S_k), S_k diagonal, the plan is known in closed form (prop. 3.2):
y | x = sum_k w_k(x) N(y | r_k + S_k x, eps S_k), w_k(x) in proportion to a_k exp((x'S_k x + 2 r_k'x) / (2 eps)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from letit_dist import rng
from letit_dist.errors import UserError

LIMIT = 1 << 15  # dimensions: a diagonal mixture says little about larger maps, and takes long to fit


class LightBridge:
    """Fitted parameters, in units of the latents' spread and about the source's mean."""

    def __init__(self, log_a: Tensor, r: Tensor, log_s: Tensor, *, epsilon: float, centre: Tensor, unit: float):
        self.log_a, self.r, self.log_s = log_a, r, log_s  # (K,), (K, D), (K, D)
        self.epsilon, self.centre, self.unit = epsilon, centre, unit

    @classmethod
    def fit(
        cls,
        source: Tensor,
        target: Tensor,
        *,
        components: int = 10,
        epsilon: float = 0.1,
        steps: int = 1000,
        batch: int | None = 128,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> LightBridge:
        """From latents (N, *L) and (M, *L), by Adam on mean log c(x) - mean log v(y), the objective of section 3.2.

        `epsilon` is in units of the latents' mean variance. It starts near the identity plus the mean shift: from a
        mixture somewhere among the targets it takes long to learn to keep anything. Raises UserError for empty
        domains, different shapes, and more dimensions than `LIMIT`.
        """
        if min(len(source), len(target)) < 2:
            raise UserError(f"LightSB: needs 2 samples a side, got {len(source)} and {len(target)}")
        if source.shape[1:] != target.shape[1:]:
            shapes = " and ".join(str(tuple(side.shape[1:])) for side in (source, target))
            raise UserError(f"LightSB: the domains have latents of {shapes}")
        if math.prod(source.shape[1:]) > LIMIT:
            raise UserError(f"LightSB: {math.prod(source.shape[1:])} dimensions, at most {LIMIT}")
        if components < 1 or steps < 1 or epsilon <= 0 or (batch is not None and batch < 1):
            raise UserError("LightSB: components, steps and batch must be at least 1, epsilon positive")
        x, y = source.flatten(1).float(), target.flatten(1).float()
        centre = x.mean(0)
        unit = float(((x.var(0).mean() + y.var(0).mean()) / 2).sqrt())
        if not unit > 0:
            raise UserError("LightSB: all latents of a domain are the same")
        x, y = (x - centre) / unit, (y - centre) / unit
        draws = rng.generator(seed, "light bridge", 0)
        # Components that began as one would stay one.
        apart = 0.1 * torch.randn(components, x.shape[1], generator=draws) if components > 1 else 0.0
        r = (y.mean(0) + torch.as_tensor(apart).to(y)).expand(components, -1).clone().requires_grad_()
        log_s = torch.full_like(r, math.log(0.97)).requires_grad_()
        log_a = torch.zeros(components, device=x.device, requires_grad=True)
        bridge = cls(log_a, r, log_s, epsilon=epsilon, centre=centre, unit=unit)
        optimizer = torch.optim.Adam([log_a, r, log_s], lr=learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(steps):
                a, b = (_draw(side, batch, draws) for side in (x, y))
                # Over the dimensions, or the step would depend on their number.
                loss = (bridge.scores(a).logsumexp(1).mean() - bridge.log_potential(b).mean()) / x.shape[1]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
        for parameter in (log_a, r, log_s):
            parameter.requires_grad_(False)
        return bridge

    def scores(self, x: Tensor) -> Tensor:
        """log a_k + (x'S_k x + 2 r_k'x) / (2 eps) of (B, D): (B, K). Its log-sum-exp is log c(x)."""
        return self.log_a + (x.square() @ self.log_s.exp().t() + 2 * x @ self.r.t()) / (2 * self.epsilon)

    def log_potential(self, y: Tensor) -> Tensor:
        """log v of (B, D): (B,)."""
        precision = (-self.log_s).exp() / self.epsilon
        squared = y.square() @ precision.t() - 2 * y @ (self.r * precision).t() + (self.r.square() * precision).sum(1)
        normal = self.log_s.sum(1) + y.shape[1] * math.log(2 * math.pi * self.epsilon)
        return (self.log_a - (squared + normal) / 2).logsumexp(1)

    def translate(self, latents: Tensor, *, places: Tensor | None = None, seed: int = 0) -> Tensor:
        """Latents (B, *L) to their mean under the plan, or, with the `places` of the samples, to a draw from it that
        is a function of (seed, place)."""
        x = (latents.flatten(1).float() - self.centre.to(latents.device)) / self.unit
        log_s, r = self.log_s.to(x), self.r.to(x)
        weights = self._on(x).scores(x).softmax(1)
        if places is None:
            y = weights @ r + x * (weights @ log_s.exp())
        else:
            levels = rng.uniform(seed, "light bridge component", places).to(weights)
            chosen = (weights.cumsum(1) < levels[:, None]).sum(1).clamp(max=weights.shape[1] - 1)
            noise = rng.normal(x.shape[1:], seed, "light bridge", places, device=x.device)
            stretch = log_s.exp()[chosen]
            y = r[chosen] + stretch * x + (self.epsilon * stretch).sqrt() * noise
        return (y * self.unit + self.centre.to(x)).view_as(latents).to(latents.dtype)

    def _on(self, x: Tensor) -> LightBridge:
        parts = (part.to(x) for part in (self.log_a, self.r, self.log_s))
        return LightBridge(*parts, epsilon=self.epsilon, centre=self.centre, unit=self.unit)


def _draw(rows: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """`count` of the rows with replacement, or all of them."""
    if count is None or count >= len(rows):
        return rows
    return rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]
