import numpy as np
import pytest

from letit_dist.data.order import permutation, rank_positions, sample_at
from letit_dist.errors import UserError


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_an_epoch_has_each_sample_once(count):
    for epoch in range(3):
        assert sorted(permutation(5, epoch, count)) == list(range(count))


def test_orders_differ_by_seed_epoch_and_purpose_and_never_change():
    orders = [permutation(*args) for args in [(0, 0, 50), (1, 0, 50), (0, 1, 50), (0, 0, 50, "source")]]
    assert len({tuple(order) for order in orders}) == 4
    # The value itself is a promise: a run resumed years later must meet the same order.
    assert permutation(0, 0, 8).tolist() == [2, 6, 7, 3, 4, 5, 0, 1]


def test_order_looks_random():
    order = permutation(3, 0, 100_000)
    # Neighbours in the epoch are unrelated, and no slot prefers low samples.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(order[:10_000].mean() / 100_000 - 0.5) < 0.02
    assert abs(np.corrcoef(order, permutation(3, 1, 100_000))[0, 1]) < 0.02


def test_the_stream_runs_across_epoch_ends():
    samples = sample_at(np.arange(30), 1, 10)
    for epoch in range(3):
        assert samples[epoch * 10 : epoch * 10 + 10].tolist() == permutation(1, epoch, 10).tolist()
    # Slicing the stream anywhere gives the same samples, also when a batch holds several epochs.
    assert (
        np.concatenate([sample_at(np.arange(a, a + 7), 1, 10) for a in range(0, 28, 7)]).tolist()
        == samples[:28].tolist()
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batch(world):
    parts = [rank_positions(100, 8, rank, world) for rank in range(world)]
    assert np.concatenate(parts).tolist() == list(range(100, 108))


def test_uneven_batch_is_refused():
    with pytest.raises(UserError, match="batch of 10 cannot be dealt to 4 ranks"):
        rank_positions(0, 10, 0, 4)


def test_cached_orders_cannot_be_spoilt():
    with pytest.raises(ValueError):
        permutation(0, 0, 8)[0] = 1
