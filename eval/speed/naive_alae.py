"""One training iteration of ALAE as it was published, written plainly: the other side of `throughput.py alae`.

Every formula stands as the publication's code has it (2004.04467; the equations of its layers are StyleGAN's,
1812.04948): nearest upsampling before a convolution and 2x2 means after one below 128 pixels, blur by a grouped
convolution, moments and instance norm in passes of their own, LeakyReLU twice where it is applied twice, row-major
activations, and loops over parameters. It shares no code with `letit_dist`, so that agreement means something.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from letit_dist.autoencoders.alae import ALAE
    from letit_dist.recipes.alae import Draws

FUSED_FROM = 128  # pixels
PHASES = (  # and the networks that each of them steps
    ("discriminator", ("encoder", "critic")),
    ("generator", ("generator", "mapping")),
    ("reciprocity", ("encoder", "critic", "generator", "mapping")),
)
BETA2, EPS = 0.99, 1e-8


class NaiveALAE:
    """The networks of a letit ALAE, as functions of copies of its parameters under the same names.

    `draws` in the methods have z, z_mixed (or None) and cut for the styles, and noise for the layers: a recipe's
    `Draws`, or those of `draw`.
    """

    def __init__(self, network: ALAE, *, rate: float, half_life: float, gamma: float = 10.0, eps: float = EPS):
        self.config = network.config
        self.rate, self.half_life, self.gamma, self.eps = rate, half_life, gamma, eps
        self.precision = "fp32"
        plain = {"memory_format": torch.contiguous_format}
        self.weights = {n: p.detach().clone(**plain).requires_grad_() for n, p in network.named_parameters()}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.w_mean = network.w_mean.clone()
        self.coefficients = {name: self._coefficient(name) for name in self.weights}
        self.second_moments: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        self.random = random.Random(0)
        line = torch.tensor([1.0, 2.0, 1.0])
        self.kernel = (torch.outer(line, line) / 16).to(self.w_mean)

    def _coefficient(self, name: str) -> float:
        """What the optimiser multiplies a parameter's step by: gain / sqrt(fan_in) * lrmul, or lrmul for a bias."""
        layer, _, kind = name.rpartition(".")
        lrmul = 0.1 if name.startswith(("mapping", "critic")) else 1.0
        if kind != "weight":
            return lrmul
        shape = self.weights[name].shape
        transposed = layer.startswith("generator") and layer.endswith("conv1") and self._fused(int(layer.split(".")[2]))
        fan_in = shape[0 if transposed else 1] * math.prod(shape[2:])
        gain = 0.03 if "to_rgb" in layer else 1.0 if layer.endswith(".style") else math.sqrt(2)
        return gain / math.sqrt(fan_in) * lrmul

    @staticmethod
    def _fused(level: int) -> bool:
        return 4 << level >= FUSED_FROM

    # ---------------------------------------------------------------- networks

    def mapping(self, z: Tensor) -> Tensor:
        """F: z (B, latent_dim) to w (B, latent_dim)."""
        w = z / torch.sqrt(torch.mean(z**2, 1, keepdim=True) + 1e-8)
        for index in range(self.config.mapping_layers):
            w = F.leaky_relu(self._linear(f"mapping.layers.{index}", w), 0.2)
        return w

    def critic(self, w: Tensor) -> Tensor:
        """D: w (B, latent_dim) to logits (B,)."""
        for index in range(3):
            w = self._linear(f"critic.layers.{index}", w)
        return w[:, w.shape[1] // 2]

    def encode(self, images: Tensor, level: int, blend: float = 1.0) -> Tensor:
        """E: images (B, 3, 4 * 2^level, ...) to w (B, latent_dim)."""
        x = self._from_rgb(images, level)
        w = torch.zeros((), device=images.device)
        for at in range(level, -1, -1):
            name, fading = f"encoder.blocks.{at}", blend < 1 and at == level
            x = F.conv2d(x, self.weights[f"{name}.conv1.weight"], padding=1) + self.weights[f"{name}.bias1"]
            x, first = self._read_style(f"{name}.style1", x)
            x = self._half(f"{name}.conv2.weight", self._blur(x), at) + self.weights[f"{name}.bias2"]
            x, second = self._read_style(f"{name}.style2", x)
            w = w + (first * blend if fading else first) + (second * blend if fading else second)
            if fading:
                x = torch.lerp(self._from_rgb(F.avg_pool2d(images, 2), level - 1), x, blend)
        return w

    def generate(self, styles: Tensor, noise: Sequence[Tensor], level: int, blend: float = 1.0) -> Tensor:
        """G: styles (B, 2 * (level + 1), latent_dim) to images (B, 3, 4 * 2^level, ...)."""
        x = below = self.weights["generator.const"]
        for at in range(level + 1):
            below, name = x, f"generator.blocks.{at}"
            if at:
                x = self._blur(self._twice(f"{name}.conv1.weight", x, at))
            x = self._write_style(f"{name}.styled1", x, noise[2 * at], styles[:, 2 * at])
            x = F.conv2d(x, self.weights[f"{name}.conv2.weight"], padding=1)
            x = self._write_style(f"{name}.styled2", x, noise[2 * at + 1], styles[:, 2 * at + 1])
        images = self._convolve(f"generator.to_rgb.{level}", x)
        if blend < 1:
            coarse = self._convolve(f"generator.to_rgb.{level - 1}", below)
            images = torch.lerp(F.interpolate(coarse, scale_factor=2, mode="nearest"), images, blend)
        return images

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _from_rgb(self, images: Tensor, level: int) -> Tensor:
        x = F.leaky_relu(self._convolve(f"encoder.from_rgb.{level}", images), 0.2)
        return F.leaky_relu(x, 0.2)

    def _blur(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)

    @staticmethod
    def _four_shifts(kernel: Tensor) -> Tensor:
        kernel = F.pad(kernel, (1, 1, 1, 1))
        return kernel[..., 1:, 1:] + kernel[..., :-1, 1:] + kernel[..., 1:, :-1] + kernel[..., :-1, :-1]

    def _twice(self, name: str, x: Tensor, level: int) -> Tensor:
        if self._fused(level):
            return F.conv_transpose2d(x, self._four_shifts(self.weights[name]), stride=2, padding=1)
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), self.weights[name], padding=1)

    def _half(self, name: str, x: Tensor, level: int) -> Tensor:
        if self._fused(level):
            return F.conv2d(x, self._four_shifts(self.weights[name]) * 0.25, stride=2, padding=1)
        return F.avg_pool2d(F.conv2d(x, self.weights[name], padding=1), 2)

    def _read_style(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """LeakyReLU, (mean, std) through a linear map, instance norm: the map, and the style (B, latent_dim)."""
        x = F.leaky_relu(x, 0.2)
        mean = torch.mean(x, (2, 3), keepdim=True)
        std = torch.sqrt(torch.mean((x - mean) ** 2, (2, 3), keepdim=True))
        style = self._linear(name, torch.cat([mean, std], 1).flatten(1))
        return F.instance_norm(x, eps=1e-5), style

    def _write_style(self, name: str, x: Tensor, noise: Tensor, w: Tensor) -> Tensor:
        """Noise, bias, LeakyReLU, instance norm, style."""
        x = x + self.weights[f"{name}.noise"] * noise
        x = x + self.weights[f"{name}.bias"]
        x = F.leaky_relu(x, 0.2)
        x = F.instance_norm(x, eps=1e-8)
        style = self._linear(f"{name}.style", w).view(len(w), 2, -1, 1, 1)
        return x * (1 + style[:, 0]) + style[:, 1]

    # ---------------------------------------------------------------- losses

    def draw(self, phase: str, batch: int, level: int) -> SimpleNamespace:
        """Fresh latents and noise of one phase, from torch's default generator."""
        device, dtype = self.w_mean.device, self.w_mean.dtype
        shapes = [(batch, 1, 4 << at, 4 << at) for at in range(level + 1) for _ in range(2)]
        shapes[0] = (1, 1, 4, 4)  # the constant is not yet expanded where the first noise is added
        drawn = SimpleNamespace(z_mixed=None, cut=0)
        drawn.z = torch.randn(batch, self.config.latent_dim, device=device, dtype=dtype)
        if phase != "reciprocity" and self.random.random() < 0.9:
            drawn.z_mixed = torch.randn_like(drawn.z)
            drawn.cut = self.random.randint(1, 2 * (level + 1))
        drawn.noise = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        return drawn

    def _mixed(self, draws: Draws | SimpleNamespace, level: int, blend: float) -> Tensor:
        """G(F(z)) with style mixing; moves the mean of w."""
        w = self.mapping(draws.z)
        self.w_mean.lerp_(w.detach().mean(0).to(self.w_mean).expand_as(self.w_mean), 1 - 0.995)
        styles = w[:, None].repeat(1, 2 * (level + 1), 1)
        if draws.z_mixed is not None:
            other = self.mapping(draws.z_mixed)[:, None].repeat(1, 2 * (level + 1), 1)
            index = torch.arange(2 * (level + 1), device=w.device)[None, :, None]
            styles = torch.where(index < draws.cut, styles, other)
        return self.generate(styles, draws.noise, level, blend)

    def discriminator_loss(self, images: Tensor, draws: Draws | SimpleNamespace, level: int, blend: float) -> Tensor:
        """Of E and D, with R1."""
        with torch.no_grad():
            generated = self._mixed(draws, level, blend)
        fake = self.critic(self.encode(generated, level, blend)).float()
        images = images.detach().requires_grad_()
        real = self.critic(self.encode(images, level, blend)).float()
        (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
        penalty = torch.sum(gradient.float() ** 2, (1, 2, 3))
        return torch.mean(F.softplus(fake) + F.softplus(-real) + self.gamma / 2 * penalty)

    def generator_loss(self, images: Tensor, draws: Draws | SimpleNamespace, level: int, blend: float) -> Tensor:
        """Of G and F; the images do not matter."""
        return torch.mean(F.softplus(-self.critic(self.encode(self._mixed(draws, level, blend), level, blend)).float()))

    def reciprocity_loss(self, images: Tensor, draws: Draws | SimpleNamespace, level: int, blend: float) -> Tensor:
        """Of E, G and F; the images do not matter."""
        w = self.mapping(draws.z)
        styles = w[:, None].repeat(1, 2 * (level + 1), 1)
        again = self.encode(self.generate(styles, draws.noise, level, blend), level, blend)
        return torch.mean((again.float() - w.detach().float()) ** 2)

    # ---------------------------------------------------------------- learning

    def iteration(
        self, images: Tensor, draws: Callable[[str], object], level: int, blend: float = 1.0
    ) -> Iterator[tuple[str, Tensor]]:
        """The three phases, each with its step, then the average; gives (phase, loss) after each of them.

        images (B, 3, 4 * 2^level, ...) in [-1, 1]; `draws` is asked once a phase, by its name.
        """
        for phase, networks in PHASES:
            loss = getattr(self, f"{phase}_loss")
            learning = {name: weight for name, weight in self.weights.items() if name.startswith(networks)}
            for weight in learning.values():
                weight.grad = None
            for name, weight in self.weights.items():
                if name.startswith("encoder"):
                    weight.requires_grad_(phase != "generator")
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                value = loss(images, draws(phase), level, blend)
            value.backward()
            self._adam(learning)
            yield phase, value.detach()
        beta = 0.5 ** (len(images) / self.half_life)
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.averages[name].lerp_(weight, 1 - beta)

    @torch.no_grad()
    def _adam(self, learning: dict[str, Tensor]) -> None:
        """Adam without first moments, each step multiplied by the parameter's coefficient."""
        for name, weight in learning.items():
            if weight.grad is None:
                continue
            moment = self.second_moments.setdefault(name, torch.zeros_like(weight))
            self.steps[name] = self.steps.get(name, 0) + 1
            moment.mul_(BETA2).addcmul_(weight.grad, weight.grad, value=1 - BETA2)
            size = self.rate * self.coefficients[name] * math.sqrt(1 - BETA2 ** self.steps[name])
            weight.addcdiv_(weight.grad, moment.sqrt().add_(self.eps), value=-size)

    # ---------------------------------------------------------------- for the benchmark

    def held(self) -> list[Tensor]:
        """What lives between two iterations, but for the gradients, which the next one replaces."""
        return [*self.weights.values(), *self.averages.values(), *self.second_moments.values(), self.w_mean]

    def forget_gradients(self) -> None:
        """Drop what the next iteration makes anew."""
        for weight in self.weights.values():
            weight.grad = None
