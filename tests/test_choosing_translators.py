"""The ways from folders to a translator."""

import shutil

import pytest
import torch

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator, choose_translator, open_translator
from letit_dist.errors import UserError
from letit_dist.pretrained import find_folder
from letit_dist.registry import AUTOENCODERS

CHAIN = {"steps": 3, "step_size": 2.0}


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return build_autoencoder(AUTOENCODERS.get("vqvae2").tiny).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def energy(autoencoder):
    torch.manual_seed(1)
    return build_energy(MLPEnergyConfig(hidden=16), autoencoder.latent_shape).requires_grad_(False)


@pytest.fixture
def runs(autoencoder, energy, tmp_path):
    """Run folders as the programs leave them: an autoencoder, and an energy a direction."""
    autoencoder.save_pretrained(tmp_path / "pretrain/export/images-000000000064")
    (tmp_path / "pretrain/config.yaml").write_text("autoencoder: {kind: vqvae2}\n")
    for source, target in (("apple", "orange"), ("orange", "apple")):
        folder = tmp_path / f"{source}2{target}"
        extra = {"autoencoder_fingerprint": autoencoder.fingerprint(), "langevin": CHAIN}
        energy.save_pretrained(folder / "export/images-000000000064", **extra, source=source, target=target)
        (folder / "config.yaml").write_text(f"autoencoder: {tmp_path / 'pretrain'}\n")
    return tmp_path


def test_find_folder(runs, autoencoder):
    newest = runs / "pretrain/export/images-000000000128"
    autoencoder.save_pretrained(newest)
    assert find_folder(runs / "pretrain") == newest
    assert find_folder(str(newest)) == newest
    assert find_folder(runs / "nowhere") == runs / "nowhere"  # whoever reads it says that it is not there
    # Notes, and what a killed export leaves behind, are no exports.
    (runs / "pretrain/export/notes.txt").touch()
    (runs / "pretrain/export/images-000000000999").mkdir()
    shutil.copytree(newest, runs / "pretrain/export/.images-000000000256.writing-7")
    assert find_folder(runs / "pretrain") == newest
    shutil.rmtree(newest)
    shutil.rmtree(runs / "pretrain/export/images-000000000064")
    with pytest.raises(UserError, match="the run has not finished, start it again"):
        find_folder(runs / "pretrain")
    (runs / "pretrain/config.yaml").unlink()
    with pytest.raises(UserError, match=r"neither weights .* nor a run folder"):
        find_folder(runs / "pretrain")


def test_a_run_names_its_autoencoder(runs, autoencoder, energy):
    images = torch.rand(1, 3, 16, 16)
    expected = Translator(autoencoder, energy, LangevinSampler(LangevinConfig(**CHAIN))).translate(images).images
    export = runs / "apple2orange/export/images-000000000064"
    for arguments in (
        [runs / "apple2orange"],
        [str(export), str(runs / "pretrain")],
        [runs / "apple2orange", runs / "pretrain/export/images-000000000064"],
    ):
        opened = open_translator(*arguments)
        assert opened.sampler.config.steps == 3
        assert torch.equal(opened.translate(images).images, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"is no run folder \(no config.yaml\): name its autoencoder with --autoencoder"),
        ("autoencoder: nowhere\n", r"config.yaml: its autoencoder nowhere is not there: name it with --autoencoder"),
        ("autoencoder: {kind: vqvae2}\n", "is no run of launch/train_energy.py"),
        ("energy: {kind: mlp}\n", "is no run of launch/train_energy.py"),
    ],
)
def test_a_run_that_names_no_autoencoder(runs, config, message):
    path = runs / "apple2orange/config.yaml"
    path.unlink()
    if config:
        path.write_text(config)
    with pytest.raises(UserError, match=message):
        open_translator(runs / "apple2orange")
    assert open_translator(runs / "apple2orange", runs / "pretrain")


def test_no_energy_there(runs):
    for autoencoder in (None, runs / "pretrain"):
        with pytest.raises(UserError, match=r"no such energy: .*nowhere"):
            open_translator(runs / "nowhere", autoencoder)
    with pytest.raises(UserError, match="unknown energy kind 'vqvae2'"):
        open_translator(runs / "pretrain/export/images-000000000064", runs / "pretrain")


def test_choosing_by_the_domain(runs):
    both = [str(runs / "apple2orange"), str(runs / "orange2apple")]
    assert choose_translator(both, None, "apple").energy.extra["source"] == "orange"
    assert choose_translator(both, None, "orange").energy.extra["source"] == "apple"
    assert choose_translator(both[:1], None, None).energy.extra["target"] == "orange"
    assert choose_translator(both[:1], None, "orange").energy.extra["target"] == "orange"
    for energies, to, message in (
        (both, None, "several energies fit, they go: apple to orange, orange to apple; give --to$"),
        (both, "pear", "--to pear: none of the energies goes there, they go: apple to orange, orange to apple$"),
        (both[:1], "apple", "--to apple: none of the energies goes there, they go: apple to orange$"),
        ([both[0], both[0]], "orange", "--to orange: several .* apple to orange, apple to orange; give --from$"),
    ):
        with pytest.raises(UserError, match=message):
            choose_translator(energies, None, to)
