"""Several domains dealt in proportion to their sizes: a function of the position alone, blind to ranks."""

import itertools

import pytest
import torch

from letit_dist.data.latents import LatentPairs, LatentSet, LatentWriter, pairs_of
from letit_dist.schemas import LatentsConfig
from letit_dist.training.feeds import LatentFeed


def drawn(pairs, count):
    batches = list(itertools.islice(pairs.stream(0), count))
    return {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("positions", "source", "target", "pair")
    }


@pytest.mark.parametrize("sizes", [(60, 30, 10), (7, 5, 4), (1000, 3, 2)])
def test_pairs_have_turns_by_their_images(sizes):
    pairs = LatentPairs(sizes, seed=2, batch=100, pairs=pairs_of(3), by_size=True)
    flat = drawn(pairs, 500)
    shares = torch.tensor([float(sizes[a] * sizes[b]) for a, b in pairs.pairs])
    found = flat["pair"].bincount(minlength=6) / 50_000
    assert found.sub(shares / shares.sum()).abs().max() < 5e-4 and found.min() > 0
    # Spread evenly: any thousand positions have nearly these shares.
    for part in flat["pair"].split(1000):
        assert (part.bincount(minlength=6) - 1000 * found).abs().max() <= 4
    # Each sample once in each of its domain's epochs, on either side.
    for side in (0, 1):
        domain = torch.tensor(pairs.pairs)[:, side][flat["pair"]]
        rows = flat[("source", "target")[side]]
        for number, size in enumerate(sizes):
            own = rows[domain == number]
            assert len(own) >= size
            for epoch in own[: len(own) // size * size].split(size):
                assert sorted(epoch.tolist()) == list(range(size))


def test_neither_ranks_nor_a_resume_change_the_order():
    sizes = (60, 30, 10)
    whole = drawn(LatentPairs(sizes, seed=2, batch=8, pairs=pairs_of(3), by_size=True), 700)
    ranks = [LatentPairs(sizes, seed=2, batch=24, rank=r, world=4, pairs=pairs_of(3), by_size=True) for r in range(4)]
    for seen in (0, 4800, 5040):
        for name, values in whole.items():
            found = torch.cat([getattr(rank.at(seen), name) for rank in ranks])
            assert torch.equal(found, values[seen : seen + 24])


def test_equal_sizes_have_equal_turns():
    one, other = (LatentPairs((9, 9, 9), seed=1, batch=30, pairs=pairs_of(3), by_size=way).at(60) for way in (0, 1))
    for name in ("source", "target", "pair"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_feed_and_the_configuration(tmp_path):
    for name, count in (("cat", 30), ("dog", 10), ("fox", 2)):
        with LatentWriter(
            tmp_path / name, kind="latents", autoencoder_fingerprint="f", meta={"domain": name}
        ) as writer:
            for number in range(count):
                writer.write(f"{number}", {"latent": torch.full((4,), float(count))})
    sets = [LatentSet.open(tmp_path / name) for name in ("cat", "dog", "fox")]
    equal, sized = (
        next(LatentFeed(*sets, seed=0, every_way=True, by_size=way).batches(0, 380, 0, 1)).data for way in (False, True)
    )
    assert equal["pair"].bincount(minlength=6).tolist() == [64, 64, 63, 63, 63, 63]
    # 30 x 10, 30 x 2 and 10 x 2 images, each pair both ways, of 760.
    expected = torch.tensor([150, 30, 150, 10, 30, 10])
    assert (sized["pair"].bincount(minlength=6) - expected).abs().max() <= 1
    assert torch.equal(sized["source.latent"][:, 0], torch.tensor([30, 30, 10, 10, 2, 2.0])[sized["pair"]])
    assert LatentsConfig(domains=("a", "b"), balance="size").balance == "size"
    with pytest.raises(ValueError, match="balance has no effect on a source and a target"):
        LatentsConfig(source="a", target="b", balance="size")
