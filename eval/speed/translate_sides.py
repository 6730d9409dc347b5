"""Both sides of `throughput.py translate` and `decode`: written plainly, and as the programs do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from letit_dist.data.inputs import open_images
from letit_dist.data.transforms import decode, to_images
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation.benchmark import clock
from letit_dist.evaluation.translating import TranslateOptions, translate_all
from letit_dist.memory import Precision
from speed.agreement import apart, compile_methods, full_precision, require_agreement
from speed.models import in_float64
from speed.naive_autoencoders import NaiveAutoencoder
from speed.naive_energy import NaiveEnergy

# Relative, of the result: networks as deep as these lose this much to float32, and in float64 they agree to 1e-9.
TOLERANCE, EXACT = 1e-3, 1e-8


def device_of() -> torch.device:
    """Where the programs would work, unless --device says cpu."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true" or not torch.cuda.is_available()
    return torch.device("cpu" if on_cpu else "cuda")


class FrozenSides:
    """A translator and its plain counterpart on the same weights."""

    def __init__(self, translator: Translator, device: torch.device):
        self.translator, self.device = translator.to(device), device
        self.naive = NaiveAutoencoder(translator.autoencoder)

    def held(self) -> Iterator[Tensor]:
        """What lives between two runs of ours."""
        yield from self.translator.autoencoder.state_dict().values()
        yield from self.translator.energy.state_dict().values()

    def prepare(self, precision: Precision, compiler: str | None, *, plain: bool) -> None:
        """What both are timed in; with `plain` the naive side stays in float32 and is not compiled."""
        self.translator.precision = precision
        network = self.translator.autoencoder
        if compiler:
            compile_methods(network, "encode", "decode", backend=compiler)
        if plain:
            return
        self.naive.precision = precision
        if compiler:
            compile_methods(self.naive, "encode", "decode", backend=compiler)


class DecodeSides(FrozenSides):
    """Decoding of a batch of latents of random images."""

    def __init__(self, translator: Translator, device: torch.device, *, batch: int, seed: int = 0):
        super().__init__(translator, device)
        network = translator.autoencoder
        shape = (batch, *network.latent_shape)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.latents = latents.to(device)
        self.noise = network.decoder_noise(seed, range(batch))

    def run_naive(self) -> Tensor:
        return self.naive.decode(self.latents, self.noise)

    def run_ours(self) -> Tensor:
        return self.translator.decode(self.latents, noise=self.noise)

    def compare(self) -> dict[str, float]:
        """The relative difference of the batch in float32, and of one image in float64; UserError beyond what rounding
        explains."""
        twin = in_float64(self.translator)
        one, noise = self.latents[:1].double(), self.noise and [each[:1].double() for each in self.noise]
        exact = {"float64": apart(twin.decode(one, noise=noise), NaiveAutoencoder(twin.autoencoder).decode(one, noise))}
        require_agreement(exact, EXACT)
        found = {"float32": apart(self.run_ours(), self.run_naive())}
        require_agreement(found, TOLERANCE)
        return {**exact, **found}


class TranslateSides(FrozenSides):
    """Translating a folder of pictures into another, reading and writing included.

    Plainly: an image is read, encoded, moved, decoded and written before the next one; the chain goes through autograd
    on parameters that require gradients, as a loop does that freezes nothing.
    """

    def __init__(self, translator: Translator, folder: Path, device: torch.device, *, images: int, batch: int):
        super().__init__(translator, device)
        self.folder, self.options = folder, TranslateOptions(batch=batch)
        self.side = translator.autoencoder.config.resolution
        self.source = make_pictures(folder / "source", self.side, images)
        self.chain = _naive_chain(translator)

    def prepare(self, precision: Precision, compiler: str | None, *, plain: bool) -> None:
        super().prepare(precision, compiler, plain=plain)
        self.chain.precision = "fp32" if plain else precision

    def run_ours(self) -> None:
        """As launch/translate.py."""
        for _ in translate_all(
            self.translator, open_images(self.source, self.side), self.folder / "ours", self.options
        ):
            pass

    def run_naive(self) -> None:
        """Image by image."""
        (self.folder / "naive").mkdir(exist_ok=True)
        for place, path in enumerate(sorted(self.source.iterdir())):
            with Image.open(path) as picture:
                pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(self.device)
            images = self.one(to_images(pixels), place)
            made = images.add(1).mul(127.5).round().clamp(0, 255).byte()[0].permute(1, 2, 0).cpu().numpy()
            Image.fromarray(made).save(self.folder / "naive" / f"{path.stem}.png")

    def one(self, images: Tensor, place: int) -> Tensor:
        """Images (1, 3, H, W) to their translation, plainly."""
        noise = self.translator.autoencoder.decoder_noise(self.options.seed, [place])
        return self.naive.decode(self.chain.chain(self.naive.encode(images)), noise)

    def held_naive(self) -> Iterator[Tensor]:
        """What lives between two runs of the naive side."""
        yield from self.naive.held()
        yield from self.chain.weights.values()

    # ---------------------------------------------------------------- agreement

    def compare(self) -> dict[str, float]:
        """Relative differences of latents, chains and images of the first picture in float64, and the share of pixel
        values in all files that differ by more than one of 255; UserError beyond what rounding explains."""
        twin = in_float64(self.translator)
        plain, chain = NaiveAutoencoder(twin.autoencoder), _naive_chain(twin)
        first = to_images(decode(min(self.source.iterdir()).read_bytes())[None].to(self.device)).double()
        noise = twin.autoencoder.decoder_noise(self.options.seed, [0])
        result = twin.translate(first, decoder_noise=noise)
        latents = plain.encode(first)
        moved = chain.chain(latents)
        found = {
            "latents": apart(result.source_latents, latents),
            "chains": apart(result.latents, moved),
            "images": apart(result.images, plain.decode(moved, noise)),
        }
        require_agreement(found, EXACT)
        with full_precision(self.translator, self.naive, self.chain):
            self.run_ours()
            self.run_naive()
        # A code of VQ-VAE-2 whose two nearest entries are equally near is another one after rounding.
        files = {"files": self._differing()}
        require_agreement(files, 0.01)
        return {**found, **files}

    def _differing(self) -> float:
        written = [{path.name for path in (self.folder / side).iterdir()} for side in ("ours", "naive")]
        if written[0] != written[1]:
            raise UserError("the two sides disagree: they wrote different files")
        shares = []
        for name in written[0]:
            ours, naive = (decode((self.folder / side / name).read_bytes()).int() for side in ("ours", "naive"))
            shares.append(float(((ours - naive).abs() > 1).float().mean()))
        return max(shares)

    # ---------------------------------------------------------------- where the time goes

    def shares(self, repeats: int) -> dict[str, float]:
        """Seconds of encoding, of the chain and of decoding one full batch, each the least of `repeats`."""
        paths = sorted(self.source.iterdir())[: self.options.batch]
        images = to_images(torch.stack([decode(path.read_bytes()) for path in paths]).to(self.device))
        noise = self.translator.autoencoder.decoder_noise(self.options.seed, range(len(images)))
        latents = self.translator.encode(images)
        seconds = clock(self.device)
        work: dict[str, Callable[[], object]] = {
            "encode": lambda: self.translator.encode(images),
            "chain": lambda: self.translator.transport(latents),
            "decode": lambda: self.translator.decode(latents, noise=noise),
        }
        return {name: min(seconds(run) for _ in range(repeats)) / len(images) for name, run in work.items()}


def _naive_chain(translator: Translator) -> NaiveEnergy:
    config = translator.sampler.config
    return NaiveEnergy(
        translator.energy,
        steps=config.steps,
        step_size=config.step_size,
        frozen=False,
        **{"rate": 1.0, "eps": 1e-8, "decay": 0.5},  # nothing is trained here
        betas=(0.5, 0.999),
    )


def make_pictures(folder: Path, side: int, count: int, seed: int = 0) -> Path:
    """PNG files that are smooth with a little grain, as photographs are."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        coarse = torch.rand(1, 3, 8, 8, generator=generator) * 255
        smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)[0]
        grain = 3 * torch.randn(3, side, side, generator=generator)
        pixels = (smooth + grain).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return folder
