"""docs/tutorials/: every command is one that the programs take, and those of two pages are run, at tiny size."""

import contextlib
import io
import re
import shlex
import shutil
import sys

import foreign_autoencoders as foreign
import pytest
import torch
from PIL import Image
from programs import ROOT, _program, run
from test_transfer import TINY

from letit_dist.config import load_config
from letit_dist.data.synthetic import fruit
from letit_dist.schemas import PretrainConfig, TrainEnergyConfig

PAGES = sorted((ROOT / "docs/tutorials").glob("*.md"))


def commands(page):
    """Each command of a page's code blocks, as words."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


ALL = [pytest.param(command, id=f"{page.stem}-{i}") for page in PAGES for i, command in enumerate(commands(page))]


def program_of(command):
    """(the program, its arguments), with the launcher's own files checked."""
    if command[:2] == ["accelerate", "launch"]:
        assert command[2] == "--config_file" and (ROOT / command[3]).is_file(), command
        command = command[3:]
    elif command[0] == "sbatch":
        assert (ROOT / command[1]).is_file(), command
        command = command[1:]
    else:
        assert command[0] == "python", command
    return command[1], command[2:]


def test_there_is_a_page_for_each_reader():
    assert [page.stem for page in PAGES] == ["cluster", "folders", "own_autoencoder", "paper"]
    assert len(ALL) >= 20
    readme = (ROOT / "README.md").read_text()
    assert all(f"docs/tutorials/{page.name}" in readme for page in PAGES)


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_one_that_its_program_takes(command, monkeypatch):
    name, arguments = program_of(command)
    assert (ROOT / name).is_file(), f"{name} does not exist"
    complaint = io.StringIO()
    monkeypatch.chdir(ROOT)
    try:
        with contextlib.redirect_stderr(complaint):
            args = _program(name).parse(arguments)
    except SystemExit:
        pytest.fail(f"{name} refuses {arguments}: {complaint.getvalue()}")
    if name == "launch/export.py":
        args.out = ROOT / "no such folder"  # whatever lies in the working copy
        _program(name).check(args)
    schema = {"launch/pretrain.py": PretrainConfig, "launch/train_energy.py": TrainEnergyConfig}.get(name)
    if schema:
        load_config(schema, ROOT / args.config, args.overrides)
    if "--protocol" in arguments:
        assert (ROOT / f"configs/eval/{args.protocol}.yaml").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_exists(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not link.startswith("http")]
    assert links and all((page.parent / link).exists() for link in links), links


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as the pages take it to be: pictures, a published autoencoder, the repository's configurations."""
    for name, style in (("cats", "apple"), ("dogs", "orange")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(18):
            picture = Image.fromarray(fruit(style, 0, number, 64)[0]).resize((256, 256))
            picture.save(tmp_path / "photos" / name / f"{number:02d}.jpg")
    foreign.publish(foreign.taesd("taef2"), tmp_path / "taef2", "pth")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(page):
    """Run the commands of a page in order."""
    for command in commands(ROOT / "docs/tutorials" / f"{page}.md"):
        name, arguments = program_of(command)
        more = TINY if name in ("launch/transfer.py", "launch/train_energy.py") else ()
        done = run(name, *arguments, *more)
        assert done.code == 0, (command, done.err)


def test_the_page_of_two_folders_can_be_followed(place):
    follow("folders")
    assert (place / "runs/cats2dogs/translated/sheets/sheet-0000.png").is_file()
    assert (place / "runs/cats2dogs/translator/README.md").is_file()
    assert len(list((place / "translated").glob("*.png"))) == len(list((place / "again").glob("*.png"))) == 18


def test_the_page_of_ones_own_autoencoder_can_be_followed(place, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(place / "sd-vae")
    code = "import torch\n\nclass Codec(torch.nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
    code += "        self.down = torch.nn.Conv2d(3, width, 8, 8)\n"
    code += "        self.up = torch.nn.ConvTranspose2d(width, 3, 8, 8)\n"
    code += "    def encode(self, images):\n        return self.down(images)\n"
    code += "    def decode(self, latents):\n        return self.up(latents).sigmoid()\n"
    (place / "codec.py").write_text(code)
    monkeypatch.syspath_prepend(place)
    from codec import Codec

    torch.save(Codec(8).state_dict(), place / "weights.pth")
    try:
        follow("own_autoencoder")
    finally:
        sys.modules.pop("codec")
    assert {path.name for path in (place / "models").iterdir()} == {"taef2_256", "sd_vae", "codec"}
    assert (place / "results/reconstruction.jsonl").is_file()
    shutil.rmtree(place / "models")
