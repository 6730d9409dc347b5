"""What ranks tell each other beside gradients: sums in place, and how seldom."""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_alae_trainer, tiny_trainer

from letit_dist.training import trainer as training
from letit_dist.training.exchange import Exchange, unusable

CPU = torch.device("cpu")


def exchange(rank: int, losses: list[float], *, ranks: int, sums=()) -> Exchange:
    """With a limit of 2 and two flags, 1 and the rank."""
    return Exchange([torch.tensor(v) for v in losses], 2.0, [1.0, rank], sums, ranks=ranks, device=CPU)


def mine(rank: int) -> list[torch.Tensor]:
    return [
        torch.arange(6.0).view(2, 3).t() * (rank + 1),
        torch.full((2, 1), 1e-9 + rank, dtype=torch.float64),
    ]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sums = mine(rank)
    # The second is begun before the first is read, as phases may, and has nothing beside its numbers.
    first = exchange(rank, [1.0, math.nan] if rank else [1.0], ranks=2, sums=sums)
    second = exchange(rank, [2.5, -math.inf], ranks=2)
    torch.save({"second": second.wait(), "first": first.wait(), "sums": sums}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_every_rank_has_the_sums_of_all(tmp_path):
    other = multiprocessing.get_context("spawn").Process(target=_rank, args=(1, str(tmp_path)))
    other.start()
    _rank(0, str(tmp_path))
    other.join(60)
    assert other.exitcode == 0
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["first"] == [1.0, 2.0, 1.0] and found["second"] == [4.0, 2.0, 1.0]
        assert torch.equal(found["sums"][0], torch.arange(6.0).view(2, 3).t() * 3)
        # What float32 would drop is there.
        assert (
            found["sums"][1].shape == (2, 1) and found["sums"][1].tolist() == [[pytest.approx(1 + 2e-9, abs=1e-15)]] * 2
        )


def test_one_rank_keeps_what_it_has():
    sums = mine(1)
    before = [part.clone() for part in sums]
    assert exchange(1, [1.0, -3.0, math.nan], ranks=1, sums=sums).wait() == [2.0, 1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(sums, before, strict=True))


def test_a_loss_that_cannot_be_used():
    losses = (1.0, -3.0, math.nan, math.inf, -math.inf, 2.0)
    assert [unusable(loss, None) for loss in losses] == [False, False, True, True, True, False]
    assert [unusable(loss, 2.0) for loss in losses] == [False, True, True, True, True, False]


@pytest.mark.parametrize(("build", "phases"), [(tiny_trainer, 1), (tiny_alae_trainer, 3)])
def test_a_batch_has_one_exchange_a_phase_and_the_last_one_carries_the_sums(
    fruit_shards, fresh_accelerate, tmp_path, monkeypatch, build, phases
):
    made = []

    class Counted(Exchange):
        def __init__(self, losses, limit, flags, sums, **more):
            made.append([part.numel() for part in sums])
            super().__init__(losses, limit, flags, sums, **more)

    monkeypatch.setattr(training, "Exchange", Counted)
    trainer = build(tmp_path, fruit_shards, training={"microbatch": 2})
    batch = next(trainer.feed.batches(0, 8, 0, 1, trainer.recipe.levels[0].resolution))
    trainer.learn(batch)
    assert len(made) == phases and all(sizes == [] for sizes in made[:-1]) and len(made[-1]) == 2
