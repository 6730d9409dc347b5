"""The proof of concept (LETIT, section 4.2, figure 3): one disc of points moved onto another.

Two discs of radius 1, their centres 1 apart along the second axis. The first coordinate is content, which must stay;
the second is style. A linear autoencoder spreads both over 8 latent dimensions; the energy has to find the style.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from letit_dist import rng
from letit_dist.autoencoders.linear import LinearAutoencoder
from letit_dist.data.progress import Progress
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.objective import contrastive_loss

SOURCE, TARGET = (0.0, 0.0), (0.0, 1.0)  # centres
_STILL = 0.5  # a dimension that moves less than this share of the one that moves most carries content rather than style


@dataclass(frozen=True)
class PiesConfig:
    """The published settings: its code takes 8 steps of 0.02, the paper 10; a step of 0.02 is 0.04 in eq. (6)."""

    points: int = 10_000  # a disc
    latent_dim: int = 8
    batch: int = 32
    epochs: int = 50
    autoencoder_epochs: int = 4
    autoencoder_rate: float = 0.01  # SGD
    energy_rate: float = 0.02  # SGD
    steps: int = 10
    step_size: float = 0.04
    watch: tuple[int, ...] = (0, 5, 50)  # epochs after which the translation is kept
    seed: int = 0


@dataclass
class PiesResult:
    """What the figure shows, all on the CPU."""

    source: Tensor  # (N, 2)
    target: Tensor  # (N, 2)
    style: Tensor  # (latent_dim,), absolute weights of the second coordinate in the encoder
    translated: dict[int, Tensor] = field(default_factory=dict)  # epoch -> (N, 2)
    shift: dict[int, Tensor] = field(default_factory=dict)  # epoch -> (N, latent_dim), sum of |dE/dz|

    def inside(self, epoch: int) -> float:
        """Share of the translated points that lie in the target disc."""
        return float((self.translated[epoch] - torch.tensor(TARGET)).norm(dim=1).le(1).float().mean())

    def content_correlation(self, epoch: int) -> float:
        """Correlation of the first coordinate before and after."""
        return float(torch.corrcoef(torch.stack([self.source[:, 0], self.translated[epoch][:, 0]]))[0, 1])

    def still_dimensions(self, epoch: int) -> list[int]:
        """The latent dimensions that hardly move, the least moved first."""
        moved = self.shift[epoch].mean(0)
        order = moved.argsort().tolist()
        return [dim for dim in order if moved[dim] < _STILL * moved.max()]

    def style_correlation(self, epoch: int) -> float:
        """Correlation over dimensions of how far each moves and how much style the encoder puts into it."""
        return float(torch.corrcoef(torch.stack([self.shift[epoch].mean(0), self.style]))[0, 1])


def disc(count: int, centre: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Points (count, 2), uniform in the disc of radius 1."""
    radius, angle = torch.rand(2, count, generator=generator)
    radius, angle = radius.sqrt(), 2 * torch.pi * angle
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1) + torch.tensor(centre)


def run_pies(config: PiesConfig) -> PiesResult:
    """Train the autoencoder on both discs, then the energy on their latents; a pure function of `config`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on matrices as small as these a second one is only waited for
    try:
        return _run(config)
    finally:
        torch.set_num_threads(threads)


def _run(config: PiesConfig) -> PiesResult:
    draws = rng.generator(config.seed, "pies", 0)
    source, target = disc(config.points, SOURCE, draws), disc(config.points, TARGET, draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_for(config.seed, "pies weights", 0))
        autoencoder = LinearAutoencoder(2, config.latent_dim)
        shape = autoencoder.latent_shape
        energy = build_energy(MLPEnergyConfig(layers=1, hidden=config.latent_dim, activation="gelu"), shape)

    _fit(autoencoder, torch.cat([source, target]), config, draws)
    with torch.no_grad():
        starts, goals = autoencoder.encode(source), autoencoder.encode(target)
    sampler = LangevinSampler(LangevinConfig(steps=config.steps, step_size=config.step_size))
    optimizer = torch.optim.SGD(energy.parameters(), lr=config.energy_rate, fused=True)
    result = PiesResult(source, target, autoencoder.encoder.weight.detach()[:, 1].abs())

    def look(epoch: int) -> None:
        chain = sampler.sample(energy, starts)
        result.translated[epoch] = autoencoder.decode(chain.latents).detach()
        assert chain.shift is not None
        result.shift[epoch] = chain.shift

    with Progress("learning the energy", config.epochs) as progress:
        for epoch in range(config.epochs + 1):
            if epoch in config.watch or epoch == config.epochs:
                look(epoch)
            if epoch == config.epochs:
                return result
            orders = [torch.randperm(config.points, generator=draws).split(config.batch) for _ in range(2)]
            for rows, others in zip(*orders, strict=True):
                moved = sampler.sample(energy, starts[rows]).latents
                loss, _ = contrastive_loss(energy, goals[others], moved)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            progress.step(1)
    raise AssertionError("the loop returns at its last epoch")


def _fit(autoencoder: LinearAutoencoder, points: Tensor, config: PiesConfig, draws: torch.Generator) -> None:
    optimizer = torch.optim.SGD(autoencoder.parameters(), lr=config.autoencoder_rate, fused=True)
    for _ in range(config.autoencoder_epochs):
        for rows in torch.randperm(len(points), generator=draws).split(config.batch):
            loss = F.mse_loss(autoencoder.decode(autoencoder.encode(points[rows])), points[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    autoencoder.requires_grad_(False)
