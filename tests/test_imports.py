"""Who may import whom, read from the source; and what a light import must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {
    "winograd",
    "narrow",
    "compiled",
    "errors",
    "ranks",
    "registry",
    "rng",
    "schedule",
    "pretrained",
    "pictures",
    "memory",
    "config",
    "files",
    "published",
    "hub",
    "cards",
    "__init__",
}
ALLOWED = {
    "autoencoders": set(),
    "losses": set(),
    "data": set(),
    "energy": {"autoencoders.base"},
    "recipes": {"autoencoders", "energy", "losses"},
    "training": {"recipes", "data"},
    "evaluation": {"autoencoders", "energy", "data"},
    "interchange": {"autoencoders", "energy.langevin", "energy.models", "energy.mlp", "energy.convolutional"},
}
# Only these may know the autoencoders from inside the energy package.
ENERGY_WITH_AUTOENCODERS = {"translate", "baselines"}
LIBRARY_HOMES = {
    "accelerate": {"training"},
    "deepspeed": {"training"},
    "webdataset": {"data"},
    "lpips": {"losses", "evaluation"},
    "diffusers": {"autoencoders"},
    "gradio": {"demo"},
    "numba": {"leaf"},
    "torch_fidelity": {"evaluation"},
    "transformers": {"evaluation"},
}


def modules() -> list[Path]:
    return sorted((ROOT / "letit_dist").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, at any depth; not what it names for a type checker alone."""
    names = set()
    tree = ast.parse(path.read_text())
    checked = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unseen = {id(inner) for node in checked for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "letit_dist").with_suffix("").parts
    return parts[0] if len(parts) > 1 or parts[0] in ALLOWED else "leaf"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = room(path)
    if path in (ROOT / "letit_dist/__init__.py", ROOT / "letit_dist/demo.py"):
        return  # the door, which names what is in every room and enters none (the tests below), and a program
    for name in sorted(imported(path)):
        top, _, rest = name.partition(".")
        if top in LIBRARY_HOMES:
            assert own in LIBRARY_HOMES[top], f"{path}: {top} belongs in {LIBRARY_HOMES[top]}"
        if top != "letit_dist" or not rest:
            continue
        inner = rest.split(".")[0]
        if inner in LEAVES or inner not in ALLOWED or inner == own:
            continue
        assert own != "leaf", f"{path}: a leaf imports {name}"
        allowed = ALLOWED[own]
        assert any(rest == a or rest.startswith(a + ".") for a in allowed), f"{path}: {own} may not import {name}"
        if own == "energy" and inner == "autoencoders":
            assert path.stem in ENERGY_WITH_AUTOENCODERS, f"{path}: only energy.translate knows autoencoders"


def test_programs_import_torch_only_after_parsing():
    for path in [*ROOT.glob("launch/*.py"), *ROOT.glob("shards/*.py"), *ROOT.glob("eval/*.py")]:
        source = path.read_text()
        if "__main__" not in source:
            continue  # no program, but what one imports when it has parsed
        tree = ast.parse(source)
        top = {n.names[0].name.split(".")[0] for n in tree.body if isinstance(n, ast.Import)}
        assert not top & {"torch", "accelerate", "letit_dist"}, f"{path}: --help would wait for {top}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import letit_dist", ["torch", "numpy", "PIL", "pydantic", "accelerate", "deepspeed", "torch_fidelity"]),
        ("import letit_dist; dir(letit_dist)", ["torch"]),
        ("import letit_dist.config", ["torch", "accelerate"]),
        (
            "from letit_dist import *",
            ["accelerate", "deepspeed", "webdataset", "torch_fidelity", "lpips", "diffusers", "huggingface_hub"],
        ),
        (
            "from letit_dist.autoencoders.base import load_autoencoder",
            ["accelerate", "deepspeed", "webdataset", "torch_fidelity", "lpips", "diffusers"],
        ),
        ("from letit_dist.energy.translate import Translator", ["accelerate", "deepspeed", "webdataset"]),
    ],
)
def test_a_light_import_stays_light(statement, absent):
    code = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_the_import_takes_less_than_a_second_and_a_half():
    """The best of three, so that a busy machine is not taken for a slow import."""
    code = "import time; begun = time.perf_counter(); import letit_dist; print(time.perf_counter() - begun)"
    command = [sys.executable, "-c", code]
    assert min(float(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout) for _ in range(3)) < 1.5


def test_every_name_of_the_door_leads_somewhere():
    import letit_dist

    for name in letit_dist.__all__:
        assert getattr(letit_dist, name) is not None
    assert set(letit_dist.__all__) <= set(dir(letit_dist))
    with pytest.raises(AttributeError, match="no attribute 'load_autoencodr'"):
        letit_dist.load_autoencodr  # noqa: B018
