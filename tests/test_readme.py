"""The README's file tree is the tree, and the commands it names exist."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TREE = README.split("## Files", 1)[1].split("```")[1]


def test_every_module_and_program_stands_in_the_tree():
    names = set(re.findall(r"[\w.]+\.(?:py|sh|md|cfg|toml)", TREE))
    for path in [
        *ROOT.glob("letit_dist/**/*.py"),
        *ROOT.glob("launch/*.*"),
        *ROOT.glob("shards/*.*"),
        *ROOT.glob("eval/*.*"),
        *ROOT.glob("eval/speed/*.py"),
    ]:
        if path.name != "__init__.py":
            assert path.name in names, f"{path.relative_to(ROOT)} has no line in the README's tree"


def test_every_line_of_the_tree_exists():
    existing = {
        p.name for folder in ("letit_dist", "launch", "shards", "eval", "docs") for p in (ROOT / folder).rglob("*")
    }
    existing |= {p.name for p in ROOT.iterdir()} | {"run", "run.sh"}
    for line in TREE.strip().splitlines():
        for name in re.match(r"\s*((?:[\w./]+\s{1,2})*)", line + " ").group(1).split():
            assert Path(name).name in existing, f"{name} stands in the README's tree and does not exist"


def test_what_the_readme_runs_and_links_exists():
    paths = re.findall(r"(?:launch|shards|eval|tests|configs)/[\w/]+\.(?:py|sh|yaml)", README)
    paths += [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(paths) > 15
    for path in sorted(set(paths)):
        assert (ROOT / path).exists(), f"{path} is named in the README and does not exist"


def test_commands_of_the_readme_are_executable():
    for name in ("launch/quickstart.sh", "tests/run.sh", ".ci/run"):
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


def test_every_fault_names_tests_that_exist():
    table = README.split("## What a run survives", 1)[1].split("## Files")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    for row in rows:
        held = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row.split("|")[3])
        assert held, f"no test holds: {row}"
        for file, name in held:
            path = ROOT / "tests" / file
            assert path.is_file() and (not name or f"\ndef {name}(" in path.read_text()), f"{file}::{name}"
