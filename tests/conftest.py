"""Fixtures that several test files share. Everything is drawn on the fly; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fruit_shards(tmp_path_factory) -> Path:
    """A folder with {apple,orange}/{train,test}: the built-in fruit at 32 pixels, 24 and 8 pictures a style.

    Shared by the whole session: read it, never write into it.
    """
    from letit_dist.data.packing import PackOptions, pack
    from letit_dist.data.sources import Request, open_source

    folder = tmp_path_factory.mktemp("fruit")
    for part in open_source("builtin:fruit", Request(resolution=32, count=24, test=8, seed=0)):
        pack(part, folder, PackOptions(resolution=32))
    return folder


@pytest.fixture
def fresh_accelerate():
    """A function that forgets accelerate's singletons: call it before every `Accelerator` of a test.

    It is called before and after the test as well, so that no test sees what another one set up.
    """
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield reset
    reset()
