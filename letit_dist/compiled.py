"""Kernels of numba: whether it is there, how they are kept, and a line when they are compiled."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


@functools.cache
def has_numba() -> bool:
    """Whether kernels can be compiled; the first time that this process does so a line on stderr says it."""
    if sys.platform != "linux":
        return False  # of those that have threads, these are not torch's there
    try:
        event = importlib.import_module("numba.core.event")
    except ImportError:  # not there, or one that does not know this numpy
        return False
    _say_when_compiling(event)
    return True


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba's njit, kept on disk; where no folder can be written to, each process compiles anew."""
    njit = importlib.import_module("numba").njit

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            compiled: Callable[..., Any] = njit(cache=True, **options)(function)
        except RuntimeError:  # no place for a cache
            compiled = njit(**options)(function)
        return compiled

    return decorate


def _say_when_compiling(event: Any) -> None:
    """Kernels that are found in numba's cache cause no such event."""

    class Notice(event.Listener):
        def __init__(self) -> None:
            self.said = False

        def on_start(self, _: Any) -> None:
            if not self.said and os.environ.get("RANK", "0") == "0":
                print("compiling kernels for this processor, once: up to half a minute", file=sys.stderr, flush=True)
            self.said = True

        def on_end(self, _: Any) -> None:
            pass

    event.register("numba:compile", Notice())
