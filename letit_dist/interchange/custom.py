"""Somebody's torch module and its file of weights to our folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from letit_dist.autoencoders.custom import CustomAutoencoder, CustomConfig
from letit_dist.config import parse_config
from letit_dist.pretrained import load_exactly
from letit_dist.published import read_tensors


def import_custom(path: str | Path | None, **settings: Any) -> CustomAutoencoder:
    """The module that `settings` (of `CustomConfig`) name, frozen, in eval mode, with the weights of a file.

    `path` None keeps the weights that the class comes with. Raises UserError for a class that cannot be had or fails
    on a grey image, and for keys missing, left over or mis-shaped.
    """
    model = CustomAutoencoder(parse_config(CustomConfig, settings)).eval().requires_grad_(False)
    # Kept, so that opening the folder needs no trial.
    model.config = model.config.model_copy(update={"latent_shape": model.latent_shape})
    if path is not None:
        load_exactly(model, {f"network.{name}": tensor for name, tensor in read_tensors(path).items()}, path)
    return model
