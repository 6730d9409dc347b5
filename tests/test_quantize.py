"""The codebook: against the one-hot formulas, and the same for every division of a batch."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from letit_dist import rng
from letit_dist.autoencoders.quantize import BatchPlace, Quantizer

CODES, DIM, SIDE, BATCH = 6, 3, 4, 8


def make(dtype=torch.float64, seed=0, **options) -> Quantizer:
    torch.manual_seed(seed)
    return Quantizer(CODES, DIM, **options).to(dtype)


def maps(seed: int, batch: int = BATCH, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, DIM, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive_codes(embed, z):
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    return rows, ((rows[:, None] - embed[None]) ** 2).sum(2).argmin(1)


def test_forward_against_one_hot_formulas():
    quantizer = make()
    z = maps(1).requires_grad_()
    quantised, commitment, codes = quantizer(z)
    rows, nearest = naive_codes(quantizer.embed, z.detach())
    assert torch.equal(codes.flatten(), nearest)
    expected = F.one_hot(nearest, CODES).double() @ quantizer.embed
    assert torch.equal(quantised.detach().permute(0, 2, 3, 1).reshape(-1, DIM), expected)
    torch.testing.assert_close(commitment, ((expected - rows) ** 2).mean(), rtol=1e-12, atol=0)
    up = maps(2)
    (quantised * up).sum().backward()
    assert torch.equal(z.grad, up)  # straight-through: as if the quantiser were the identity
    z.grad = None
    quantizer(z)[1].backward()
    expected_grad = 2 * (z.detach() - quantised.detach()) / z.numel()
    torch.testing.assert_close(z.grad, expected_grad, rtol=1e-12, atol=1e-15)
    assert torch.equal(quantizer.lookup(z), codes)
    assert torch.equal(quantizer.embed_codes(codes), quantised)


@pytest.mark.parametrize("micro", [8, 4, 1])
def test_update_against_one_hot_formulas(micro):
    quantizer = make(decay=0.9)
    embed, counts, sums = quantizer.embed.clone(), torch.zeros(CODES).double(), quantizer.embed.clone()
    for step in range(3):
        z = maps(10 + step)
        before = quantizer.embed.clone()
        for part in z.split(micro):
            quantizer(part, collect=True)
        assert torch.equal(quantizer.embed, before)  # nothing moves before update
        stats = quantizer.update()
        rows, nearest = naive_codes(embed, z)
        hot = F.one_hot(nearest, CODES).double()
        counts = 0.9 * counts + 0.1 * hot.sum(0)
        sums = 0.9 * sums + 0.1 * hot.t() @ rows
        embed = sums / ((counts + 1e-5) / (counts.sum() + CODES * 1e-5) * counts.sum())[:, None]
        torch.testing.assert_close(quantizer.cluster_size, counts, rtol=1e-12, atol=0)
        torch.testing.assert_close(quantizer.embed_avg, sums, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(quantizer.embed, embed, rtol=1e-12, atol=1e-14)
        share = hot.mean(0)
        assert stats.perplexity.item() == pytest.approx((-(share * (share + 1e-30).log()).sum()).exp().item())
        assert stats.usage.item() == pytest.approx((share > 0).double().mean().item())
        assert stats.restarted == 0
    assert int(quantizer.updates) == 3


def test_statistics_only_when_asked_and_discarded():
    quantizer, other = make(), make()
    quantizer(maps(1), collect=True)
    quantizer.discard()
    quantizer(maps(3))
    quantizer.lookup(maps(4))
    for each in (quantizer, other):
        each(maps(2), collect=True)
        each.update()
    assert torch.equal(quantizer.embed, other.embed)
    assert torch.equal(quantizer.cluster_size, other.cluster_size)
    assert int(quantizer.updates) == 1
    empty = make()
    before = empty.embed.clone()
    assert empty.update().usage == 0
    assert torch.equal(empty.embed, before)


def test_many_rows_and_layouts_and_low_precision():
    quantizer = make(torch.float32)
    z = torch.randn(2, DIM, 100, 100, generator=torch.Generator().manual_seed(0))  # more rows than one chunk
    _, nearest = naive_codes(quantizer.embed, z)
    codes = quantizer.lookup(z)
    assert (codes.flatten() == nearest).float().mean() > 0.9999  # up to ties in the last bit
    assert torch.equal(quantizer.lookup(z.to(memory_format=torch.channels_last)), codes)
    half = z.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantised, commitment, codes = quantizer(half, collect=True)
    assert quantised.dtype == commitment.dtype == torch.float32
    assert torch.equal(codes, quantizer.lookup(half.float()))  # no distance was taken in bfloat16
    assert quantizer.update().usage == 1


def restarting(**options) -> Quantizer:
    quantizer = make(decay=0.5, restart_below=2.0, restart_every=2, name="top", **options)
    quantizer.embed[3:] = 1e3  # never the nearest
    quantizer.embed_avg.copy_(quantizer.embed)
    return quantizer


def run(quantizer: Quantizer, micro: int, steps: int = 4, first: int = 0, backwards: bool = False) -> list[int]:
    restarted = []
    for step in range(first, first + steps):
        z, positions = maps(20 + step), torch.arange(BATCH)
        parts = list(zip(z.split(micro), positions.split(micro), strict=True))
        for part, at in reversed(parts) if backwards else parts:
            quantizer(part, collect=True, place=BatchPlace(5, at, BATCH))
        restarted.append(int(quantizer.update().restarted))
    return restarted


def assert_same(a: Quantizer, b: Quantizer, tolerance: float = 1e-12):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_restart_takes_the_drawn_rows():
    quantizer = restarting()
    assert run(quantizer, BATCH, steps=1) == [0]  # not due
    cold = quantizer.cluster_size * 0.5
    kept = quantizer.embed_avg.clone()
    z = maps(21)
    rows, nearest = naive_codes(quantizer.embed, z)
    cold = cold + 0.5 * F.one_hot(nearest, CODES).double().sum(0)
    dead = cold < 2
    assert 0 < dead.sum() < CODES
    draws = rng.generator(5, "codebook restart top", 1)
    drawn = torch.randperm(BATCH * SIDE * SIDE, generator=draws)[:CODES]
    sample, location = drawn // (SIDE * SIDE), drawn % (SIDE * SIDE)
    quantizer(z, collect=True, place=BatchPlace(5, torch.arange(BATCH), BATCH))
    assert quantizer.update().restarted == dead.sum()
    expected = z.flatten(2)[sample, :, location]
    torch.testing.assert_close(quantizer.embed[dead], expected[dead], rtol=1e-4, atol=0)
    assert torch.equal(quantizer.cluster_size[dead], torch.full((int(dead.sum()),), 2.0).double())
    live = kept * 0.5 + 0.5 * F.one_hot(nearest, CODES).double().t() @ rows
    torch.testing.assert_close(quantizer.embed_avg[~dead], live[~dead])


@pytest.mark.parametrize(("micro", "backwards"), [(4, False), (1, False), (2, True)])
def test_restart_is_the_same_for_any_microbatch(micro, backwards):
    whole, parts = restarting(), restarting()
    restarted = run(whole, BATCH)
    assert restarted[0] == restarted[2] == 0 and restarted[1] > 0
    assert run(parts, micro, backwards=backwards) == restarted
    assert_same(whole, parts)


def test_restart_needs_positions_and_candidates():
    quantizer = restarting()
    for step in range(2):
        quantizer(maps(step), collect=True)
        assert quantizer.update().restarted == 0
    # A candidate that no rank held (a short last batch) leaves its code alone rather than setting it to zero.
    quantizer, place = restarting(), BatchPlace(5, torch.arange(BATCH) + 10**4, 2 * 10**4)
    for step in range(2):
        quantizer(maps(step), collect=True, place=place)
        assert quantizer.update().restarted == 0


def test_restarted_codes_are_all_different():
    """Two codes at one place would tie, and rounding, which differs between ranks, would choose between them."""
    quantizer = Quantizer(CODES, DIM, restart_below=1e6, restart_every=1, name="top").double()
    z = maps(3)[:1, :, :2, :2]  # four places for six codes: the rest find no row
    quantizer(z, collect=True, place=BatchPlace(5, torch.arange(1), 1))
    assert quantizer.update().restarted == 4
    assert len(quantizer.embed_avg.unique(dim=0)) == CODES


def test_resume_draws_the_same_candidates():
    straight, first, second = restarting(), restarting(), restarting(seed=9)
    run(second, BATCH, steps=2)  # so that its own count differs from the one it loads
    run(straight, BATCH, steps=4)
    run(first, BATCH, steps=1)
    second.load_state_dict(first.state_dict())
    run(second, BATCH, steps=3, first=1)
    assert_same(straight, second, 0)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    quantizer = restarting()
    for step in range(4):
        # Interleaved samples, two microbatches a rank.
        z, positions = maps(20 + step)[rank::2], torch.arange(BATCH)[rank::2]
        for part, at in zip(z.split(2), positions.split(2), strict=True):
            quantizer(part, collect=True, place=BatchPlace(5, at, BATCH))
        dist.all_reduce(quantizer.sums())
        stats = quantizer.update()
    torch.save({"state": quantizer.state_dict(), "stats": list(stats)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    # This process is the first rank: one start of torch is enough.
    other = multiprocessing.get_context("spawn").Process(target=_rank, args=(1, str(tmp_path)))
    other.start()
    _rank(0, str(tmp_path))
    other.join(60)
    assert other.exitcode == 0
    whole = restarting()
    restarted = run(whole, BATCH)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(found[0]["state"][name], found[1]["state"][name])
        torch.testing.assert_close(found[0]["state"][name], tensor, rtol=1e-12, atol=1e-12)
    assert found[0]["stats"] == found[1]["stats"]
    assert found[0]["stats"][2] == restarted[-1]
