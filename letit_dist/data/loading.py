"""Loader processes: whole items, signals left to the main process, and errors that come out as what they were."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from letit_dist.errors import UserError


@dataclass
class Failure:
    """A UserError on its way out of a loader process, which would bury it in a traceback."""

    message: str


def _same(item: Any) -> Any:
    return item


def _quiet(_: int) -> None:
    """Ctrl-C, and SIGTERM to the whole process group (Slurm, torchrun), are for the main process to answer.

    A worker that SIGTERM ended would break the run before it has saved itself: torch raises in the main process,
    wherever that is. The parent's own SIGTERM, at its end, still ends a worker: hence the look at the sender.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def unwrap(items: Iterator[Any]) -> Iterator[Any]:
    """Pass items on, raising a `Failure` as the UserError it was.

    A loader process that has died is a RuntimeError "DataLoader worker ...", as torch has it, also where torch does not
    notice: tensors are fetched from the process that made them, and there nobody answers.
    """
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if not getattr(items, "_num_workers", 0) or str(error).startswith("Caught "):  # raised in our own code
                raise
            raise RuntimeError(f"DataLoader worker ended with a batch on its way: {error}") from error
        if isinstance(item, Failure):
            raise UserError(item.message)
        yield item


def loader(dataset: Any, sampler: Any, workers: int, *, pin: bool = False) -> DataLoader[Any]:
    """A loader whose items are whole batches already."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pin and torch.cuda.is_available(),
        worker_init_fn=_quiet,
        prefetch_factor=4 if workers else None,
    )
