#!/usr/bin/env python3
"""Runs a program with this rank held to a core of its own, as where every rank has one.

accelerate launch eval/speed/own_core.py launch/pretrain.py CONFIG ...

Without a launcher OWN_CORE says which.
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    cores = sorted(os.sched_getaffinity(0))
    place = os.environ.get("LOCAL_RANK") or os.environ.get("OWN_CORE", "0")
    os.sched_setaffinity(0, {cores[int(place) % len(cores)]})
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
