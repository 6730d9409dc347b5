"""docs/tutorials/: every command is one that the programs take, and they are run, at tiny size."""

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
from source_trees import celebamask_tree
from test_trackers import HAS_TENSORBOARD
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
    """A folder as the pages take it to be: pictures, a published autoencoder, the repository's files to launch with."""
    for name, style in (("cats", "apple"), ("dogs", "orange")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(18):
            picture = Image.fromarray(fruit(style, 0, number, 64)[0]).resize((256, 256))
            picture.save(tmp_path / "photos" / name / f"{number:02d}.jpg")
    foreign.publish(foreign.taesd("taef2"), tmp_path / "taef2", "pth")
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(page, change=None):
    """Run the commands of a page in order, each on this process alone, as `change` (program, arguments) makes them
    tiny; where that gives None a command is left out. Returns the programs that were run, and how each ended."""
    ran = []
    for command in commands(ROOT / "docs/tutorials" / f"{page}.md"):
        name, arguments = program_of(command)
        more = TINY if name in ("launch/transfer.py", "launch/train_energy.py") else ()
        words = [*arguments, *more] if change is None else change(name, arguments)
        if words is None:
            continue
        done = run(name, *words)
        assert done.code == 0, (command, done.err)
        ran.append((name, done))
    return ran


SMALLER = {"1024": "32", "512": "16", "256": "8", "128": "4"}  # pixels
TINY_ALAE = (
    *("autoencoder.resolution=32", "autoencoder.start_channels=8", "autoencoder.max_channels=16"),
    *("autoencoder.latent_dim=16", "autoencoder.mapping_layers=2", "recipe.growth.images_per_level=16"),
    *("recipe.optimizer.learning_rate=0.002", "training.images=80", "training.batch=16", "training.microbatch=8"),
    *("intervals.report=16", "intervals.samples=80", "intervals.checkpoint=40", "data.workers=0"),
)


def test_the_page_of_a_cluster_can_be_followed_on_one_process(place):
    (place / "ffhq-dataset").mkdir()
    for number in range(8):
        Image.fromarray(fruit("apple", 0, number, 32)[0]).resize((1024, 1024)).save(
            place / f"ffhq-dataset/{number:05d}.png"
        )
    men = ("--out", place / "data/celebahq1024/male/train", "--resolution", 32)
    assert run("shards/pack.py", place / "photos/cats", *men).code == 0

    def change(name, arguments):
        if name == "shards/pack.py":
            return [SMALLER.get(word, word) for word in arguments]
        kept = [word for word in arguments if HAS_TENSORBOARD or "tensorboard" not in word]
        kept = [str(ROOT / word) if word.startswith("launch/deepspeed/") else word for word in kept]
        return [*kept, *TINY_ALAE] if name == "launch/pretrain.py" else arguments

    ran = follow("cluster", change)
    assert [name.rpartition("/")[2] for name, _ in ran] == [
        *("pack.py", "check.py"),
        *["pretrain.py"] * 4,
        "encode_latents.py",
    ]
    assert "16 ranks" in ran[2][1].out and "16 ranks" in ran[3][1].out
    assert bool(list((place / "runs/ffhq1024").rglob("tensorboard/**/events*"))) == HAS_TENSORBOARD
    lines = (place / "runs/ffhq1024/stats.jsonl").read_text().splitlines()
    assert len(lines) == 5  # the second command found the run finished
    assert (place / "data/latents/ffhq1024/male/index.json").is_file()


# Commands of the page that need what is not drawn here, and where they are run instead.
ELSEWHERE = {
    "launch/pretrain.py": "tests/test_start_from.py",
    "eval/backbones.py": "tests/test_backbones.py",
    "eval/fidelity.py": "tests/test_fidelity.py",
}


def test_the_page_of_the_paper_can_be_followed_at_tiny_size(place, chain):
    (place / "ffhq").mkdir()
    shutil.copy(ROOT / "tests/golden/alae_checkpoint.pth", place / "ffhq/model_submitted.pth")
    celebamask_tree(place / "CelebAMask-HQ")
    shared = [f"autoencoder={chain.autoencoder}"]
    shared += [f"data.{side}={chain.latents(style)}" for side, style in (("source", "apple"), ("target", "orange"))]
    small = [setting for setting in TINY if not setting.startswith("energy.")]

    def change(name, arguments):
        assert name not in ELSEWHERE or (ROOT / ELSEWHERE[name]).is_file()
        if name in ELSEWHERE:
            return None
        if name == "shards/pack.py":
            return [*({"1024": "128", "512": "64", "256": "32"}.get(word, word) for word in arguments), "--enlarge"]
        if name == "launch/train_energy.py":
            # The backbones of these files are many GPUs' work: one of the tests' own in their place.
            return [*arguments, *small, *([*shared, "energy.multiplier=1"] if "vqvae2" in arguments[0] else [])]
        return None if arguments[0] == "pies" else arguments  # which tests/test_pies.py draws

    ran = [name for name, _ in follow("paper", change)]
    assert ran.count("launch/train_energy.py") == 5 and ran.count("eval/paper.py") == 3
    assert {"launch/export.py", "shards/pack.py", "eval/weights.py"} < set(ran)
    assert ran.count("launch/encode_latents.py") == 2
    energies = ("male2female", "apple2orange", "photo2vangogh", "photo2ukiyo", "apple2orange_finetuned")
    assert all(list((place / "runs" / energy / "export").iterdir()) for energy in energies)
    assert (place / "figures/shift").is_dir() and (place / "figures/compare").is_dir()


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
