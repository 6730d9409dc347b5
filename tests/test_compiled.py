"""A line when kernels are compiled, once, and none when they were compiled before."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

KERNELS = """
from numba import njit
from letit_dist.compiled import has_numba

once = njit(cache=True)(lambda x: x + 1)
again = njit(cache=True)(lambda x: x + 2)
assert has_numba()
once(1), again(1)
"""


def compile_kernels(folder, **environment):
    (folder / "kernels.py").write_text(KERNELS)
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache"), **environment}
    done = subprocess.run([sys.executable, folder / "kernels.py"], env=env, capture_output=True, text=True, check=True)
    return done.stderr


def test_compiling_is_said_once_and_only_when_it_is_done(tmp_path):
    assert compile_kernels(tmp_path).startswith("compiling kernels for this processor, once")
    assert "compiling" not in compile_kernels(tmp_path)


def test_kernels_are_there_without_a_place_for_a_cache(tmp_path):
    """As in an installation that is read-only, for a user without a home."""
    code = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import torch
from letit_dist import narrow
one = torch.ones(4, 4)
print(narrow.contrastive_step(one, one, one, one[0], one[0], slope=0.2, length=0.1, steps=1)[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    target, translated, moved = json.loads(done.stdout)
    # Four units of 4 + 1 each; every step moves each of four coordinates by 0.1 * 4.
    assert target == pytest.approx(20) and moved == pytest.approx(0.4) and translated == pytest.approx(20 - 4 * 1.6)


def test_of_several_ranks_one_says_it(tmp_path):
    assert compile_kernels(tmp_path, RANK="0").count("compiling") == 1
    (tmp_path / "other").mkdir()
    assert "compiling" not in compile_kernels(tmp_path / "other", RANK="1")
