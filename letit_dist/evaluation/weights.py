"""The weight files that metrics need: what they are called, where to fetch them, and whether one is the right one.

Nothing is downloaded. A name that carries the first digits of the file's SHA-256, as torch.hub's do, says which file
is is meant; what the folder holds under that name is hashed before it is used. Of DINOv2 and CLIP no digits are known
here: whoever uses them says which ones the publisher's page shows, or the numbers are valid for nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from letit_dist.errors import UserError
from letit_dist.files import hash_file
from letit_dist.published import read_published, state_dict

ENVIRONMENT = "LETIT_WEIGHTS"
_TORCHVISION = "https://download.pytorch.org/models"
_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_LPIPS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"
_HUB = "https://huggingface.co"
_FORMATS = ("model.safetensors", "pytorch_model.bin")

State = Literal["good", "missing", "another", "unverified"]


@dataclass(frozen=True)
class WeightFile:
    """One file. `sha256` holds its first hex digits, or nothing where they are not known here; `below` is the folder
    in that of the weights where it lies."""

    key: str
    address: str
    sha256: str
    purpose: str
    below: str = ""

    @property
    def name(self) -> str:
        return self.below + self.address.rpartition("/")[2]


def _named(key: str, address: str, purpose: str) -> WeightFile:
    """A file whose name ends in the first digits of its hash."""
    digits = address.rpartition("-")[2].partition(".")[0]
    return WeightFile(key, address, digits, purpose)


def _on_hub(key: str, repository: str, file: str, purpose: str) -> WeightFile:
    """A file of the Hugging Face Hub, where all of them are called alike."""
    below = repository.rpartition("/")[2] + "/"
    return WeightFile(key, f"{_HUB}/{repository}/resolve/main/{file}", "", purpose, below)


FILES = {
    file.key: file
    for file in (
        _named("inception", f"{_FIDELITY}/weights-inception-2015-12-05-6726825d.pth", "FID, KID, precision, IS"),
        _named("inception-torchvision", f"{_TORCHVISION}/inception_v3_google-0cc3c7bd.pth", "FID as StarGAN v2 has it"),
        _named("lpips-alex", f"{_TORCHVISION}/alexnet-owt-7be5be79.pth", "LPIPS: backbone"),
        _named("lpips-vgg", f"{_TORCHVISION}/vgg16-397923af.pth", "LPIPS: backbone"),
        _named("lpips-squeeze", f"{_TORCHVISION}/squeezenet1_1-b8a52dc0.pth", "LPIPS: backbone"),
        # The package lpips brings these with it; the digits are those of its version 0.1.4.
        WeightFile("lpips-alex-head", f"{_LPIPS}/alex.pth", "df73285e35b22355", "LPIPS: linear head"),
        WeightFile("lpips-vgg-head", f"{_LPIPS}/vgg.pth", "a78928a0af1e5f0f", "LPIPS: linear head"),
        WeightFile("lpips-squeeze-head", f"{_LPIPS}/squeeze.pth", "4a5350f23600cb79", "LPIPS: linear head"),
        _on_hub("dinov2", "facebook/dinov2-large", "model.safetensors", "FD-DINOv2"),
        _on_hub("clip", "openai/clip-vit-large-patch14-336", "pytorch_model.bin", "CMMD"),
    )
}


def weights_folder(given: str | Path | None = None) -> Path:
    """Where the files lie: what was given, or $LETIT_WEIGHTS, or ~/.cache/letit_dist/weights."""
    chosen = given or os.environ.get(ENVIRONMENT) or "~/.cache/letit_dist/weights"
    return Path(chosen).expanduser()


def place_of(file: WeightFile, folder: Path) -> Path:
    """Where this file is looked for; the heads of LPIPS lie in the package, and the Hub has two formats."""
    if file.below:
        there = [path for name in _FORMATS if (path := folder / file.below / name).is_file()]
        return there[0] if there else folder / file.name
    if not file.key.endswith("-head") or (folder / file.name).is_file():
        return folder / file.name
    from importlib.util import find_spec

    package = find_spec("lpips")
    return (Path(package.origin).parent / "weights" / "v0.1" if package and package.origin else folder) / file.name


def state_of(file: WeightFile, folder: Path) -> tuple[State, str]:
    """The state of a file, and its SHA-256 if it is there."""
    path = place_of(file, folder)
    if not path.is_file():
        return "missing", ""
    found = hash_file(path)
    if not file.sha256:
        return "unverified", found
    return ("good" if found.startswith(file.sha256) else "another"), found


def missing_line(key: str, folder: Path) -> str:
    """What to do about a file that is not there."""
    file = FILES[key]
    return (
        f"{file.name} is needed ({file.purpose}) and is not in {folder}: fetch {file.address} and put it there, or "
        "name its folder with --weights; nothing is downloaded"
    )


def find_weights(key: str, folder: Path, vouched: str | None = None) -> tuple[Path, str]:
    """Path and SHA-256 of a file; UserError that says where to fetch it and where to put it, or what is wrong.

    `vouched` are the first digits, from the publisher, of a hash that is not known here.
    """
    file = FILES[key]
    state, found = state_of(file, folder)
    path = place_of(file, folder)
    if vouched and file.sha256:
        raise UserError(f"--weights-sha256: the hash of {file.name} is known and always checked; leave it out")
    if vouched and not re.fullmatch(r"[0-9a-f]{8,64}", vouched):
        raise UserError(f"--weights-sha256 {vouched}: expected 8 to 64 hex digits, those of {file.address}")
    if state == "missing":
        raise UserError(missing_line(key, folder))
    expected = file.sha256 or vouched or ""
    if not found.startswith(expected):
        raise UserError(
            f"{path}: its sha256 begins {found[: len(expected)]}, that of {file.name} begins {expected}: cut "
            f"short, or another file; fetch {file.address} again"
        )
    return path, found


def import_weights(paths: Sequence[Path], folder: Path) -> list[str]:
    """Copy files that are recognised by their hash, whatever they are called, into `folder`; one line for each.

    Raises UserError, before anything is copied, for those that are none of ours; and for a folder that takes none.
    """
    wanted, problems = [], []
    for path in paths:
        if not path.is_file():
            problems.append(f"no such file: {path}")
            continue
        digest = hash_file(path)
        match = [file for file in FILES.values() if file.sha256 and digest.startswith(file.sha256)]
        if match:
            wanted.append((path, match[0]))
            continue
        named = [file for file in FILES.values() if file.name == path.name]
        expected = f", {path.name} begins {named[0].sha256}" if named else ""
        problems.append(
            f"{path}: sha256 {digest[:16]}... is none of the known files{expected}; see eval/weights.py list"
        )
    if problems:
        raise UserError("\n".join(problems))
    lines = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, file in wanted:
            beside = folder / f".{file.name}.part"
            shutil.copyfile(path, beside)
            os.replace(beside, folder / file.name)
            lines.append(f"{file.key}: {path} -> {folder / file.name}")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; name another --weights") from None
    return lines


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file; UserError for what is damaged or holds something else."""
    if path.suffix != ".safetensors":
        return state_dict(read_published(path), path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, or is no weights file: {error}") from None
