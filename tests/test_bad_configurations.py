"""Bad configurations and run folders: one clear line a problem, exit code 2, and nothing on disk touched."""

import shutil

import pytest
from programs import ROOT, STYLES, run
from refusals import ENERGY, PRETRAIN, energy_command, one

# Configurations


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.imagess=3"], ["command line: training.imagess: unknown key, did you mean 'images'?"]),
        (["colour=3"], ["command line: colour: unknown key (known here: autoencoder, start_from, recipe, data, "]),
        (["training.batch"], ["cannot read the override 'training.batch': expected key=value"]),
        (
            ["autoencoder.resolution=36"],
            ["autoencoder.resolution: must be divisible by 8 (the top level has stride 8)"],
        ),
        (["autoencoder.kind=vqvea2"], ["unknown autoencoder kind 'vqvea2', did you mean 'vqvae2'?"]),
        (["training.batch=[16, 8]"], ["training.batch: 2 values, but this recipe does not grow: give 1"]),
        (
            ["training.batch=0", "data.flip=perhaps", "autoencoder.codes=1"],
            ["autoencoder.codes: ", "data.flip: ", "training.batch: "],
        ),
        (["data.train=[nowhere]"], ["no such shard folder: nowhere"]),
    ],
)
def test_configurations_of_pretraining(refused, chain, tmp_path, overrides, expected):
    lines = refused(*PRETRAIN, "--run", tmp_path / "new", *chain.pretrain[4:], *overrides)
    assert len(lines) == len(expected)
    for line, part in zip(sorted(lines), expected, strict=True):
        assert part in line
    assert not (tmp_path / "new").exists()


def test_configuration_files(refused, tmp_path):
    missing = one(refused("launch/pretrain.py", ROOT / "configs/debug/vqvae.yaml", "--run", tmp_path / "new"))
    assert missing.startswith("no such file: ") and missing.endswith("vqvae2.yaml?")
    own = tmp_path / "own.yaml"
    own.write_text(f"base: {ROOT}/configs/debug/vqvae2.yaml\ntraining:\n  bach: 4\n")
    line = one(refused("launch/pretrain.py", own, "--run", tmp_path / "new"))
    assert line == f"{own}: training.bach: unknown key, did you mean 'batch'?"
    own.write_text("training: [1")
    assert "is not valid YAML" in one(refused("launch/pretrain.py", own, "--run", tmp_path / "new"))
    lines = refused(*ENERGY, "--run", tmp_path / "new")
    assert lines == ["autoencoder: required and not given", "data: required and not given"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [PRETRAIN, ENERGY])
def test_a_run_folder_must_be_named(chain, command):
    done = run(*command)
    assert done.code == 2 and done.errors[-1].endswith("error: --run is required (or --check)")


def test_batches_that_do_not_divide_over_the_ranks(chain, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for command in (chain.pretrain, chain.train_energy(*STYLES)):
        done = run(*command, "--check")
        assert done.code == 2
        line = "[rank 0] error: training.batch: 16 images do not divide over 3 ranks (try 15 or 18)\n"
        assert done.err == line


def test_a_recipe_of_the_other_stage(refused, chain, tmp_path):
    other = "recipe={kind: vqvae2, optimizer: {learning_rate: 1e-3}}"
    line = one(refused(*energy_command(chain, tmp_path / "new"), other))
    assert "recipe.kind: vqvae2 trains autoencoders (launch/pretrain.py)" in line
    other = "recipe={kind: latent_energy, optimizer: {learning_rate: 1e-3}, langevin: {steps: 1, step_size: 1.0}}"
    line = one(refused(*PRETRAIN, "--run", tmp_path / "new", *chain.pretrain[4:], other))
    assert "recipe.kind: latent_energy trains energies (launch/train_energy.py)" in line
    assert not (tmp_path / "new").exists()


# Run folders


def test_images_of_another_size(refused, chain, tmp_path):
    command = (*PRETRAIN, "--run", tmp_path / "new", *chain.pretrain[4:], "autoencoder.resolution=64")
    line = one(refused(*command))
    assert "data.train holds images of 32x32, autoencoder.resolution is 64" in line and "--resolution 64" in line
    assert not (tmp_path / "new").exists()


def test_a_run_folder_of_another_configuration(refused, chain):
    lines = refused(*chain.pretrain, "training.seed=7", "autoencoder.codes=16")
    assert f"{chain.autoencoder} belongs to another configuration" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["autoencoder.codes: 32 -> 16", "training.seed: 0 -> 7"]
    lines = refused(*chain.train_energy(*STYLES), "recipe.langevin.steps=9")
    assert [line.strip() for line in lines[1:]] == ["recipe.langevin.steps: 3 -> 9"]
    command = list(chain.pretrain)
    command[3] = chain.fruit
    assert f"{chain.fruit} is not empty and is no run folder" in one(refused(*command))
    command[3] = chain.autoencoder / "config.yaml"
    assert "is a file, expected a run folder" in one(refused(*command))


def test_the_checkpoint_of_another_architecture(refused, chain, tmp_path):
    shutil.copytree(chain.autoencoder, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("channels: 16", "channels: 24"))
    checkpoints = tmp_path / "run/checkpoints"
    lines = refused(
        *PRETRAIN, "--run", tmp_path / "run", *chain.pretrain[4:], "autoencoder.channels=24", keeps=[checkpoints]
    )
    assert len(lines) > 5
    assert all("checkpoints/images-000000000960: autoencoder." in line for line in lines)
    assert all("expected shape" in line and "got" in line for line in lines)
