"""The Hugging Face Hub: folders fetched by their id, folders sent. A path that exists never asks the network."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from letit_dist.errors import UserError

_WANTED = ("*.json", "*.safetensors", "*.md")


def looks_like_id(path: str | Path) -> bool:
    """Whether it is written as `owner/name`; it may be a path as well."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)))


def is_hub_id(path: str | Path) -> bool:
    """Whether this can only mean a repository of the Hub: `owner/name`, and neither it nor `owner` exists here."""
    return looks_like_id(path) and not Path(path).exists() and not Path(path).parent.exists()


def is_of_diffusers(folder: Path) -> bool:
    """Whether it holds a model or a pipeline as diffusers saves them."""
    with contextlib.suppress(OSError, ValueError):
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(tree, dict) and "_class_name" in tree
    return (folder / "model_index.json").is_file()


def advice(repo_id: str) -> str:
    """How to fetch a repository by hand. Not into a folder called as its owner, whose other ids would then be paths."""
    folder = f"models/{repo_id.partition('/')[2]}"
    return f"run `hf download {repo_id} --local-dir {folder}` where there is a network, and name {folder}"


def fetch(repo_id: str) -> Path:
    """The local folder of a repository, downloaded or from huggingface_hub's cache.

    Raises UserError in one line: where it cannot be reached, what to download and where to put it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_WANTED)))
    except (GatedRepoError, RepositoryNotFoundError):
        raise UserError(
            f"{repo_id}: no such folder here, and no repository of that name on the Hub that is open to you "
            "(for a private one: hf auth login)"
        ) from None
    except Exception as error:  # a network fails in as many ways as there are libraries below
        raise UserError(
            f"{repo_id}: no such folder here, and the Hub cannot be asked for it ({_first_line(error)}): "
            f"{advice(repo_id)} (config.json and the weights) in its place"
        ) from None


def push(save: Callable[[Path], object], repo_id: str, *, private: bool = True) -> str:
    """Send what `save(folder)` writes to a repository, which is made if there is none; returns its address."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "folder"
        save(folder)
        api = HfApi()
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload by letit_dist")
        except Exception as error:  # as above
            raise UserError(
                f"cannot send {repo_id} to the Hub ({_first_line(error)}): save_pretrained makes the same folder here, "
                f"and `hf auth login`, then `hf upload {repo_id} FOLDER` sends it"
            ) from None
    return str(address)


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
