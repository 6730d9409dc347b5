"""What every autoencoder offers: images to latents and back, a fingerprint, and a folder to live in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from letit_dist import hub, pretrained, rng
from letit_dist.cards import Card
from letit_dist.config import StrictConfig, as_tree, parse_kind
from letit_dist.errors import UserError
from letit_dist.registry import AUTOENCODERS

A = TypeVar("A", bound="Autoencoder")


class AutoencoderConfig(StrictConfig):
    """What every autoencoder's config has: the name of its kind, and the side of its square images."""

    kind: str
    resolution: int = Field(gt=0, description="side of the images in pixels")


class Autoencoder(nn.Module):
    """Base of the autoencoders; a subclass registers itself with `@AUTOENCODERS.register(kind)`.

    A subclass sets `config_class`, `tiny` (the config that the tests of all kinds use: a small model that
    runs in milliseconds) and, in its __init__, `latent_shape`.
    """

    config_class: ClassVar[type[AutoencoderConfig]]
    tiny: ClassVar[AutoencoderConfig]
    stores_codes: ClassVar[bool] = False  # whether `encode_codes` and `latents_from_codes` exist
    needs: ClassVar[str | None] = None  # an optional library without which it cannot be built
    retrainable: ClassVar[frozenset[str]] = frozenset()  # keys of the config that the same weights may be given anew
    decodes_with_noise: ClassVar[bool] = False  # whether translations are decoded with the maps of `noise_shapes`

    config: AutoencoderConfig
    latent_shape: tuple[int, ...]

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.extra: dict[str, Any] = {}  # what the folder that this was read from holds beside the weights
        self.card: Card | None = None  # what its README.md says

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, *latent_shape)."""
        raise NotImplementedError

    def decode(
        self,
        latents: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents (B, *latent_shape) to images (B, 3, H, W), about in [-1, 1] and not clipped.

        Decoders that inject noise take it as `noise`, or draw it from `generator`, or leave it out; the others
        ignore both, so that callers need not ask which kind they hold.
        """
        raise NotImplementedError

    def noise_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each map of one sample's decoder noise, in the order of use; empty where `decode` takes none."""
        return []

    def decoder_noise(self, seed: int, places: Sequence[int] | Tensor) -> list[Tensor] | None:
        """The decoder's noise as a function of (seed, place of the sample), maps (B, *shape); None where
        translations are decoded without."""
        if not self.decodes_with_noise:
            return None
        device = next(self.parameters()).device
        # ALAE's published code shares its first map over the batch. Here every map belongs to its image, or a
        # picture would depend on its neighbours.
        shapes = enumerate(self.noise_shapes())
        return [rng.normal(shape, seed, f"decoder noise {i}", places, device=device) for i, shape in shapes]

    @property
    def codebook_size(self) -> int:
        """How many codes there are; only where `stores_codes`."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def encode_codes(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to integer maps by name, each (B, ...); only where `stores_codes`."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def latents_from_codes(self, codes: dict[str, Tensor]) -> Tensor:
        """The latents (B, *latent_shape) that `encode` gives for the images of these codes."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def recompute(self, side: int | None) -> None:
        """Training alone: let layers that work at `side` pixels or more forget their results, and compute them again
        in the backward pass. Less memory, more time, the same gradients. Raises UserError where a kind cannot."""
        if side is not None:
            raise UserError(f"training.recompute_from: {self.config.kind} keeps all its results; leave it out (null)")

    def check_images(self, images: Tensor) -> None:
        """Raise UserError unless `images` is (B, 3, resolution, resolution)."""
        side = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise UserError(
                f"{self.config.kind}: expected images of shape (B, 3, {side}, {side}), got {tuple(images.shape)}"
            )

    def check_latents(self, latents: Tensor) -> None:
        """Raise UserError unless `latents` is (B, *latent_shape)."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            expected = ", ".join(map(str, self.latent_shape))
            raise UserError(
                f"{self.config.kind}: expected latents of shape (B, {expected}), got {tuple(latents.shape)}"
            )

    def fingerprint(self) -> str:
        """16 hex digits that stand for the config and all weights, on any device and in any memory format.

        Encoded datasets and energies keep it, so that they are never used with another autoencoder.
        """
        return pretrained.tensors_fingerprint(as_tree(self.config), self.state_dict())

    def save_pretrained(self, folder: str | Path, *, card: Card | None = None, **extra: Any) -> None:
        """Write config.json and model.safetensors; `extra` (plain values) is kept in config.json, and with a
        `card` (or one that this was read with) there is a README.md."""
        card = card or self.card
        text = None if card is None else self._card_text(card, extra)
        pretrained.write_folder(folder, as_tree(self.config), self.state_dict(), extra, card=text)

    def push_to_hub(self, repo_id: str, *, card: Card | None = None, private: bool = True, **extra: Any) -> str:
        """Send what `save_pretrained` writes, `self.extra` included, to the Hugging Face Hub; returns its address."""
        kept, card = {**self.extra, **extra}, card or self.card or Card()
        return hub.push(lambda folder: self.save_pretrained(folder, card=card, **kept), repo_id, private=private)

    def _card_text(self, card: Card, extra: dict[str, Any]) -> str:
        facts = {
            "autoencoder": self.config.kind,
            "images": f"3 x {self.config.resolution} x {self.config.resolution}",
            "latents": " x ".join(map(str, self.latent_shape)),
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "fingerprint": self.fingerprint(),
            **{name: value for name, value in extra.items() if value is not None},
        }
        use = 'import letit_dist\n\nautoencoder = letit_dist.load_autoencoder("this folder, or its id on the Hub")'
        return card.text(f"{self.config.kind} autoencoder, {self.config.resolution} pixels", facts, use)

    @classmethod
    def from_pretrained(cls: type[A], folder: str | Path) -> A:
        """The model of a folder, of a run's newest export, or of an id on the Hub (see `pretrained.find_folder`);
        frozen and in eval mode, on the CPU; `extra` holds what was kept beside it.

        Raises UserError for a folder that is missing, damaged or changed, an unknown kind, another kind than
        this class, and for keys that are missing, left over or of another shape (all listed).
        """
        folder = pretrained.find_folder(folder)
        tree, tensors = pretrained.read_folder(folder)
        config = parse_kind(AUTOENCODERS, tree, str(Path(folder) / pretrained.CONFIG))
        model = build_autoencoder(config)
        if not isinstance(model, cls):
            raise UserError(f"{folder}: holds a {type(model).__name__} ({config.kind}), not a {cls.__name__}")
        pretrained.load_exactly(model, tensors, Path(folder) / pretrained.WEIGHTS)
        model.extra, model.card = pretrained.read_extra(folder), Card.read(folder)
        return model.eval().requires_grad_(False)

    def start_from(self, folder: str | Path) -> dict[str, str]:
        """Take over all weights and buffers of another autoencoder (a folder, a run or an id on the Hub) of the same
        architecture, so that training goes on from them; returns what names it, for `save_pretrained`.

        Keys in `retrainable` may differ. Raises UserError, before anything is changed, as `from_pretrained` does, and
        for another architecture.
        """
        found = pretrained.find_folder(folder)
        tree, tensors = pretrained.read_folder(found)
        config = parse_kind(AUTOENCODERS, tree, str(found / pretrained.CONFIG))
        theirs, own = as_tree(config), as_tree(self.config)
        if config.kind != self.config.kind:
            different = [f"it is a {config.kind}, autoencoder.kind is {self.config.kind}"]
        else:
            changed = [key for key in own if theirs[key] != own[key] and key not in self.retrainable]
            different = [f"autoencoder.{key} is {theirs[key]} there and {own[key]} here" for key in changed]
        if different:
            raise UserError(f"start_from: the weights in {folder} are of another architecture: {', '.join(different)}")
        pretrained.load_exactly(self, tensors, found / pretrained.WEIGHTS)
        return {"parent": str(folder), "parent_fingerprint": pretrained.tensors_fingerprint(tree, tensors)}


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """A new model with random weights, of the class that `config.kind` names."""
    return AUTOENCODERS.get(config.kind)(config)


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The autoencoder of a folder, a run or an id on the Hub, of whatever kind; see `Autoencoder.from_pretrained`."""
    return Autoencoder.from_pretrained(folder)
