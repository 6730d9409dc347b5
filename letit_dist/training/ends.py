"""How a run ends before its time: asked to by a signal, left by a rank or a reader, or because of what it found."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from letit_dist.errors import UserError
from letit_dist.training.checkpoint import CheckpointStore

# What a collective says when another rank has died or does not answer.
_LOST = re.compile(
    "timed? ?out|connection (closed|reset|refused)|broken pipe|no such process|socket"
    # NCCL
    "|remote process exit|communicator was aborted|ncclRemoteError|ncclSystemError",
    re.IGNORECASE,
)

REPORT = 3.0  # seconds that ranks which were left have to say so: they notice it at about the same time


class StopSignals:
    """SIGTERM, SIGUSR1 and the first Ctrl-C ask for a checkpoint and a clean stop; a second Ctrl-C ends.

    A context: the handlers of before are back after it; but not after an error where `several` ranks run, since their
    launcher sends SIGTERM to those that are about to say what they have lost.
    """

    def __init__(self, several: bool = False) -> None:
        self.asked = False
        self._several = several

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> StopSignals:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._several:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Problems:
    """What one rank finds that ends the run: told to all with the next exchange, and said by that rank.

    A file that cannot be written ends it no sooner than the checkpoint of the same batch is there.
    """

    def __init__(self, store: CheckpointStore, saved: Callable[[], str]):
        """`saved` says which checkpoint is the newest."""
        self.first: UserError | None = None
        self._store, self._saved = store, saved

    def there_are(self, of_data: str | None) -> bool:
        """Whether this rank knows of any; `of_data` is what the batch says of the data."""
        if of_data and not self.first:
            self.first = UserError(f"{of_data} ({self._saved()})")
        return self.first is not None or self._store.failed

    @contextlib.contextmanager
    def writing(self, what: Path) -> Iterator[None]:
        """While a file is written beside the checkpoints."""
        try:
            yield
        except OSError as error:
            self.first = UserError(f"cannot write {what}: {error.strerror or error} ({self._saved()})")

    def end(self) -> NoReturn:
        """End this rank, which says so where the problem is its own."""
        if self.first:
            raise self.first
        self._store.wait()
        raise SystemExit(2)  # the rank that has the problem prints the line

    def add_to(self, error: UserError) -> None:
        """Raise `error` with what has gone wrong in the background meanwhile, if anything has."""
        try:
            self._store.wait()
        except UserError as also:
            raise UserError(f"{error}\n{also}") from error


def why_it_ended(error: RuntimeError, rank: int, ranks: int, where: str, goes_on: str) -> str | None:
    """The line for a run that a loader's worker or the other ranks have left; None for any other error."""
    reason = " ".join(str(error).split())[:200]
    if reason.startswith("DataLoader worker"):
        return f"a loader worker ended {where} ({reason}): where memory was short, lower data.workers; {goes_on}"
    if ranks == 1 or not _LOST.search(reason):
        return None
    said = "What a rank that ended has said stands in its own lines"
    silent = ", ".join(map(str, silent_ranks(rank, ranks)))
    if silent:
        said = f"No word in {REPORT:.0f} s from rank {silent}: hanging, gone, or busy. {said}"
    return f"lost the other ranks {where} ({reason}); {goes_on}. {said}"


def silent_ranks(rank: int, ranks: int) -> list[int]:
    """The ranks that do not say, in a few seconds, that they too were left: those that hang, are gone, or have not yet
    noticed. Empty where it cannot be known.

    Asked through the store in which the ranks have met, which needs no collective and costs nothing before a fault.
    """
    silent = [other for other in range(ranks) if other != rank]
    asked: list[bool] = []

    def ask() -> None:
        key = f"letit_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/left"
        with contextlib.suppress(RuntimeError, ValueError):  # the store ends with the process that holds it
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"{key}/{rank}", "")
            until = time.monotonic() + REPORT
            while silent and time.monotonic() < until:
                time.sleep(0.1)
                silent[:] = [other for other in silent if not store.check([f"{key}/{other}"])]
            asked.append(True)

    # In a thread: without a launcher the store is rank 0's, and where that one hangs, it never answers.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REPORT + 2)
    if thread.is_alive():
        return [0]
    return silent if asked else []
