"""Translation of images: encode, walk down the energy, decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from letit_dist import hub, pretrained, rng
from letit_dist.autoencoders.base import Autoencoder, load_autoencoder
from letit_dist.cards import Card
from letit_dist.config import as_tree, parse_config, read_tree
from letit_dist.energy.folders import is_translator_folder, read_translators, save_translators
from letit_dist.energy.langevin import LangevinConfig, LangevinResult, LangevinSampler, Noise
from letit_dist.energy.models import EnergyModel, load_energy, split_condition
from letit_dist.errors import UserError
from letit_dist.memory import Precision, lowered

METHOD = "latent energy"  # the name of what a Translator does, beside other methods in tables and sheets


@dataclass(frozen=True)
class Translation:
    """Translated images and how they came about. T' steps were run: ceil(strength * T)."""

    images: Tensor  # (B, 3, H, W), about in [-1, 1], not clipped
    latents: Tensor  # (B, *L), what was decoded
    source_latents: Tensor  # (B, *L), where the chains began
    shift: Tensor  # (B, *L), sum of |dE/dz| over the steps (section 4.2)
    steps: Tensor  # (B,), how many steps each chain took
    path: Tensor | None = None  # (T'+1, B, *L) if kept
    path_images: Tensor | None = None  # (T'+1, B, 3, H, W) if kept; the first are the reconstructions


class Translator:
    """A frozen autoencoder, an energy on its latents, and the settings of the chain between them.

    `precision` bf16 lowers the networks, by autocast; latents and images stay float32.
    """

    precision: Precision = "fp32"
    origin: Path | None = None  # the run folder, or folder of weights, that its energy was read from
    autoencoder_origin: str | Path | None = None  # the folder, or id on the Hub, of its autoencoder

    def __init__(self, autoencoder: Autoencoder, energy: EnergyModel, sampler: LangevinSampler):
        if energy.latent_shape != tuple(autoencoder.latent_shape):
            raise UserError(
                f"the energy sees latents {energy.latent_shape}, the autoencoder makes {autoencoder.latent_shape}"
            )
        # Convolutions then run up to a third faster (eval/throughput.py decode). Volumes have no such format.
        if all(parameter.ndim < 5 for parameter in autoencoder.parameters()):
            autoencoder.to(memory_format=torch.channels_last)
        self.autoencoder = autoencoder
        self.energy = energy
        self.sampler = sampler

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        autoencoder: str | Path | None = None,
        to: str | None = None,
        source: str | None = None,
    ) -> Translator:
        """The translator of a folder that `save_pretrained` wrote, of an id on the Hub, or of a run of
        launch/train_energy.py; on the CPU.

        `to` and `source` choose among several (see `choose_translator`), `autoencoder` is its folder or id if the
        folder does not say or hold it. Raises UserError for what is missing, damaged, newer, or does not belong
        together. A path that exists is never looked for on the Hub.
        """
        return choose_translator([path], autoencoder, to, source)

    def save_pretrained(self, folder: str | Path, *, card: Card | None = None, with_autoencoder: bool = False) -> None:
        """Write energy, settings of the chain, fingerprint of the autoencoder and a model card; see
        `energy.folders.save_translators`, which takes several. `with_autoencoder` puts a copy of that beside them."""
        save_translators([self], folder, card=card, with_autoencoder=with_autoencoder)

    def push_to_hub(
        self, repo_id: str, *, card: Card | None = None, private: bool = True, with_autoencoder: bool = True
    ) -> str:
        """Send what `save_pretrained` writes to a repository of the Hugging Face Hub; returns its address."""
        return hub.push(
            lambda folder: self.save_pretrained(folder, card=card, with_autoencoder=with_autoencoder),
            repo_id,
            private=private,
        )

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
        until: Callable[[Tensor], Tensor] | None = None,
    ) -> LangevinResult:
        """Latents (B, *L) of the source, moved along their chains.

        `steps` and `step_size` override the sampler's. `strength` in [0, 1] is the fraction of the chain to
        walk; between two steps the result lies on the straight line from one to the next. `noise`, `generator`,
        `watch` and `until` are those of `LangevinSampler.sample`. Raises UserError for settings out of range.
        """
        config, whole, fraction = self.chain(steps=steps, step_size=step_size, strength=strength)

        def walk(start: Tensor, first: int, steps: int, watch: Callable[[Tensor], object] | None) -> LangevinResult:
            part = LangevinSampler(config.model_copy(update={"steps": steps}))
            later = None if noise is None else lambda step: noise(first + step)
            with lowered(self.precision, self.device):
                return part.sample(
                    self.energy,
                    start,
                    noise=later,
                    generator=generator,
                    keep_path=keep_path,
                    watch=watch,
                    until=until,
                )

        result = walk(latents, 0, whole, watch)
        if fraction == 0:
            return result
        last = walk(result.latents, whole, 1, None)
        end = result.latents.lerp(last.latents, fraction)
        assert result.shift is not None and last.shift is not None
        shift, taken = result.shift + fraction * last.shift, result.steps + last.steps
        if watch is not None:
            watch(end)
        if not keep_path:
            return LangevinResult(end, shift, taken)
        with lowered(self.precision, self.device):
            energy_at_end = self.energy(end).detach().unsqueeze(0)
        assert result.path is not None and result.energies is not None
        path = torch.cat([result.path, end.unsqueeze(0)])
        return LangevinResult(end, shift, taken, path, torch.cat([result.energies, energy_at_end]))

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
        until: Callable[[Tensor], Tensor] | None = None,
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
            if decoder_generator is not None:
                if state is None:
                    state = decoder_generator.get_state()
                else:
                    decoder_generator.set_state(state)
            return self.decode(latents, noise=decoder_noise, generator=decoder_generator)

        def watch(latents: Tensor) -> None:
            nonlocal frame
            assert on_frame is not None
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
            until=until,
        )
        assert result.shift is not None
        if not keep_path:
            images = decode(result.latents) if frame is None else frame
            return Translation(images, result.latents, source, result.shift, result.steps)
        assert result.path is not None
        frames = torch.stack([decode(latents) for latents in result.path])
        return Translation(frames[-1], result.latents, source, result.shift, result.steps, result.path, frames)


def load_translators(autoencoder_folder: str | Path, energy_folder: str | Path) -> list[Translator]:
    """The two folders as translators, on the CPU: one, or one for each condition of the energy.

    The chain's settings come from the energy's config.json (extra.langevin), and so does where a translator goes:
    its energy's `extra` has "source" (None = any of the domains) and "target". Raises UserError for an energy
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
    translators = [Translator(autoencoder, part, LangevinSampler(config)) for part in _alone(energy)]
    for translator in translators:
        translator.autoencoder_origin = autoencoder_folder
    return translators


def _alone(energy: EnergyModel) -> list[EnergyModel]:
    """The energies of all conditions, each with its source and target in `extra`."""
    if not energy.config.conditions:
        return [energy]
    parts = []
    for name in energy.config.conditions:
        part = energy.at(name)
        source, target = split_condition(name) if energy.config.condition_on == "pair" else (None, name)
        part.extra = {**energy.extra, "source": source, "target": target}
        parts.append(part)
    return parts


def open_translators(energy: str | Path, autoencoder: str | Path | None = None) -> list[Translator]:
    """The translators of a folder of them (see `energy.folders`), of a run folder of launch/train_energy.py, whose
    configuration names its autoencoder, or of a folder of weights together with `autoencoder` (a folder of weights or a
    pretraining run). Each of them may be an id on the Hub."""
    if hub.is_hub_id(energy):
        fetched = hub.fetch(str(energy))
        if is_translator_folder(fetched):
            return read_translators(energy, autoencoder)
        energy = fetched
    if is_translator_folder(Path(energy)):
        return read_translators(energy, autoencoder)
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
    translators = load_translators(pretrained.find_folder(autoencoder), folder)
    for translator in translators:
        translator.origin = Path(energy)
    return translators


def open_translator(
    energy: str | Path, autoencoder: str | Path | None = None, *, to: str | None = None, source: str | None = None
) -> Translator:
    """The only translator of an energy (see `open_translators`), or the one from `source` `to` a domain."""
    return choose_translator([energy], autoencoder, to, source)


def choose_translator(
    energies: Sequence[str | Path], autoencoder: str | Path | None, to: str | None, source: str | None = None
) -> Translator:
    """The translator among those of `energies` that goes `to` a domain, from `source` where several go there; both
    may be None where there is only one."""
    found = [translator for energy in energies for translator in open_translators(energy, autoencoder)]
    ways = [(t.energy.extra.get("source"), t.energy.extra.get("target")) for t in found]
    fitting = [
        translator
        for translator, (begin, end) in zip(found, ways, strict=True)
        if to in (None, end) and (source is None or begin in (None, source))
    ]
    if len(fitting) == 1:
        (chosen,) = fitting
        # An energy that goes there from any domain: from now on from this one.
        chosen.energy.extra = {**chosen.energy.extra, "source": chosen.energy.extra.get("source") or source}
        return chosen
    listed = ", ".join(f"{begin or 'any'} to {end or '?'}" for begin, end in ways)
    asked = " ".join(f"{option} {name}" for option, name in (("--from", source), ("--to", to)) if name is not None)
    if not fitting:
        raise UserError(f"{asked}: none of the energies goes there, they go: {listed}")
    needed = "--to" if to is None else "--from" if source is None else "only one of the energies"
    raise UserError(f"{asked + ': ' if asked else ''}several energies fit, they go: {listed}; give {needed}")
