"""Errors that a user can act on, and how the programs report them."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import ParamSpec

from letit_dist.ranks import launched_ranks

P = ParamSpec("P")


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to change. Programs exit with code 2."""


def _let_others_speak() -> None:
    # Launchers end all ranks as soon as one has ended, also one that is about to say what went wrong.
    if launched_ranks() > 1:
        time.sleep(1.0)


def _leave_ranks() -> None:
    """End the threads of the process group while the interpreter is whole.

    They may still hold tensors of what all ranks have finished, and letting go of one later ends the process with
    SIGABRT, after all went well.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and launched_ranks() > 1 and distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # of another rank that has ended already: the work is done
            distributed.destroy_process_group()


def reports_errors(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a program's `main`: a `UserError` becomes lines on stderr and exit code 2, without a traceback;
    Ctrl-C where nothing else answers it becomes exit code 130."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            code = main(*args, **kwargs) or 0
            _leave_ranks()
            return code
        except UserError as error:
            prefix = f"[rank {os.environ.get('RANK', '0')}] " if launched_ranks() > 1 else ""
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
