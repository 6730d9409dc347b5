"""start_from: a run that begins with somebody's weights; what it keeps, what it refuses, and how it resumes."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import tiny_autoencoder
from programs import ROOT, files, run
from safetensors.torch import load_file

import letit_dist
from letit_dist.autoencoders.alae import ALAE
from letit_dist.autoencoders.beta_vae import BetaVAE
from letit_dist.autoencoders.vqvae2 import VQVAE2
from letit_dist.errors import UserError
from letit_dist.pretrained import find_folder

SIZES = {"resolution": 32, "channels": 8, "residual_blocks": 1, "residual_channels": 4, "code_dim": 4, "codes": 16}


@pytest.fixture(scope="module")
def parent(fruit_shards, tmp_path_factory):
    """The run folder of a tiny VQ-VAE-2 of apples, after six updates of its codebooks."""
    root = tmp_path_factory.mktemp("parent")
    (root / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "base": str(ROOT / "configs/base/vqvae2.yaml"),
                "autoencoder": {**SIZES, "noise": False},
                "data": {"train": [str(fruit_shards / "apple/train")], "workers": 0},
                "training": {"images": 48, "batch": 8},
                "intervals": {"report": 8, "samples": 1000, "checkpoint": 24},
            }
        )
    )
    done = run("launch/pretrain.py", root / "config.yaml", "--run", root / "run")
    assert done.code == 0, done.err
    return root


def finetune(parent, shards, folder, *more, start_from=None):
    """The same on oranges, from the parent's weights."""
    given = (f"start_from={start_from or parent / 'run'}", f"data.train=[{shards / 'orange/train'}]")
    return run("launch/pretrain.py", parent / "config.yaml", "--run", folder, *given, *more)


def weights(folder):
    return load_file(find_folder(folder) / "model.safetensors")


def test_a_run_begins_with_the_weights_and_the_codebooks(parent, fruit_shards, tmp_path):
    """At a rate that moves nothing only the codebooks' running means go on, from where the parent's were."""
    still = ("recipe.optimizer.learning_rate=1e-30", "training.images=16", "training.ema_half_life=100")
    done = finetune(parent, fruit_shards, tmp_path / "run", *still)
    assert done.code == 0, done.err
    before, after = weights(parent / "run"), weights(tmp_path / "run")
    books = [name for name in before if "quantizer" in name]
    assert len(books) == 8
    assert all(torch.equal(before[name], after[name]) for name in before if name not in books)
    for level in ("top_quantizer", "bottom_quantizer"):
        assert (before[f"{level}.updates"], after[f"{level}.updates"]) == (6, 8)
        counts = [found[f"{level}.cluster_size"] for found in (before, after)]
        # Running means over 0.99 of the past, of a number of rows a batch that is the same in both runs.
        rows = before[f"{level}.cluster_size"].sum() / (1 - 0.99**6)
        assert torch.allclose(counts[1].sum(), 0.99**2 * counts[0].sum() + (1 - 0.99**2) * rows, rtol=1e-4)
        assert not torch.equal(*counts)
    fingerprint = letit_dist.load_autoencoder(parent / "run").fingerprint()
    assert f"begins with the weights of {parent / 'run'} ({fingerprint})" in done.out


def test_the_optimiser_is_fresh(parent, fruit_shards, tmp_path):
    assert finetune(parent, fruit_shards, tmp_path / "run", "training.images=8").code == 0
    [checkpoint] = (tmp_path / "run/checkpoints").glob("images-*")
    state = load_file(checkpoint / "optimizer.safetensors")
    steps = {float(value) for name, value in state.items() if name.startswith("step/")}
    assert steps == {1.0}


def test_the_export_names_its_parent(parent, fruit_shards, tmp_path):
    assert finetune(parent, fruit_shards, tmp_path / "run", "training.images=8").code == 0
    fingerprint = letit_dist.load_autoencoder(parent / "run").fingerprint()
    export = find_folder(tmp_path / "run")
    extra = json.loads((export / "config.json").read_text())["extra"]
    assert extra == {"images_seen": 8, "parent": str(parent / "run"), "parent_fingerprint": fingerprint}
    card = (export / "README.md").read_text()
    assert f"| parent | {parent / 'run'} |" in card and f"| parent_fingerprint | {fingerprint} |" in card
    assert "orange/train" in card and "python launch/pretrain.py" in card and "start_from=" in card
    assert letit_dist.load_autoencoder(export).extra == extra
    assert "| parent" not in (find_folder(parent / "run") / "README.md").read_text()


def test_a_resumed_run_needs_its_parent_no_more(parent, fruit_shards, tmp_path):
    shutil.copytree(parent / "run", tmp_path / "parent")
    given = {"start_from": tmp_path / "parent"}
    assert finetune(parent, fruit_shards, tmp_path / "run", **given).code == 0
    whole = files(find_folder(tmp_path / "run"))
    for name in ("export", "checkpoints/images-000000000048"):
        shutil.rmtree(tmp_path / "run" / name)
    shutil.rmtree(tmp_path / "parent")
    done = finetune(parent, fruit_shards, tmp_path / "run", **given)
    assert done.code == 0 and "resumed at 24 of 48" in done.out and "begins with" not in done.out, done.err
    assert files(find_folder(tmp_path / "run")) == whole

    # Without any checkpoint it starts anew, and asks for its parent again.
    for name in ("export", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name)
    kept = files(tmp_path / "run")
    done = finetune(parent, fruit_shards, tmp_path / "run", **given)
    assert done.code == 2 and len(done.errors) == 1 and f"{tmp_path / 'parent'}" in done.err
    assert files(tmp_path / "run") == kept


def test_another_parent_is_another_run(parent, fruit_shards, tmp_path):
    assert finetune(parent, fruit_shards, tmp_path / "run", "training.images=8").code == 0
    kept = files(tmp_path / "run")
    other = find_folder(parent / "run")
    done = finetune(parent, fruit_shards, tmp_path / "run", "training.images=8", start_from=other)
    assert done.code == 2 and f"start_from: '{parent / 'run'}' -> '{other}'" in done.err
    assert files(tmp_path / "run") == kept


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("autoencoder.codes=32", "autoencoder.codes is 16 there and 32 here"),
        ("autoencoder.relu_skip=false", "autoencoder.relu_skip is True there and False here"),
    ],
)
def test_another_architecture_is_refused_in_one_line(parent, fruit_shards, tmp_path, change, complaint):
    done = finetune(parent, fruit_shards, tmp_path / "new", change)
    assert done.code == 2 and len(done.errors) == 1
    assert f"start_from: the weights in {parent / 'run'} are of another architecture: {complaint}" in done.err
    assert not (tmp_path / "new").exists()


def test_weights_that_cannot_be_had_are_refused(parent, fruit_shards, tmp_path):
    BetaVAE(BetaVAE.tiny).save_pretrained(tmp_path / "beta")
    shutil.copytree(find_folder(parent / "run"), tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    complaints = {
        "beta": "it is a beta_vae, autoencoder.kind is vqvae2",
        "damaged": "is damaged or not a safetensors file",
        "empty": "neither weights (config.json and model.safetensors) nor a run folder",
        "gone": "does not exist",
    }
    for name, complaint in complaints.items():
        done = finetune(parent, fruit_shards, tmp_path / "new", start_from=tmp_path / name)
        assert done.code == 2 and len(done.errors) == 1 and complaint in done.err, done.err
        assert not (tmp_path / "new").exists()


def test_a_growing_recipe_would_unlearn_it(tmp_path):
    ALAE(ALAE.tiny).save_pretrained(tmp_path / "alae")
    config = ROOT / "configs/debug/alae_fruit.yaml"
    done = run("launch/pretrain.py", config, "--run", tmp_path / "new", f"start_from={tmp_path / 'alae'}")
    assert done.code == 2 and "is grown already, give recipe.growth=null" in done.err
    assert not (tmp_path / "new").exists()


def test_what_no_weight_depends_on_may_differ(tmp_path):
    ours = tiny_autoencoder(1, restart_below=0.5, restart_every=3, decay=0.9)
    larger = VQVAE2(ours.config.model_copy(update={"resolution": 64, "decay": 0.99, "restart_below": 0.0}))
    ours.save_pretrained(tmp_path / "ours")
    origin = larger.start_from(tmp_path / "ours")
    assert origin == {"parent": str(tmp_path / "ours"), "parent_fingerprint": ours.fingerprint()}
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in larger.state_dict().items())
    assert larger.config.resolution == 64 and larger.top_quantizer.decay == 0.99


def test_a_refusal_changes_nothing(tmp_path):
    ours, other = tiny_autoencoder(1), tiny_autoencoder(2, codes=32)
    ours.save_pretrained(tmp_path / "ours")
    before = other.fingerprint()
    with pytest.raises(UserError, match="codes is 16 there and 32 here"):
        other.start_from(tmp_path / "ours")
    assert other.fingerprint() == before


def test_check_says_whose_weights_and_whether_they_fit(parent, fruit_shards, tmp_path):
    fingerprint = letit_dist.load_autoencoder(parent / "run").fingerprint()
    done = finetune(parent, fruit_shards, tmp_path / "new", "--check")
    assert done.code == 0 and f"# start_from: {parent / 'run'}, fingerprint {fingerprint}" in done.out
    done = finetune(parent, fruit_shards, tmp_path / "new", "--check", start_from="nowhere/else")
    assert done.code == 0 and "# start_from: nowhere/else is an id on the Hub, not looked at" in done.out
    done = finetune(parent, fruit_shards, tmp_path / "new", "--check", "autoencoder.codes=32")
    assert done.code == 2 and "of another architecture" in done.err
    assert not (tmp_path / "new").exists()


def test_a_translator_folder_keeps_the_parent_of_its_autoencoder(tmp_path):
    from letit_dist.energy.convolutional import ConvEnergyConfig
    from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
    from letit_dist.energy.models import build_energy
    from letit_dist.energy.translate import Translator

    tiny_autoencoder().save_pretrained(tmp_path / "a", parent="runs/imagenet", parent_fingerprint="0123")
    autoencoder = letit_dist.load_autoencoder(tmp_path / "a")
    energy = build_energy(ConvEnergyConfig(), autoencoder.latent_shape)
    translator = Translator(autoencoder, energy, LangevinSampler(LangevinConfig(steps=2, step_size=1.0)))
    translator.save_pretrained(tmp_path / "translator", with_autoencoder=True)
    kept = letit_dist.Translator.from_pretrained(tmp_path / "translator").autoencoder
    assert kept.extra == {"parent": "runs/imagenet", "parent_fingerprint": "0123"}
