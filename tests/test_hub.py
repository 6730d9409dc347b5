"""Folders with model cards, translators among them; the Hub and its absence; five lines of Python."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_autoencoder
from hub_server import Hub
from PIL import Image
from programs import ROOT, run

import letit_dist
from letit_dist import hub, pretrained
from letit_dist.data.inputs import open_images
from letit_dist.energy.convolutional import ConvEnergyConfig
from letit_dist.energy.folders import save_translators
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator
from letit_dist.evaluation.translating import TranslateOptions, translate_all


def translator(source: str | None = "cat", target: str | None = "dog", seed: int = 0) -> Translator:
    """On a VQ-VAE-2 for 32 pixels, with random weights and a noisy chain."""
    autoencoder = tiny_autoencoder().eval().requires_grad_(False)
    torch.manual_seed(seed)
    energy = build_energy(ConvEnergyConfig(), autoencoder.latent_shape).eval().requires_grad_(False)
    energy.extra = {"source": source, "target": target, "images_seen": 5}
    sampler = LangevinSampler(LangevinConfig(steps=3, step_size=0.5, noise_scale=0.1))
    return Translator(autoencoder, energy, sampler)


def images(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(letit_dist.UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def change(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Cards


def test_a_card_says_what_is_known_and_what_is_not():
    card = letit_dist.Card(
        data="my cats", licence="cc-by-4.0", command="python x.py", metrics={"FID": 12.34567, "a|b": 1}
    )
    text = card.text("cats", {"steps": 3}, "import letit_dist")
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    import yaml

    assert yaml.safe_load(front) == {
        "library_name": "letit_dist",
        "tags": ["letit_dist", "image-to-image"],
        "license": "cc-by-4.0",
        "letit_dist": {"data": "my cats", "command": "python x.py", "metrics": dict(card.metrics)},
    }
    for part in (
        "# cats",
        "my cats",
        "```\npython x.py\n```",
        "| FID | 12.35 |",
        "| a\\|b | 1 |",
        "| steps | 3 |",
        "```python\nimport",
    ):
        assert part in body
    bare = letit_dist.Card().text("cats", {}, "")
    assert bare.count("not stated") == 3 and "not yet measured" in bare and "license" not in bare.split("---")[1]


def test_weights_with_a_card_that_stays(tmp_path):
    autoencoder = tiny_autoencoder()
    autoencoder.save_pretrained(tmp_path / "a", card=letit_dist.Card(data="fruit"), images_seen=3)
    text = (tmp_path / "a/README.md").read_text()
    assert "fruit" in text and autoencoder.fingerprint() in text and "8 x 8 x 8" in text
    (tmp_path / "a/README.md").write_text("mine")
    autoencoder.save_pretrained(tmp_path / "a")  # without a card: what is there stays
    assert (tmp_path / "a/README.md").read_text() == "mine"
    autoencoder.save_pretrained(tmp_path / "a", card=letit_dist.Card())
    assert "not stated" in (tmp_path / "a/README.md").read_text()
    assert letit_dist.load_autoencoder(tmp_path / "a").fingerprint() == autoencoder.fingerprint()
    energy = translator().energy
    energy.save_pretrained(tmp_path / "e", card=letit_dist.Card(licence="mit"), target="dog")
    text = (tmp_path / "e/README.md").read_text()
    assert 'license: "mit"' in text and "| target | dog |" in text and energy.fingerprint() in text


# Folders of translators


@pytest.mark.parametrize("inside", [True, False])
def test_a_translator_there_and_back(tmp_path, inside):
    one = translator()
    one.autoencoder.save_pretrained(tmp_path / "autoencoder")
    one.save_pretrained(tmp_path / "cats2dogs", with_autoencoder=inside)
    assert (tmp_path / "cats2dogs/autoencoder").exists() == inside
    given = {} if inside else {"autoencoder": tmp_path / "autoencoder"}
    back = Translator.from_pretrained(tmp_path / "cats2dogs", **given)
    assert back.sampler.config == one.sampler.config
    assert back.energy.extra["source"] == "cat" and back.energy.extra["images_seen"] == 5
    noises = [t.noise(0, [0, 1]) for t in (one, back)]
    found, wanted = (t.translate(images(), noise=n).images for t, n in zip((back, one), noises, strict=True))
    assert torch.equal(found, wanted)
    card = (tmp_path / "cats2dogs/README.md").read_text()
    for part in ("cat to dog", "3 steps of 0.5, noise 0.1", one.autoencoder.fingerprint(), one.energy.fingerprint()):
        assert part in card
    # An autoencoder that is named by where it lay is found there again.
    back.save_pretrained(tmp_path / "again")
    assert Translator.from_pretrained(tmp_path / "again").energy.fingerprint() == one.energy.fingerprint()


def test_several_translators_in_one_folder(tmp_path):
    ways = [translator("cat", "dog"), translator("dog", "cat", seed=1), translator("fox", "dog", seed=2)]
    save_translators(ways, tmp_path / "all", with_autoencoder=True)
    assert "from cat to dog" not in error_of(Translator.from_pretrained, tmp_path / "all")
    assert "give --to" in error_of(Translator.from_pretrained, tmp_path / "all")
    assert "--to dog: several energies fit" in error_of(Translator.from_pretrained, tmp_path / "all", to="dog")
    for way in ways:
        source, target = way.energy.extra["source"], way.energy.extra["target"]
        found = Translator.from_pretrained(tmp_path / "all", to=target, source=source)
        assert found.energy.fingerprint() == way.energy.fingerprint()
    save_translators([translator(None, None), translator(None, None, seed=1)], tmp_path / "nameless")
    assert {p.name for p in (tmp_path / "nameless/energies").iterdir()} == {"any2target", "any2target-2"}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    one, other = translator(), translator(seed=1)
    one.save_pretrained(tmp_path / "t", with_autoencoder=True, card=letit_dist.Card(data="first"))
    other.save_pretrained(tmp_path / "t", with_autoencoder=True)
    assert Translator.from_pretrained(tmp_path / "t").energy.fingerprint() == other.energy.fingerprint()
    assert "first" in (tmp_path / "t/README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert "will not replace" in error_of(one.save_pretrained, tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"
    strange = translator()
    strange.autoencoder = tiny_autoencoder(seed=3)
    assert "different autoencoders" in error_of(save_translators, [one, strange], tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_programs_take_such_a_folder(tmp_path):
    translator().save_pretrained(tmp_path / "t", with_autoencoder=True)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "picture.png")
    done = run("launch/translate.py", tmp_path / "picture.png", "--energy", tmp_path / "t", "--out", tmp_path / "out")
    assert done.code == 0 and (tmp_path / "out/picture.png").is_file(), done.err


# What does not belong together


def test_an_energy_of_another_autoencoder(tmp_path):
    translator().save_pretrained(tmp_path / "t")
    tiny_autoencoder(seed=1).save_pretrained(tmp_path / "other")
    message = error_of(Translator.from_pretrained, tmp_path / "t", autoencoder=tmp_path / "other")
    assert "was trained on the latents of autoencoder" in message and "\n" not in message
    message = error_of(Translator.from_pretrained, tmp_path / "t")
    assert "its autoencoder" in message and "--autoencoder FOLDER" in message and "\n" not in message


@pytest.mark.parametrize("written", ["99.0.0", "0.2", "1.0.0rc1"])
def test_a_config_of_a_newer_version(tmp_path, written):
    one = translator()
    one.save_pretrained(tmp_path / "t", with_autoencoder=True)
    for folder, call in (
        (tmp_path / "t/autoencoder", letit_dist.load_autoencoder),
        (tmp_path / "t/energies/cat2dog", letit_dist.load_energy),
        (tmp_path / "t", Translator.from_pretrained),
    ):
        before = (folder / "config.json").read_text()
        change(folder / "config.json", letit_dist_version=written)
        message = error_of(call, folder)
        assert f"was written by letit_dist {written}, this is {letit_dist.__version__}" in message
        assert "\n" not in message and "pip install --upgrade letit_dist" in message
        (folder / "config.json").write_text(before)
    for same in (letit_dist.__version__, "0.1.99", "0.0.1"):
        change(tmp_path / "t/config.json", letit_dist_version=same)
        Translator.from_pretrained(tmp_path / "t")


def test_foreign_keys_and_damage(tmp_path):
    one = translator()
    one.save_pretrained(tmp_path / "t", with_autoencoder=True)
    energy = tmp_path / "t/energies/cat2dog"
    tree = json.loads((energy / "config.json").read_text())
    own = {k: v for k, v in tree.items() if k not in ("fingerprint", "letit_dist_version", "extra")}
    strange = {**one.energy.state_dict(), "stray": torch.zeros(2)}
    shutil.rmtree(energy)
    pretrained.write_folder(energy, own, strange, tree["extra"])
    message = error_of(Translator.from_pretrained, tmp_path / "t")
    assert "unexpected stray (2,)" in message and "\n" not in message
    for changes, words in (
        ({"kind": "vqvae2"}, "no model.safetensors"),
        ({"energies": {}}, "not the config of translators"),
        ({"energies": {"../../x": {}}}, "'../../x' is no name of a folder"),
        ({"energies": {"gone": {}}}, "no weights at"),
    ):
        one.save_pretrained(tmp_path / "bad", with_autoencoder=True)
        change(tmp_path / "bad/config.json", **changes)
        assert words in error_of(Translator.from_pretrained, tmp_path / "bad", autoencoder=tmp_path / "t/autoencoder")
        shutil.rmtree(tmp_path / "bad")


# The Hub


def python(code: str, address: str, home, **more) -> subprocess.CompletedProcess:
    """Run Python in its own process, in an empty folder, with the Hub at `address`."""
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "HF_TOKEN": "hf_any", **more}
    (home / "empty").mkdir(exist_ok=True)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=home / "empty")


def test_what_is_sent_to_the_hub_is_fetched_from_it(tmp_path):
    one = translator()
    one.save_pretrained(tmp_path / "t", with_autoencoder=True)
    send = f"""
import letit_dist
from letit_dist import Card, Translator
one = Translator.from_pretrained({str(tmp_path / "t")!r})
print(one.push_to_hub("you/cats2dogs", card=Card(data="cats and dogs")))
print(one.autoencoder.push_to_hub("you/backbone", card=Card(licence="mit")))
print(one.energy.push_to_hub("you/energy"))
"""
    fetch = """
import letit_dist
one = letit_dist.Translator.from_pretrained("you/cats2dogs")
print(one.energy.fingerprint(), one.autoencoder.fingerprint(), one.energy.extra["target"])
two = letit_dist.Translator.from_pretrained("you/energy", autoencoder="you/backbone")
print(two.energy.fingerprint(), letit_dist.load_autoencoder("you/backbone").fingerprint())
print(letit_dist.load_energy("you/energy").fingerprint())
"""
    with Hub() as hub_server:
        done = python(send, hub_server.address, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == f"{hub_server.address}/you/cats2dogs"
        kept = hub_server.repositories
        assert set(kept) == {"you/cats2dogs", "you/backbone", "you/energy"}
        assert "cats and dogs" in kept["you/cats2dogs"]["README.md"].decode()
        assert {"config.json", "autoencoder/config.json", "energies/cat2dog/model.safetensors"} < set(
            kept["you/cats2dogs"]
        )
        done = python(fetch, hub_server.address, tmp_path)
        assert done.returncode == 0, done.stderr
        energy, autoencoder = one.energy.fingerprint(), one.autoencoder.fingerprint()
        assert done.stdout.split() == [energy, autoencoder, "dog", energy, autoencoder, energy]
        asked = len(hub_server.requests)
        local = f"import letit_dist; letit_dist.Translator.from_pretrained({str(tmp_path / 't')!r})"
        assert python(local, hub_server.address, tmp_path).returncode == 0
        assert len(hub_server.requests) == asked  # a path that exists asks nobody
        missing = python("import letit_dist; letit_dist.load_autoencoder('you/nothing')", hub_server.address, tmp_path)
    assert "you/nothing: no such folder here, and no repository of that name on the Hub" in missing.stderr
    # The network is gone; what was fetched before is still there.
    done = python(fetch, hub_server.address, tmp_path)
    assert done.returncode == 0 and done.stdout.split()[0] == one.energy.fingerprint(), done.stderr


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_hub_id_without_a_network_is_one_line(tmp_path, more):
    calls = ("load_autoencoder", "load_energy", "Translator.from_pretrained")
    code = "import letit_dist\n"
    for call in calls:
        code += f"try: letit_dist.{call}('you/gone')\nexcept letit_dist.UserError as e: print(e)\n"
    done = python(code, "http://127.0.0.1:9", tmp_path, **more)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls)
    for line in lines:
        for part in ("you/gone: no such folder here", "`hf download you/gone --local-dir models/gone`", "config.json"):
            assert part in line
    # Who does as that line says can go on to name other models of that owner.
    (tmp_path / "empty" / re.search(r"--local-dir ([\w/]+)`", lines[0])[1]).mkdir(parents=True)
    again = python(code.replace("you/gone", "you/other"), "http://127.0.0.1:9", tmp_path, **more).stdout.splitlines()
    assert len(again) == len(calls)
    assert all("you/other: no such folder here, and the Hub cannot be asked" in line for line in again)
    send = "import letit_dist\nfrom letit_dist.autoencoders.base import build_autoencoder\n"
    send += "from letit_dist.registry import AUTOENCODERS\n"
    send += "try: build_autoencoder(AUTOENCODERS.get('beta_vae').tiny).push_to_hub('you/new')\n"
    send += "except letit_dist.UserError as e: print(e)"
    (line,) = python(send, "http://127.0.0.1:9", tmp_path, **more).stdout.splitlines()
    assert "cannot send you/new to the Hub" in line and "hf upload you/new FOLDER" in line


def test_only_what_can_be_no_path_is_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub.is_hub_id("owner/name-1.0") and hub.is_hub_id("o/n")
    for path in ("runs/misspelt", "/owner/name", "./owner/name", "a/b/c", "name", "../x/y", "owner/", tmp_path / "x/y"):
        assert not hub.is_hub_id(path), path
    message = error_of(letit_dist.load_autoencoder, "runs/misspelt")
    assert "runs/misspelt: it does not exist" in message
    assert message.endswith("the Hub is not asked for it, because there is a folder runs here")
    assert "Hub" not in error_of(letit_dist.load_autoencoder, tmp_path / "gone")


@pytest.mark.parametrize("where", ["folder", "pipeline", "Hub"])
def test_a_model_of_diffusers_in_place_of_ours_gets_a_hint(tmp_path, where):
    files = {"config.json": b'{"_class_name": "AutoencoderKL"}', "diffusion_pytorch_model.safetensors": b"x"}
    if where == "pipeline":
        files = {"model_index.json": b"{}", "vae/config.json": files["config.json"]}
    folder = tmp_path / "sd-vae"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if where != "Hub":
        message = error_of(letit_dist.load_autoencoder, folder)
        assert f"{folder} holds a model of diffusers" in message and f"--from diffusers {folder} " in message
        return
    with Hub() as server:
        server.repositories["stabilityai/sd-vae"] = files
        code = "import letit_dist\ntry: letit_dist.load_autoencoder('stabilityai/sd-vae')\n"
        done = python(code + "except letit_dist.UserError as e: print(e)", server.address, tmp_path)
    (line,) = done.stdout.splitlines()
    assert "holds a model of diffusers" in line and "launch/export.py --from diffusers /" in line


# In Python


def test_the_five_lines_of_the_readme(chain, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(import letit_dist\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line]) == 5
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/cats2dogs").symlink_to(chain.energy())
    pixels = np.random.default_rng(0).integers(0, 256, (50, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    shutil.move(tmp_path / "cat.png", tmp_path / "cat.jpg")  # lossless, so that the programs see the same pixels
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    found = np.asarray(Image.open("dog.png"))
    options = TranslateOptions(strength=0.8)
    list(translate_all(names["translator"], open_images(tmp_path / "cat.jpg", 32), tmp_path / "out", options))
    assert np.array_equal(found, np.asarray(Image.open(tmp_path / "out/cat.png")))
    plain = letit_dist.translate_picture(names["translator"], Image.open("cat.jpg"), strength=0.0)
    assert not np.array_equal(found, np.asarray(plain))


def test_pictures_of_every_sort(chain):
    one = Translator.from_pretrained(chain.energy())
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        assert letit_dist.translate_picture(one, Image.new(mode, (33, 60))).size == (32, 32)
    assert "cannot be read" in error_of(letit_dist.translate_picture, one, Image.new("F", (32, 32)))
    assert "strength" in error_of(letit_dist.translate_picture, one, Image.new("L", (32, 32)), strength=2.0)
