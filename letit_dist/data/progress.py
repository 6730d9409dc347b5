"""A bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """Counts up to `total` on stderr; a context manager."""

    def __init__(self, label: str, total: int, *, done: int = 0, every: float = 5.0):
        self.label, self.total, self.first, self.done = label, total, done, done
        self.every, self.begun = every, time.monotonic()
        self.last = self.begun
        self._bar: tqdm[NoReturn] | None = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, unit="img", smoothing=0.1)

    def step(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            rate = (self.done - self.first) / (self.last - self.begun)
            left = (self.total - self.done) / rate if rate else 0
            pace = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
            print(f"{self.label}: {self.done}/{self.total}, {pace}/s, {left:.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.close()
