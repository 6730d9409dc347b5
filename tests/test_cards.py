"""Model cards: data, licence, command and metrics of every folder that a program writes, in words and as YAML."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from foreign_autoencoders import taesd
from huggingface_hub import ModelCard
from programs import STYLES, run
from ranks import CPU2, ROOT
from test_distributed import launch
from test_export import FILES, GOLDEN

import letit_dist
from letit_dist.cards import Card, command_line, licence_beside

WORDS = "fruit that was drawn: 24 apples | oranges"
NOT_KNOWN = ("not stated", "not yet measured")


def stated(folder):
    """(front matter as the Hub reads it, text by heading) of a folder's card."""
    card = ModelCard.load(folder / "README.md")
    parts = card.text.split("\n## ")[1:]
    return card.data.to_dict(), {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


def holds_all_four(folder, *, data, licence, command, metrics):
    front, parts = stated(folder)
    assert front["library_name"] == "letit_dist" and front["license"] == licence == parts["Licence"]
    assert front["letit_dist"]["data"] == data == parts["Data"]
    assert front["letit_dist"]["command"] in parts["Command"] and command in parts["Command"]
    found = front["letit_dist"]["metrics"]
    assert set(metrics) <= set(found) and all(f"| {name} | " in parts["Metrics"] for name in metrics)
    assert not any(word in (folder / "README.md").read_text() for word in NOT_KNOWN)
    assert Card.read(folder) == Card(data, licence, front["letit_dist"]["command"], found)
    return found


def last_line(folder):
    return json.loads((folder / "stats.jsonl").read_text().splitlines()[-1])


# From training


def test_an_autoencoder_and_an_energy_from_training_and_their_translator(chain, tmp_path):
    command = [*chain.pretrain, "--licence", "cc0-1.0", "--data", WORDS]
    command[command.index("--run") + 1] = tmp_path / "backbone"
    done = run(*command, "training.images=320")
    assert done.code == 0, done.err
    (export,) = (tmp_path / "backbone/export").iterdir()
    begin = f"python launch/pretrain.py {command[1]} --run"
    known = last_line(tmp_path / "backbone")
    clock = known.pop("images_per_second")
    found = holds_all_four(export, data=WORDS, licence="cc0-1.0", command=begin, metrics=known)
    assert found == known and str(clock) not in str(found)  # numbers of the clock would differ at every run

    command = [*chain.train_energy(*STYLES), "--licence", "mit"]
    command[command.index("--run") + 1] = tmp_path / "energy"
    done = run(*command)
    assert done.code == 0, done.err
    (energy,) = (tmp_path / "energy/export").iterdir()
    data = f"apple (72 latents, {chain.latents('apple')}), orange (72 latents, {chain.latents('orange')})"
    names = {*last_line(tmp_path / "energy")} - {"images_per_second"}
    names |= {f"apple to orange: kernel distance, {what}" for what in ("source", "mean shift", "target itself")}
    found = holds_all_four(energy, data=data, licence="mit", command="launch/train_energy.py", metrics=names)
    (row,) = [line for line in done.out.splitlines() if line.startswith("| mean shift ")]
    shown = f"{found['apple to orange: kernel distance, mean shift']:.4g}"
    assert shown in [cell.strip() for cell in row.split("|")]

    one = letit_dist.Translator.from_pretrained(tmp_path / "energy")
    one.save_pretrained(tmp_path / "all", with_autoencoder=True)
    holds_all_four(tmp_path / "all", data=data, licence="mit", command="launch/train_energy.py", metrics=names)
    holds_all_four(
        tmp_path / "all/energies/apple2orange",
        data=data,
        licence="mit",
        command="launch/train_energy.py",
        metrics=names,
    )
    assert Card.read(tmp_path / "all/autoencoder") == Card.read(chain.autoencoder / "export/images-000000000960")


def test_a_card_may_be_completed_later_and_is_else_left_alone(chain, tmp_path):
    shutil.copytree(chain.energy(), tmp_path / "energy")
    command = list(chain.train_energy(*STYLES))
    command[command.index("--run") + 1] = tmp_path / "energy"
    (energy,) = (tmp_path / "energy/export").iterdir()
    text = (energy / "README.md").read_text()
    assert "not stated" in text  # the licence, which nobody gave
    (energy / "README.md").write_text(text + "\nmy own words\n")
    assert run(*command).code == 0
    assert (energy / "README.md").read_text().endswith("my own words\n")
    assert run(*command, "--licence", "mit").code == 0
    mended = (energy / "README.md").read_text()
    assert mended.endswith("my own words\n")
    assert stated(energy)[0]["license"] == "mit" and Card.read(energy).data == stated(chain_card(chain))[1]["Data"]
    weights = (energy / "model.safetensors").stat().st_mtime_ns
    assert run(*command, "--data", "photos \N{RED APPLE}").code == 0
    card = Card.read(energy)
    assert (card.data, card.licence, stated(energy)[1]["Data"]) == (*["photos \N{RED APPLE}", "mit"], card.data)
    assert (energy / "README.md").read_text().endswith("my own words\n")
    assert (energy / "model.safetensors").stat().st_mtime_ns == weights
    fingerprint = letit_dist.load_energy(chain.energy()).fingerprint()
    assert letit_dist.load_energy(energy).fingerprint() == fingerprint


def chain_card(chain):
    (folder,) = (chain.energy() / "export").iterdir()
    return folder


# From launch/export.py


@pytest.mark.parametrize("kind", [*FILES, "energy", "identity", "taesd"])
def test_every_kind_that_is_exported(tmp_path, kind):
    more = ["--data", WORDS, "--licence", "apache-2.0", "--metric", "PSNR=29.0", "--metric", "FID (50k)=12"]
    out = tmp_path / "out"
    if kind == "energy":
        from letit_dist.autoencoders.beta_vae import BetaVAE, BetaVAEConfig

        BetaVAE(BetaVAEConfig(latent_dim=16)).save_pretrained(tmp_path / "autoencoder")
        more += ["--autoencoder", tmp_path / "autoencoder", "--steps", 2, "--step-size", 1]
        place = [GOLDEN / "ebm_mlp_layer1.pt"]
    elif kind == "identity":
        place = ["--resolution", 16]
    elif kind == "taesd":
        import torch

        place = [tmp_path / "both.pt", "--resolution", 64]
        torch.save(taesd("taesd", 64).state_dict(), place[0])
    else:
        name, options = FILES[kind]
        place = [GOLDEN / name, *options]
    done = run("launch/export.py", "--from", kind, *place, "--out", out, *more)
    assert done.code == 0, done.err
    metrics = {"PSNR": "29.0", "FID (50k)": "12"}
    begin = f"python launch/export.py --from {kind}"
    assert holds_all_four(out, data=WORDS, licence="apache-2.0", command=begin, metrics=metrics) == metrics


def test_the_licence_that_lies_beside_a_published_file(tmp_path):
    file = tmp_path / "model.pt"
    shutil.copy(GOLDEN / "betavae_checkpoint.pt", file)

    def licence(out, *more):
        done = run("launch/export.py", "--from", "beta_vae", file, "--variant", "letit", "--out", tmp_path / out, *more)
        assert done.code == 0, done.err
        return Card.read(tmp_path / out).licence, done.err

    found, said = licence("none")
    assert found is None and said.startswith("licence: not stated (--licence)")
    (tmp_path / "LICENSE").write_text("Terms of our own\n")
    assert licence("own")[0] is None
    (tmp_path / "LICENSE").write_text("\n  Apache License\n   Version 2.0, January 2004\n")
    assert licence("beside") == ("apache-2.0", "")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\ndatasets:\n- laion\n- coyo\n---\n# theirs\n")
    assert licence("front") == ("cc-by-4.0", "")
    assert Card.read(tmp_path / "front").data == "laion, coyo"
    assert licence("said", "--licence", "mit")[0] == "mit"
    assert licence_beside(tmp_path) == "cc-by-4.0"


@pytest.mark.parametrize("text", ["# no front matter\n", "---\n[1, 2]\n---\n", "---\na: [\n---\n", "---\n", "\xff\xfe"])
def test_somebodys_readme_that_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert Card.read(tmp_path) in (None, Card())
    assert Card.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "beta_vae", "x.pt", "--metric", "PSNR"), "--metric PSNR: expected NAME=VALUE"),
        (("--from", "beta_vae", "x.pt", "--metric", "=3"), "--metric =3: expected NAME=VALUE"),
        (("--to", "beta_vae", "x", "--licence", "mit"), "--licence has no effect with --to beta_vae: leave it out"),
        (("--to", "beta_vae", "x", "--metric", "a=3"), "--metric has no effect with --to beta_vae: leave it out"),
    ],
)
def test_options_of_cards_that_cannot_be(tmp_path, arguments, message):
    done = run("launch/export.py", *arguments, "--out", tmp_path / "out")
    assert done.code == 2 and f"error: {message}" in done.errors


# Several in one folder; on several ranks


def test_cards_of_several_energies_are_joined():
    one, two = Card("a", "mit", "first", {"x": 1}), Card("b", "mit", "second", {"x": 2})
    assert Card.together([one]) == one and Card.together([None]) == Card()
    assert Card.together([one, two, one]) == Card("a\nb", "mit", "first\nsecond")
    assert Card.together([one, Card("a")]) == Card("a", None, "first")
    for licence in ("apache-2.0", "cc-by-4.0", "cc0-1.0", "gpl-3.0", "openrail"):  # whichever of two a set has first
        assert Card.together([one, Card("a", licence)]).licence is None


def test_what_would_break_a_table_does_not():
    text = Card(metrics={"a | b": "one\ntwo", "PSNR": 29.123456}).text("t", {"parent": "x|y"}, "pass")
    assert "\n| a \\| b | one two |\n| PSNR | 29.12 |\n" in text and "\n| parent | x\\|y |\n" in text


CPU = {"ACCELERATE_USE_CPU": "True"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "launch/my zero.json"}
SLURM = {"RANK": "5", "SLURM_PROCID": "5", "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4(x2)"}
OTHERS = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *SLURM, *CPU, *ZERO)
MEETING = "--rdzv_backend c10d --rdzv_endpoint FIRST_MACHINE:29500"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "python"),
        ({"WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "False"}, "python"),
        (
            {"WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --standalone --nproc_per_node 8 --",
        ),
        ({"WORLD_SIZE": "8"}, "torchrun --standalone --nproc_per_node 8 --"),
        (
            {"WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"},
            f"torchrun --nnodes 2 {MEETING} --nproc_per_node 8 --",
        ),
        ({"WORLD_SIZE": "8", **SLURM}, f"torchrun --nnodes 2 {MEETING} --nproc_per_node 4 --"),
        ({"WORLD_SIZE": "2", **CPU}, "ACCELERATE_USE_CPU=True torchrun --standalone --nproc_per_node 2 --"),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "False", **ZERO},
            "ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE='launch/my zero.json' "
            "torchrun --standalone --nproc_per_node 2 --",
        ),
    ],
)
def test_the_command_says_how_it_was_launched(environment, expected, monkeypatch):
    for name in OTHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert command_line("launch/x.py", ["a b", "c"]) == f"{expected} launch/x.py 'a b' c"


def test_the_command_of_a_card_of_two_ranks_gives_the_same_weights(fruit_shards, tmp_path):
    done = launch(tmp_path / "run", fruit_shards, "training.images=16", "intervals.checkpoint=16", yaml=CPU2)
    assert done.returncode == 0, done.stderr
    [first] = (tmp_path / "run/export").iterdir()
    command = Card.read(first).command
    assert "cpu2.yaml" not in command and f"--run {tmp_path / 'run'} " in command
    again = command.replace(f"--run {tmp_path / 'run'} ", f"--run {tmp_path / 'again'} ")
    environment = {name: value for name, value in os.environ.items() if name not in OTHERS}
    done = subprocess.run(again, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    second = tmp_path / "again" / first.relative_to(tmp_path / "run")
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_a_licence_is_that_of_the_weights(tmp_path, monkeypatch):
    (tmp_path / "LICENSES").mkdir()
    (tmp_path / "weights.pth").write_text("")
    assert licence_beside(tmp_path / "weights.pth") is None
    (tmp_path / "LICENSE").write_text("MIT License\n\nwords")
    assert licence_beside(tmp_path / "weights.pth") == licence_beside(tmp_path) == "mit"
    monkeypatch.chdir(ROOT)  # where the LICENSE is the program's
    assert licence_beside(Path("weights.pth")) is None


def test_a_command_says_no_passwords():
    said = command_line("launch/pretrain.py", ["a.yaml", "data.train=[https://me:secret@example.org/x, s3://b/c]"])
    assert "https://example.org/x" in said and "s3://b/c" in said and "secret" not in said
