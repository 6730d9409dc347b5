"""Reading published files of weights without running what may be in them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from letit_dist.errors import UserError


class _Nothing:
    """Stands in for a class of somebody's training code, and keeps nothing of it."""

    def __setstate__(self, state: object) -> None:
        pass


def read_published(path: str | Path, *, keep: str = "", ignored: Sequence[str] = ()) -> Any:
    """What `torch.save` wrote, tensors and plain containers alone, on the CPU.

    Objects of the classes `ignored` (full names) are passed over. `keep` names the entry with the weights, for the
    message about files that hold more. Raises UserError for a file that is missing, damaged, or holds other objects.
    """
    try:
        with torch.serialization.safe_globals([(_Nothing, name) for name in ignored]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
        if not refused:
            raise UserError(f"{path} is damaged or not a file of torch.save") from None
        entry = f"['{keep}']" if keep else ""
        what = f"torch.load('{path}', 'cpu', weights_only=False){entry}"
        what = f"{{'{keep}': {what}}}" if keep else what
        raise UserError(
            f"{path} holds more than tensors and plain containers ({refused[1]}), which is not read, because "
            f"reading it can run any code. Where you trust the file, keep its weights alone, with the code that it "
            f"needs on the PYTHONPATH: python -c \"import torch; torch.save({what}, 'weights.pth')\""
        ) from None
    except Exception as error:  # a file cut or overwritten anywhere raises almost anything
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise UserError(f"{path} is damaged or not a file of torch.save: {reason}") from None


def state_dict(found: Any, where: str | Path) -> dict[str, Tensor]:
    """`found` if it is a state dict, without the prefix that DataParallel and DistributedDataParallel add."""
    if not isinstance(found, dict) or not all(isinstance(item, Tensor) for item in found.values()):
        keys = f" with keys {', '.join(map(str, list(found)[:8]))}" if isinstance(found, dict) else ""
        raise UserError(f"{where}: expected a state dict, found a {type(found).__name__}{keys}")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file of torch.save, or of a safetensors file if it is called so; on the CPU."""
    if Path(path).suffix != ".safetensors":
        return state_dict(read_published(path), path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
