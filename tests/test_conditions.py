"""One energy between several domains: its conditions, its stream of pairs, and where its chains end."""

import itertools

import pytest
import torch

from letit_dist.config import parse_config
from letit_dist.data.latents import LatentPairs, LatentSet, LatentWriter, pairs_of
from letit_dist.energy.baselines import MeanShift
from letit_dist.energy.convolutional import ConvEnergyConfig
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy, conditions_of, load_energy
from letit_dist.energy.objective import contrastive_loss
from letit_dist.energy.translate import choose_translator
from letit_dist.errors import UserError
from letit_dist.interchange.energy import export_energy
from letit_dist.recipes.base import Batch, OptimizerConfig
from letit_dist.recipes.latent_energy import LatentEnergyConfig, LatentEnergyRecipe
from letit_dist.schemas import TrainEnergyConfig
from letit_dist.training.feeds import LatentFeed

NAMES = ("cat", "dog", "wild")
PAIRS = list(itertools.permutations(NAMES, 2))


def tiny(kind, on="target"):
    """An energy between three domains of latents (4, 8, 8), or (6,)."""
    torch.manual_seed(0)
    schema, shape = (ConvEnergyConfig, (4, 8, 8)) if kind == "conv" else (MLPEnergyConfig, (6,))
    settings = {} if kind == "conv" else {"layers": int(kind[-1]), "hidden": 16}
    config = schema(condition_on=on, latent_unit=1.3, **settings)
    return build_energy(config, shape, conditions=conditions_of(on, NAMES))


KINDS = ["mlp0", "mlp1", "mlp2", "conv"]


# ------------------------------------------------------------------------------------------- the energy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on", ["target", "pair"])
def test_each_condition_alone_is_the_same_energy(kind, on):
    energy = tiny(kind, on)
    names = energy.config.conditions
    assert names == NAMES if on == "target" else names[:2] == ("cat to dog", "cat to wild") and len(names) == 6
    condition = torch.arange(10) % len(names)
    latents = torch.randn(10, *energy.latent_shape)
    chosen, folded = energy(latents, condition), energy.folded()(latents, condition)
    assert len(chosen.detach().unique()) == 10
    torch.testing.assert_close(folded, chosen)
    for number, name in enumerate(names):
        alone = energy.at(name)
        assert not alone.config.conditions and alone.config.condition_on is None
        rows = condition == number
        torch.testing.assert_close(alone(latents[rows]), chosen[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_chains_of_different_conditions_run_side_by_side(kind):
    energy = tiny(kind)
    start, condition = torch.randn(5, *energy.latent_shape), torch.tensor([2, 0, 1, 1, 2])
    sampler = LangevinSampler(LangevinConfig(steps=4, step_size=0.5))
    together = sampler.sample(energy, start, condition=condition, keep_path=True)
    for row, number in enumerate(condition.tolist()):
        alone = sampler.sample(energy.at(NAMES[number]), start[row : row + 1], keep_path=True)
        torch.testing.assert_close(together.path[:, row : row + 1], alone.path)
        torch.testing.assert_close(together.shift[row : row + 1], alone.shift)
        torch.testing.assert_close(together.energies[:, row : row + 1], alone.energies)


def test_a_folder_keeps_the_conditions(tmp_path):
    energy = tiny("mlp1")
    energy.save_pretrained(tmp_path / "energy", note=1)
    loaded = load_energy(tmp_path / "energy")
    assert loaded.config.conditions == NAMES and loaded.at("dog").extra == {"note": 1}
    latents = torch.randn(3, 6)
    torch.testing.assert_close(loaded.at("dog")(latents), energy.at("dog")(latents))


def test_what_an_energy_with_conditions_refuses():
    energy, latents = tiny("mlp1"), torch.randn(2, 6)
    with pytest.raises(ValueError, match="one for every sample"):
        energy(latents)
    with pytest.raises(ValueError, match="takes none"):
        energy.at("cat")(latents, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match=r"no such condition: 'bird' \(this energy has cat, dog, wild\)"):
        energy.at("bird")
    with pytest.raises(UserError, match="has none"):
        energy.at("cat").at("dog")
    with pytest.raises(UserError, match="conditions are not known yet"):
        build_energy(MLPEnergyConfig(condition_on="pair"), (6,))
    with pytest.raises(UserError, match="no published form of an energy with conditions"):
        export_energy(tiny("mlp1"))


# ------------------------------------------------------------------------------------------- the stream


def test_every_pair_has_its_turn_and_every_sample_its_place():
    sizes = (7, 5, 4)
    pairs = LatentPairs(sizes, seed=2, batch=6, pairs=pairs_of(3))
    drawn = list(itertools.islice(pairs.stream(0), 70))
    flat = {name: torch.cat([getattr(batch, name) for batch in drawn]) for name in ("pair", "source", "target")}
    assert flat["pair"].bincount().tolist() == [70] * 6
    for side in ("source", "target"):
        domain = torch.tensor(pairs.pairs)[:, ("source", "target").index(side)][flat["pair"]]
        for number, size in enumerate(sizes):
            rows = flat[side][domain == number]
            assert len(rows) == 140
            for epoch in rows[: 140 // size * size].split(size):
                assert sorted(epoch.tolist()) == list(range(size))


def test_the_stream_of_several_domains_does_not_know_ranks():
    whole = LatentPairs((7, 5, 4), seed=2, batch=8, pairs=pairs_of(3)).at(24)
    parts = [LatentPairs((7, 5, 4), seed=2, batch=8, rank=r, world=4, pairs=pairs_of(3)).at(24) for r in range(4)]
    for name in ("positions", "source", "target", "pair"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def write_domains(folder, count=12, names=NAMES):
    """Latents (6,) of each domain: its number in every entry, plus the sample's number / 100."""
    for number, name in enumerate(names):
        meta = {"domain": name}
        with LatentWriter(folder / name, kind="latents", autoencoder_fingerprint="f", meta=meta) as writer:
            for sample in range(count + number):
                writer.write(f"{name}{sample}", {"latent": torch.full((6,), number + sample / 100)})
    return [folder / name for name in names]


def test_the_feed_takes_rows_from_their_domains(tmp_path):
    feed = LatentFeed(*map(LatentSet.open, write_domains(tmp_path)), seed=0, every_way=True)
    assert feed.names == list(NAMES)
    for batch in [next(feed.batches(12, 12, 0, 1)), feed.preview(9)]:
        pairs = torch.tensor(feed.pairs)[batch.data["pair"]]
        for side, name in enumerate(("source", "target")):
            assert torch.equal(batch.data[f"{name}.latent"][:, 0].floor().long(), pairs[:, side])
    assert feed.preview(9).size == 9 and feed.preview(9).data["pair"].unique().numel() == 6


def test_two_domains_of_one_name_are_refused(tmp_path):
    folder = write_domains(tmp_path)[0]
    with pytest.raises(UserError, match=r"two of one name \(cat, cat\): name them by encode_latents.py --domain"):
        LatentFeed(LatentSet.open(folder), LatentSet.open(folder), seed=0, every_way=True)


# ------------------------------------------------------------------------------------------- learning


class Same(torch.nn.Module):
    """Latents are images."""

    def decode(self, latents):
        return latents


def recipe_for(on):
    config = LatentEnergyConfig(
        optimizer=OptimizerConfig(learning_rate=0.01),
        langevin=LangevinConfig(steps=3, step_size=0.5),
    )
    shifts = {pair: MeanShift(torch.full((6,), float(number))) for number, pair in enumerate(PAIRS)}
    energy = tiny("mlp1", on)
    return LatentEnergyRecipe(config, energy, Same(), shifts, seed=0, precision="fp32")


@pytest.mark.parametrize("on", ["target", "pair"])
def test_the_loss_is_the_mean_of_those_of_the_pairs(on):
    recipe = recipe_for(on)
    data = {"source.latent": torch.randn(12, 6), "target.latent": torch.randn(12, 6), "pair": torch.arange(12) % 6}
    batch = Batch(data, torch.arange(12), 0, 12)
    losses = []
    for number, (direction, pair) in enumerate(zip(recipe.directions(), PAIRS, strict=True)):
        assert direction.pair == pair
        rows = data["pair"] == number
        moved = direction.methods["latent energy"](data["source.latent"][rows])
        losses.append(contrastive_loss(direction.energy, data["target.latent"][rows], moved)[0])
        shifted = direction.methods["mean shift"](data["source.latent"][rows])
        torch.testing.assert_close(recipe.samples(batch)["mean shift"][rows], shifted)
        torch.testing.assert_close(shifted, data["source.latent"][rows] + number)
    torch.testing.assert_close(recipe("energy", batch).loss, torch.stack(losses).mean())


@pytest.mark.parametrize("on", ["target", "pair"])
def test_one_energy_learns_every_direction(on):
    """Three clouds at the corners of a triangle."""
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    draws = torch.Generator().manual_seed(0)
    clouds = centres[:, None] + 0.3 * torch.randn(3, 200, 2, generator=draws)
    numbered = list(itertools.permutations(range(3), 2))
    shifts = {PAIRS[i]: MeanShift(centres[b] - centres[a]) for i, (a, b) in enumerate(numbered)}
    torch.manual_seed(0)
    energy_config = MLPEnergyConfig(layers=2, hidden=64, condition_on=on)
    energy = build_energy(energy_config, (2,), conditions=conditions_of(on, NAMES))
    config = LatentEnergyConfig(
        optimizer=OptimizerConfig(learning_rate=2e-3), langevin=LangevinConfig(steps=20, step_size=0.4), l2=0.01
    )
    recipe = LatentEnergyRecipe(config, energy, Same(), shifts, seed=0, precision="fp32")
    optimizer = torch.optim.Adam(energy.parameters(), lr=2e-3)
    pairs = LatentPairs((200, 200, 200), seed=0, batch=96, pairs=pairs_of(3))
    ends = torch.tensor(numbered)
    for item in itertools.islice(pairs.stream(0), 300):
        source, target = ends[item.pair].T
        data = {
            "source.latent": clouds[source, item.source],
            "target.latent": clouds[target, item.target],
            "pair": item.pair,
        }
        optimizer.zero_grad()
        recipe("energy", Batch(data, item.positions, 0, 96)).loss.backward()
        optimizer.step()
    for direction, (source, target) in zip(recipe.directions(), numbered, strict=True):
        moved = direction.methods["latent energy"](clouds[source])
        nearest = torch.cdist(moved, centres).argmin(1)
        assert (nearest == target).float().mean() > 0.95, direction.pair


# ------------------------------------------------------------------------------------------- configuration


BASE = {
    "autoencoder": "a",
    "energy": {"kind": "mlp", "condition_on": "target"},
    "recipe": {
        "kind": "latent_energy",
        "optimizer": {"learning_rate": 0.1},
        "langevin": {"steps": 1, "step_size": 1.0},
    },
    "training": {"images": 8, "batch": 4},
    "intervals": {"report": 4, "samples": 4, "checkpoint": 4},
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"data: source and target required and not given \(or give domains\)"),
        ({"source": "s"}, "data: target required and not given"),
        ({"source": "s", "domains": ["a", "b"]}, "data: give either source and target, or domains"),
        ({"domains": ["a"]}, "data: two or more domains are needed, got only a"),
        ({"domains": ["a", "b", "a"]}, "data: the same folder twice: a, b, a"),
        ({"source": "s", "target": "t"}, "energy.condition_on needs data.domains"),
    ],
)
def test_configurations_that_make_no_sense(data, message):
    with pytest.raises(UserError, match=message):
        parse_config(TrainEnergyConfig, {**BASE, "data": data})


def test_domains_need_a_condition():
    tree = {**BASE, "energy": {"kind": "mlp"}, "data": {"domains": ["a", "b"]}}
    with pytest.raises(UserError, match=r"data.domains needs energy.condition_on \(target or pair\)"):
        parse_config(TrainEnergyConfig, tree)


# ------------------------------------------------------------------------------------------- translating


@pytest.mark.parametrize("on", ["target", "pair"])
def test_the_way_is_chosen_by_its_ends(tmp_path, on):
    from letit_dist.autoencoders.beta_vae import BetaVAE

    autoencoder = BetaVAE(BetaVAE.tiny)
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    torch.manual_seed(0)
    config = MLPEnergyConfig(hidden=4, condition_on=on)
    energy = build_energy(config, autoencoder.latent_shape, conditions=conditions_of(on, NAMES))
    chain = {"steps": 2, "step_size": 1.0}
    energy.save_pretrained(
        tmp_path / "energy", autoencoder_fingerprint=autoencoder.fingerprint(), langevin=chain, domains=list(NAMES)
    )

    def choose(to, source=None):
        return choose_translator([tmp_path / "energy"], tmp_path / "autoencoder", to, source)

    with pytest.raises(UserError, match=r"several energies fit.*; give --to$"):
        choose(None)
    with pytest.raises(UserError, match="--to bird: none of the energies goes there, they go: "):
        choose("bird")
    if on == "pair":
        with pytest.raises(UserError, match=r"--to dog: several energies fit.*; give --from$"):
            choose("dog")
    chosen = choose("dog", "cat")
    assert chosen.energy.extra["target"] == "dog"
    assert chosen.energy.extra["source"] == "cat"
    latents = torch.randn(3, *autoencoder.latent_shape)
    expected = energy.at("dog" if on == "target" else "cat to dog")(latents)
    torch.testing.assert_close(chosen.energy(latents), expected)
