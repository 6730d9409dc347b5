"""One energy between several domains, and the dial, by the programs."""

import json

import pytest
from programs import ROOT, STYLES, TINY_ENERGY, files, run

from letit_dist.autoencoders.base import load_autoencoder
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import decode, to_images, to_pixels
from letit_dist.energy.models import load_energy
from letit_dist.energy.translate import open_translator
from letit_dist.pretrained import find_folder


@pytest.fixture(scope="module", params=["target", "pair"])
def both_ways(chain, request, tmp_path_factory):
    """(on, run folder, what it said) of an energy that goes from apples to oranges and back."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    command = ("launch/train_energy.py", ROOT / "configs/energy/domains.yaml", "--run", folder)
    places = (f"autoencoder={chain.autoencoder}", f"data.domains=[{', '.join(str(chain.latents(s)) for s in STYLES)}]")
    kind = ("energy.kind=conv", f"energy.condition_on={request.param}")
    # Another kind drops what the base says of the first one.
    done = run(*command, *places, *kind, *TINY_ENERGY, "energy.latent_unit=auto", "training.ema_half_life=50")
    assert done.code == 0, done.err
    return request.param, folder, done.out


def test_it_is_trained_in_both_directions(chain, both_ways):
    on, folder, out = both_ways
    assert "apple (72 latents) and orange (72 latents); batch: 16 = " in out
    energy = load_energy(find_folder(folder))
    names = ("apple", "orange") if on == "target" else ("apple to orange", "orange to apple")
    assert energy.config.conditions == names and energy.extra["domains"] == list(STYLES)
    assert energy.extra["autoencoder_fingerprint"] == load_autoencoder(find_folder(chain.autoencoder)).fingerprint()
    tables = out[out.index("\napple to orange\n") :].split("orange to apple\n")
    assert len(tables) == 2 and all(table.count("| latent energy ") == 1 for table in tables)
    assert (folder / "samples/images-000000000256.png").is_file()
    line = json.loads((folder / "stats.jsonl").read_text().splitlines()[-1])
    assert abs(line["energy_gap"]) < 1e3


def test_translating_to_a_domain(chain, both_ways, tmp_path):
    on, folder, _ = both_ways
    dataset = ShardDataset([chain.images("apple", "test")])
    ends = ("--to", "orange", *(("--from", "apple") if on == "pair" else ()))
    done = run("launch/translate.py", chain.images("apple", "test"), "--energy", folder, "--out", tmp_path / "o", *ends)
    assert done.code == 0, done.err
    translator = open_translator(folder, to="orange", source="apple")
    images = to_images(dataset.pixels(3)[None])
    expected = to_pixels(translator.translate(images).images)[0]
    written = decode((tmp_path / "o" / f"{dataset.key(3)}.png").read_bytes())
    assert (written.int() - expected.int()).abs().max() <= 1
    other = to_pixels(open_translator(folder, to="apple", source="orange").translate(images).images)[0]
    assert (written.int() - other.int()).abs().max() > 1


def test_scoring_names_the_way(chain, both_ways, tmp_path):
    _, folder, _ = both_ways
    command = ("eval/translation.py", folder, "--train", *map(chain.images, STYLES), "--judge-steps", 2)
    command += ("--test", chain.images("apple", "test"))
    assert "give --to" in run(*command).err
    done = run(*command, "--to", "orange", "--from", "apple")
    assert done.code == 0, done.err
    rows = [json.loads(row) for row in (folder / "eval-apple-orange/translation.jsonl").read_text().splitlines()]
    assert {(row["source"], row["target"]) for row in rows} == {("apple", "orange")}


def test_a_missing_condition_and_domains_of_another_autoencoder(chain, tmp_path):
    command = ("launch/train_energy.py", ROOT / "configs/energy/fruit.yaml", "--run", tmp_path / "run")
    places = (f"autoencoder={chain.autoencoder}", f"data.domains=[{chain.latents('apple')}, {chain.latents('orange')}]")
    done = run(*command, *places)
    assert done.code == 2 and "data.domains needs energy.condition_on (target or pair)" in done.err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- strength


def test_each_chain_until_it_has_arrived(chain, tmp_path):
    command = ("launch/translate.py", chain.images("apple", "test"), "--energy", chain.energy())
    command += ("--out", tmp_path / "o")
    done = run(*command, "--strength", "auto", "--steps", 12, "--sheet", "--path")
    assert done.code == 0, done.err
    assert "a classifier of latents tells the domains apart with accuracy " in done.out
    assert "of 8 chains arrived before their end; " in done.out
    refused = run(*command, "--latents", chain.latents("apple"), chain.latents("orange"))
    assert refused.code == 2 and "--latents has no effect without --strength auto" in refused.err
    assert run(*command, "--strength", "much").code == 2


def test_the_dial(chain, tmp_path):
    command = ("eval/paper.py", "strength", chain.images("apple", "test"), "--energy", chain.energy())
    done = run(*command, "--back", chain.energy("orange", "apple"), "--out", tmp_path, "--count", 3)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "strength.json").read_text())
    moved = [row["moved"] for row in record["strengths"]]
    assert [row["strength"] for row in record["strengths"]] == [0.25, 0.5, 0.75, 1.0] and moved == sorted(moved)
    assert len(record["arrival_steps"]) == len(record["images"]) == 3
    assert record["source"] == "apple" and record["cycle"]["latent_error"] > 0
    assert (tmp_path / "strength.png").is_file()
    before = files(tmp_path)
    done = run(*command, "--back", chain.energy(), "--out", tmp_path)
    assert done.code == 2 and "none of the energies goes there" in done.err and files(tmp_path) == before
    done = run(*command, "--strengths", 0.5, 2, "--out", tmp_path)
    assert done.code == 2 and "strengths lie in [0, 1], got 0.5, 2.0" in done.err and files(tmp_path) == before
