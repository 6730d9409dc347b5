"""Errors that a user can act on, and how the programs report them."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to change. Programs exit with code 2."""


def _let_others_speak() -> None:
    # Launchers end all ranks as soon as one has ended, also one that is about to say what went wrong.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(1.0)


def reports_errors(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a program's `main`: a `UserError` becomes lines on stderr and exit code 2, without a traceback;
    Ctrl-C where nothing else answers it becomes exit code 130."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            prefix = f"[rank {os.environ.get('RANK', '0')}] " if ranks > 1 else ""
            for line in str(error).splitlines():
                print(f"{prefix}error: {line}", file=sys.stderr, flush=True)
            _let_others_speak()
            return 2
        except SystemExit:
            _let_others_speak()
            raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            return 1

    return wrapped
