"""Loader processes that die, and errors of our own that pass through them."""

import multiprocessing
import os
import signal

import pytest
import torch

from letit_dist.data.loading import loader, unwrap


class Numbers:
    """Its number 30 cannot be had."""

    def __getitem__(self, number):
        if number == 30:
            raise ConnectionError("of its own")
        return torch.full((3,), number)


def test_a_killed_loader_process_is_named():
    items = unwrap(iter(loader(Numbers(), range(30), 1)))
    assert next(items).tolist() == [0, 0, 0]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        list(items)


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), EOFError(), FileNotFoundError("no socket")])
def test_one_that_dies_while_it_hands_over_a_batch_as_well(monkeypatch, error):
    """A race that cannot be had at will: a batch in the queue whose memory the dead process was to pass on."""

    def broken():
        raise error

    items = iter(loader(Numbers(), range(30), 1))
    monkeypatch.setattr(items, "_next_data", broken)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker ended with a batch on its way"):
        next(unwrap(items))


@pytest.mark.parametrize(("workers", "says"), [(0, "^of its own$"), (1, "^Caught ConnectionError in DataLoader")])
def test_other_errors_stay_what_they_are(workers, says):
    with pytest.raises(ConnectionError, match=says):
        list(unwrap(iter(loader(Numbers(), range(40), workers))))
