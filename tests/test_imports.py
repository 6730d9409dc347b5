"""Who may import whom, read from the source; and what a light import must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {
    "errors",
    "registry",
    "rng",
    "schedule",
    "pretrained",
    "pictures",
    "memory",
    "config",
    "files",
    "published",
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
    "interchange": {"autoencoders", "energy.models"},
}
# Only these may know the autoencoders from inside the energy package.
ENERGY_WITH_AUTOENCODERS = {"translate", "baselines"}
LIBRARY_HOMES = {
    "accelerate": {"training"},
    "deepspeed": {"training"},
    "webdataset": {"data"},
    "lpips": {"losses", "evaluation"},
    "diffusers": {"autoencoders"},
    "torch_fidelity": {"evaluation"},
}


def modules() -> list[Path]:
    return sorted((ROOT / "letit_dist").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
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
        ("import letit_dist.config", ["torch", "accelerate"]),
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
