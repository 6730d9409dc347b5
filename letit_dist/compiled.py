"""Whether numba is there to compile kernels, and a line when it does."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any


@functools.cache
def has_numba() -> bool:
    """Whether kernels can be compiled; the first time that this process does so a line on stderr says it."""
    if sys.platform != "linux":
        return False  # its threads are not torch's there
    try:
        event = importlib.import_module("numba.core.event")
    except ImportError:  # not there, or one that does not know this numpy
        return False
    _say_when_compiling(event)
    return True


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
