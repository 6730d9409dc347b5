"""Both sides of `throughput.py langevin`: the published chain and the sampler's, on the same energy."""

from __future__ import annotations

import torch

from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.models import build_energy
from letit_dist.evaluation.benchmark import Side
from letit_dist.training.setup import seed_weights
from speed.agreement import apart, full_precision, listed, require_agreement
from speed.energy_sides import Chain
from speed.naive_energy import NaiveEnergy

# Of the largest move. Where a unit changes its sign, or not, by rounding, paths part.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


class ChainSides:
    """Noise-free chains (eq. 6) from `chain.batch` random latents, down an energy of random weights."""

    def __init__(self, chain: Chain, shape: tuple[int, ...], device: torch.device, *, frozen: bool, seed: int = 0):
        """`shape` is of one sample's latents; `frozen` as in `NaiveEnergy`."""
        self.chain, self.device, self.frozen = chain, device, frozen
        self._seed, self._shape = seed, shape
        self.sampler = LangevinSampler(LangevinConfig(steps=chain.steps, step_size=chain.step_size))
        self._lowered = False
        self._build(torch.float32)

    def _build(self, dtype: torch.dtype) -> None:
        seed_weights(self._seed)
        self.energy = build_energy(self.chain.energy, self._shape).to(self.device, dtype).eval()
        self.naive = NaiveEnergy(
            self.energy,
            steps=self.chain.steps,
            step_size=self.chain.step_size,
            rate=0.0,  # nothing learns here
            betas=(0.0, 0.0),
            eps=1.0,
            decay=1.0,
            frozen=self.frozen,
        )
        draws = torch.Generator().manual_seed(self._seed)
        self.start = torch.randn(self.chain.batch, *self._shape, generator=draws).to(self.device, dtype)

    def precisions(self, asked: str, *, plain: bool) -> None:
        """With `asked` "bf16" energies work under autocast, with `plain` ours alone."""
        self._lowered = asked == "bf16"
        self.naive.precision = "fp32" if plain else asked

    def run_ours(self) -> torch.Tensor:
        """Where the chains end (B, *L)."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._lowered):
            return self.sampler.sample(self.energy, self.start, keep_shift=False).latents

    def run_naive(self) -> torch.Tensor:
        """The same."""
        ended = self.naive.chain(self.start)
        self.naive.forget_gradients()
        return ended

    @property
    def naive_side(self) -> Side:
        return Side(self.run_naive, self.naive.weights.values)

    @property
    def our_side(self) -> Side:
        return Side(self.run_ours, self.energy.state_dict().values)

    def agree(self) -> str:
        """In float64, and in float32 what rounding leaves; a UserError where moves are more apart than `TOLERANCE`."""
        found = {}
        for dtype in TOLERANCE:
            self._build(dtype)
            with full_precision(self.naive):
                expected = self.run_naive() - self.start
                name = f"moves in {str(dtype).removeprefix('torch.')}"
                found[name] = apart(self.run_ours() - self.start, expected)
            require_agreement({name: found[name]}, TOLERANCE[dtype])
        return listed(found)
