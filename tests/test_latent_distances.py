"""Kernel and Frechet distances between sets of latents against their definitions, and the unit they are told in."""

import pytest
import torch
from plain_autoencoders import Flat
from programs import STYLES, shared_chain

from letit_dist.autoencoders.base import load_autoencoder
from letit_dist.data.encoding import EncodeOptions, encode_domain
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.errors import UserError
from letit_dist.evaluation.latents import all_latents, compare, kernel_distance, measure_unit
from letit_dist.pretrained import find_folder


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_kernel_distance(a, b):
    a, b = ([list(map(float, row)) for row in x.flatten(1).double()] for x in (a, b))

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(rows):
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in a for y in b]
    return within(a) + within(b) - 2 * sum(between) / len(between)


def test_kernel_distance_is_its_definition():
    a, b = draw(7, 2, 3), draw(5, 2, 3, seed=1) + 0.3
    assert kernel_distance(a, b) == pytest.approx(naive_kernel_distance(a, b), rel=1e-12)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-12)


def test_kernel_distance_is_unbiased():
    """Between samples of one distribution it is 0 on average, and of either sign."""
    found = torch.tensor([kernel_distance(draw(12, 4, seed=2 * i), draw(9, 4, seed=2 * i + 1)) for i in range(2000)])
    assert abs(found.mean()) < 4 * found.std() / len(found) ** 0.5
    assert (found < 0).float().mean() > 0.3
    # With the diagonal it would be positive: by what it adds, far beyond the bound above.
    assert found.std() / len(found) ** 0.5 < 0.02
    assert kernel_distance(draw(200, 4), draw(200, 4, seed=1) + 1) > 1


@pytest.fixture(scope="module")
def flat():
    torch.manual_seed(0)
    return Flat(32)


@pytest.fixture(scope="module")
def sides(flat, fruit_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    for style in STYLES:
        shards = ShardDataset([fruit_shards / style / "train"])
        encode_domain(flat, shards, folder / style, EncodeOptions(flip=True))
    return [LatentSet.open(folder / style) for style in STYLES]


def test_all_latents(flat, sides, monkeypatch):
    whole = sides[0].take(range(48))["latent"]
    assert torch.equal(torch.cat(list(all_latents(flat, sides[0]))), whole)
    spread = torch.cat(list(all_latents(flat, sides[0], most=5)))
    assert torch.equal(spread, whole[[0, 9, 19, 28, 38]])
    assert torch.equal(torch.cat(list(all_latents(flat, sides[0], most=99))), whole)
    monkeypatch.setattr("letit_dist.evaluation.latents._CHUNK", 10)
    parts = list(all_latents(flat, sides[0]))
    assert [len(part) for part in parts] == [10, 10, 10, 10, 8] and torch.equal(torch.cat(parts), whole)


def test_latents_come_in_the_precision_of_the_autoencoder(flat, sides):
    """The trainer moves it; stored latents follow."""
    double = Flat(32).double()
    assert {part.dtype for part in all_latents(double, sides[0])} == {torch.float64}
    assert {part.device for part in all_latents(double.to("meta"), sides[0])} == {torch.device("meta")}


def test_latents_from_codes(tmp_path_factory):
    chain = shared_chain(tmp_path_factory)
    autoencoder = load_autoencoder(find_folder(chain.autoencoder))
    side = LatentSet.open(chain.latents("apple"))
    latents = torch.cat(list(all_latents(autoencoder, side)))
    assert torch.equal(latents, autoencoder.latents_from_codes(side.take(range(72))))


def test_the_unit_is_the_standard_deviation_of_all_entries(flat, sides):
    everything = torch.cat([side.take(range(48))["latent"] for side in sides])
    assert measure_unit(flat, *sides) == pytest.approx(everything.std().item(), rel=5e-3)
    assert measure_unit(flat, *sides) == float(f"{everything.double().std(correction=0).item():.3g}")
    few = torch.cat([side.take([0, 24])["latent"] for side in sides])
    assert measure_unit(flat, *sides, most=2) == float(f"{few.double().std(correction=0).item():.3g}")


def test_a_unit_of_zero_is_refused(flat, sides, monkeypatch):
    monkeypatch.setattr(sides[0], "fields", {"latent": torch.full((48, 16), 0.3)})
    with pytest.raises(UserError, match="has not learnt anything yet"):
        measure_unit(flat, sides[0])


def test_comparison_of_methods():
    """Energy |z - 2|^2 / 2, and a target at 2: whoever moves there is as near as the target itself."""
    source, target = draw(120, 4), draw(120, 4, seed=1) + 2
    methods = {"source": lambda z: z, "shifted": lambda z: z + 2}
    rows = compare(
        lambda z: (z - 2).square().sum(1) / 2, methods, iter(source.split(50)), iter(target.split(7)), unit=2.0
    )
    by_name = {row["method"]: row for row in rows}
    assert list(by_name) == ["source", "shifted", "target itself"]
    assert [row["samples"] for row in rows] == [120, 120, 60]
    assert by_name["source"]["energy"] == pytest.approx(10, abs=1) and by_name["shifted"]["energy"] < 2.5
    expected = kernel_distance(source / 2, target[::2] / 2)
    assert by_name["source"]["kernel_distance"] == pytest.approx(expected, rel=1e-6)
    expected = kernel_distance(target[1::2] / 2, target[::2] / 2)
    assert by_name["target itself"]["kernel_distance"] == pytest.approx(expected, rel=1e-6)
    assert abs(by_name["shifted"]["kernel_distance"]) < 0.1 * by_name["source"]["kernel_distance"]
