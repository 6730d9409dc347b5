"""Unpaired image-to-image translation by latent energy transport (LETIT, arXiv 2012.00649).

import letit_dist
from PIL import Image

translator = letit_dist.Translator.from_pretrained("runs/cats2dogs")
picture = letit_dist.translate_picture(translator, Image.open("cat.jpg"), strength=0.8)
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from letit_dist.autoencoders.base import Autoencoder, load_autoencoder
    from letit_dist.cards import Card
    from letit_dist.energy.folders import save_translators
    from letit_dist.energy.models import EnergyModel, load_energy
    from letit_dist.energy.translate import Translator
    from letit_dist.errors import UserError
    from letit_dist.evaluation.translating import translate_picture

# Loaded at first use, so that importing the package imports no torch.
_HOMES = {
    "Autoencoder": "autoencoders.base",
    "Card": "cards",
    "EnergyModel": "energy.models",
    "Translator": "energy.translate",
    "UserError": "errors",
    "load_autoencoder": "autoencoders.base",
    "load_energy": "energy.models",
    "save_translators": "energy.folders",
    "translate_picture": "evaluation.translating",
}
__all__ = [
    "Autoencoder",
    "Card",
    "EnergyModel",
    "Translator",
    "UserError",
    "__version__",
    "load_autoencoder",
    "load_energy",
    "save_translators",
    "translate_picture",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
