"""Translation of images: encode, walk down the energy, decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from letit_dist import pretrained, rng
from letit_dist.autoencoders.base import Autoencoder, load_autoencoder
from letit_dist.config import as_tree, parse_config, read_tree
from letit_dist.energy.langevin import LangevinConfig, LangevinResult, LangevinSampler, Noise
from letit_dist.energy.models import EnergyModel, load_energy
from letit_dist.errors import UserError
from letit_dist.memory import Precision, lowered


@dataclass(frozen=True)
class Translation:
    """Translated images and how they came about. T' steps were run: ceil(strength * T)."""

    images: Tensor  # (B, 3, H, W), about in [-1, 1], not clipped
    latents: Tensor  # (B, *L), what was decoded
    source_latents: Tensor  # (B, *L), where the chains began
    shift: Tensor  # (B, *L), sum of |dE/dz| over the steps (section 4.2)
    path: Tensor | None = None  # (T'+1, B, *L) if kept
    path_images: Tensor | None = None  # (T'+1, B, 3, H, W) if kept; the first are the reconstructions


class Translator:
    """A frozen autoencoder, an energy on its latents, and the settings of the chain between them.

    `precision` bf16 lowers the networks, by autocast; latents and images stay float32.
    """

    precision: Precision = "fp32"

    def __init__(self, autoencoder: Autoencoder, energy: EnergyModel, sampler: LangevinSampler):
        if energy.latent_shape != tuple(autoencoder.latent_shape):
            raise UserError(
                f"the energy sees latents {energy.latent_shape}, the autoencoder makes {autoencoder.latent_shape}"
            )
        self.autoencoder = autoencoder
        self.energy = energy
        self.sampler = sampler

    def to(self, device: torch.device | str) -> Translator:
        """Move both networks; returns self."""
        self.autoencoder.to(device)
        self.energy.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.autoencoder.parameters()).device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, *L)."""
        with lowered(self.precision, self.device):
            return self._raised(self.autoencoder.encode(images))

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents (B, *L) to images (B, 3, H, W); the noise is that of `Autoencoder.decode`."""
        with lowered(self.precision, self.device):
            return self._raised(self.autoencoder.decode(latents, noise=noise, generator=generator))

    def _raised(self, result: Tensor) -> Tensor:
        return result.float() if self.precision == "bf16" else result

    def decoder_noise(self, seed: int, places: Sequence[int] | Tensor) -> list[Tensor] | None:
        """The decoder's noise as a function of (seed, place of the sample), maps (B, *shape); None where
        translations are decoded without."""
        if not self.autoencoder.decodes_with_noise:
            return None
        # ALAE's published code shares its first map over the batch. Here every map belongs to its image, or a
        # picture would depend on its neighbours.
        return [
            rng.normal(shape, seed, f"decoder noise {i}", places, device=self.device)
            for i, shape in enumerate(self.autoencoder.noise_shapes())
        ]

    def noise(self, seed: int, places: Sequence[int] | Tensor) -> Noise | None:
        """The chain's noise as a function of (seed, step, place of the sample), so that no batch size changes it;
        None where the chain has none."""
        if self.sampler.config.noise_scale == 0:
            return None
        shape, device = self.energy.latent_shape, next(self.energy.parameters()).device
        return lambda step: rng.normal(shape, seed, f"translate {step}", places, device=device)

    def chain(
        self, *, steps: int | None = None, step_size: float | None = None, strength: float = 1.0
    ) -> tuple[LangevinConfig, int, float]:
        """Settings of a chain, the whole steps to walk, and the fraction of one more; see `transport`."""
        if not 0 <= strength <= 1:
            raise UserError(f"strength is the fraction of the chain to walk, in [0, 1], got {strength}")
        given = {"steps": steps, "step_size": step_size}
        tree = {**as_tree(self.sampler.config), **{k: v for k, v in given.items() if v is not None}}
        config = parse_config(LangevinConfig, tree)
        # Rounded, or 0.07 * 100 = 7.000000000000001 would cost an eighth step.
        fraction, whole = math.modf(round(strength * config.steps, 9))
        return config, int(whole), fraction

    def transport(
        self,
        latents: Tensor,
        *,
        steps: int | None = None,
        step_size: float | None = None,
        strength: float = 1.0,
        keep_path: bool = False,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
        watch: Callable[[Tensor], object] | None = None,
    ) -> LangevinResult:
        """Latents (B, *L) of the source, moved along their chains.

        `steps` and `step_size` override the sampler's. `strength` in [0, 1] is the fraction of the chain to
        walk; between two steps the result lies on the straight line from one to the next. `noise`,
        `generator` and `watch` are those of `LangevinSampler.sample`. Raises UserError for settings out of range.
        """
        config, whole, fraction = self.chain(steps=steps, step_size=step_size, strength=strength)

        def walk(start: Tensor, first: int, steps: int, watch: Callable[[Tensor], object] | None) -> LangevinResult:
            part = LangevinSampler(config.model_copy(update={"steps": steps}))
            later = None if noise is None else lambda step: noise(first + step)
            with lowered(self.precision, self.device):
                return part.sample(
                    self.energy, start, noise=later, generator=generator, keep_path=keep_path, watch=watch
                )

        result = walk(latents, 0, whole, watch)
        if fraction == 0:
            return result
        last = walk(result.latents, whole, 1, None)
        end = result.latents.lerp(last.latents, fraction)
        shift = result.shift + fraction * last.shift
        if watch is not None:
            watch(end)
        if not keep_path:
            return LangevinResult(end, shift)
        with lowered(self.precision, self.device):
            energy_at_end = self.energy(end).detach().unsqueeze(0)
        return LangevinResult(
            end, shift, torch.cat([result.path, end.unsqueeze(0)]), torch.cat([result.energies, energy_at_end])
        )

    @torch.no_grad()
    def translate(
        self,
        images: Tensor,
        *,
        steps: int | None = None,
        step_size: float | None = None,
        strength: float = 1.0,
        keep_path: bool = False,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
        decoder_noise: Sequence[Tensor] | None = None,
        decoder_generator: torch.Generator | None = None,
        on_frame: Callable[[Tensor], object] | None = None,
    ) -> Translation:
        """Images (B, 3, H, W) in [-1, 1] of the source domain, translated to the target's.

        The first arguments are those of `transport`; the decoder's noise is that of `Autoencoder.decode` (the
        programs give `decoder_noise` by place). With
        `keep_path` every step is decoded too, one step's B images at a time and each with the same decoder
        noise, so that only the latents change along the path. `on_frame` gets the same frames (B, 3, H, W) one by
        one as the chain goes, and nothing of them is kept: all of them at 1024 pixels would be half a GiB an image.
        """
        if on_frame is not None and decoder_generator is not None and decoder_generator is generator:
            raise ValueError("with on_frame the chain and the decoder need a generator each")
        source = self.encode(images)
        state: Tensor | None = None
        frame: Tensor | None = None

        def decode(latents: Tensor) -> Tensor:
            nonlocal state
            if decoder_generator is not None and state is None:
                state = decoder_generator.get_state()
            elif decoder_generator is not None:
                decoder_generator.set_state(state)
            return self.decode(latents, noise=decoder_noise, generator=decoder_generator)

        def watch(latents: Tensor) -> None:
            nonlocal frame
            frame = None  # before the next one is made
            frame = decode(latents)
            on_frame(frame)

        result = self.transport(
            source,
            steps=steps,
            step_size=step_size,
            strength=strength,
            keep_path=keep_path,
            noise=noise,
            generator=generator,
            watch=None if on_frame is None else watch,
        )
        if not keep_path:
            images = decode(result.latents) if frame is None else frame
            return Translation(images, result.latents, source, result.shift)
        frames = torch.stack([decode(latents) for latents in result.path])
        return Translation(frames[-1], result.latents, source, result.shift, result.path, frames)


def load_translator(autoencoder_folder: str | Path, energy_folder: str | Path) -> Translator:
    """The two folders as one translator, on the CPU.

    The chain's settings come from the energy's config.json (extra.langevin). Raises UserError for an energy
    that was trained on another autoencoder (extra.autoencoder_fingerprint) or does not say on which.
    """
    autoencoder = load_autoencoder(autoencoder_folder)
    energy = load_energy(energy_folder)
    where = Path(energy_folder) / pretrained.CONFIG
    missing = [key for key in ("autoencoder_fingerprint", "langevin") if key not in energy.extra]
    if missing:
        raise UserError("\n".join(f"{where}: no extra.{key}" for key in missing))
    expected, found = energy.extra["autoencoder_fingerprint"], autoencoder.fingerprint()
    if expected != found:
        raise UserError(
            f"{energy_folder} was trained on the latents of autoencoder {expected}, but {autoencoder_folder} is "
            f"autoencoder {found}"
        )
    try:
        config = parse_config(LangevinConfig, energy.extra["langevin"])
    except UserError as error:
        raise UserError("\n".join(f"{where}: extra.langevin: {line}" for line in str(error).splitlines())) from None
    return Translator(autoencoder, energy, LangevinSampler(config))


def open_translator(energy: str | Path, autoencoder: str | Path | None = None) -> Translator:
    """A translator from a run folder of launch/train_energy.py, whose configuration names its autoencoder, or
    from a folder of weights together with `autoencoder` (a folder of weights or a pretraining run)."""
    folder = pretrained.find_folder(energy)
    if not folder.is_dir():
        raise UserError(f"no such energy: {energy} (a run folder of launch/train_energy.py, or its export)")
    if autoencoder is None:
        path = Path(energy) / "config.yaml"
        if not path.is_file():
            raise UserError(f"{energy} is no run folder (no config.yaml): name its autoencoder with --autoencoder")
        autoencoder = read_tree(path)[0].get("autoencoder")
        if not isinstance(autoencoder, str):
            raise UserError(f"{energy} is no run of launch/train_energy.py: its config.yaml names no autoencoder")
        if not Path(autoencoder).exists():
            raise UserError(f"{path}: its autoencoder {autoencoder} is not there: name it with --autoencoder")
    return load_translator(pretrained.find_folder(autoencoder), folder)


def choose_translator(energies: Sequence[str], autoencoder: str | None, to: str | None) -> Translator:
    """The translator among `energies` (see `open_translator`) whose target is `to`; `to` may be None for one."""
    translators = [open_translator(energy, autoencoder) for energy in energies]
    targets = [translator.energy.extra.get("target", "?") for translator in translators]
    if to is None and len(translators) == 1:
        return translators[0]
    if to is not None and targets.count(to) > 1:
        raise UserError(f"--to {to}: {targets.count(to)} of the energies go there: give only one of them")
    if to not in targets:
        raise UserError(
            f"--to names the domain to go to, one of: {', '.join(targets)}" + (f"; got {to!r}" if to else "")
        )
    return translators[targets.index(to)]
