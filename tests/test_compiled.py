"""A line when kernels are compiled, once, and none when they were compiled before."""

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


def test_of_several_ranks_one_says_it(tmp_path):
    assert compile_kernels(tmp_path, RANK="0").count("compiling") == 1
    (tmp_path / "other").mkdir()
    assert "compiling" not in compile_kernels(tmp_path / "other", RANK="1")
