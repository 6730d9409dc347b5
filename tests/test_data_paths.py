"""Every path below data/ that a document, a configuration or a launch file reads is one that some command there makes.

The commands of docs/data.md say where the sets lie; all other places have to agree with them.
"""

import re

import pytest
import yaml
from programs import ROOT

from letit_dist.config import load_config
from letit_dist.evaluation.paper_tables import TablesConfig

PLACES = ("README.md", "docs/*.md", "docs/tutorials/*.md", "configs/**/*.yaml")
PLACES += ("launch/*.py", "launch/*.sh", "launch/kubernetes/*.yaml", "launch/slurm/*")
PLACES += ("shards/*.md", "shards/*.py", "eval/*.md", "eval/*.py")
FILES = sorted(path for pattern in PLACES for path in ROOT.glob(pattern))
GIVEN = ("data/emoji",)  # pictures that docs/emoji.md asks to be put there
PACK, ENCODE = r"shards/pack\.py", r"launch/encode_latents\.py"
# What makes shards of one set other shards.
SETTINGS = ("--attribute", "--resolution", "--format")


def text_of(path):
    """The text with its wrapped commands, also those in comments and docstrings, on one line."""
    return re.sub(r"\s*\\+\n\s*#?\s*", " ", path.read_text())


def commands(text, program):
    """[(first argument, {option: its values})] of each complete command of a program."""
    found = []
    for line in re.findall(rf"{program} ([^`\n|()]*)", text):
        first, *parts = re.split(r" (?=--)", line.split("  ")[0].strip())
        given = [first, *parts] if first.startswith("--") else parts
        options = {words[0]: tuple(words[1:]) for words in (part.split() for part in given)}
        if options.get("--out"):
            found.append((first, options))
    return found


def sets():
    """{folder: (what is packed, settings, parts)} of the sets in docs/data.md; parts are domain/split or split."""
    found = {}
    for line in text_of(ROOT / "docs/data.md").splitlines():
        if line.startswith("| ") and "shards/pack.py" in line:
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            [(source, options)] = commands(cells[1], PACK)
            domains = re.findall(r"`(\w+)`", cells[2])
            splits = re.findall(r"\b(train|val|test)\b", cells[3])
            assert splits, f"docs/data.md does not say which splits {cells[0]} has"
            parts = {f"{domain}/{split}" for domain in domains for split in splits} or set(splits)
            found[options["--out"][0]] = source, {key: options.get(key) for key in SETTINGS}, parts
    return found


SETS = sets()


def looped(text, out):
    """The folders that `out` of a command inside loops of the shell becomes: one for each value of each variable."""
    folders = {out}
    for name, values in re.findall(r"for (\w+) in ([^;\n]+);? *(?:do|\n)", text):
        folders = {folder.replace(f"${name}", value) for folder in folders for value in values.split()}
    return folders


def made():
    """{folder below data/ that holds shards or latents}, by all commands of all files."""
    folders = {f"{folder}/{part}" for folder, (*_, parts) in SETS.items() for part in parts}
    for path in FILES:
        for source, options in commands(text_of(path), PACK):
            out = options["--out"][0]
            if source == "builtin:fruit":
                folders |= {f"{out}/{fruit}/{split}" for fruit in ("apple", "orange") for split in ("train", "test")}
            elif out not in SETS:
                folders |= looped(text_of(path), out)
    for path in FILES:
        for _, options in commands(text_of(path), ENCODE):
            out = options["--out"][0]
            folders |= looped(text_of(path), out)
            parent, _, domain = out.rpartition("/")
            # The file says `(the same for ...)`: every domain of that set.
            shards = options.get("--shards", ("",))[0]
            if f"/{domain}/" in shards:
                root = shards.partition(f"/{domain}/")[0]
                siblings = {folder.split("/")[2] for folder in folders if folder.startswith(f"{root}/")}
                folders |= {f"{parent}/{sibling}" for sibling in siblings}
    return folders


MADE = made()


def read(path):
    """[(path below data/ as it stands, pattern of what it may name)]"""
    text = text_of(path).replace("/data/shards/", " data/")
    found = re.findall(r"(?<![\w/.~-])data/[A-Za-z0-9][\w$./*-]*(?:\{[\w,]+\}[\w$./*-]*)?", text)
    pairs = []
    for word in found:
        plain = re.sub(r"/[\w-]+\.tar$", "", word.rstrip("./"))
        pattern = re.sub(r"\\\{([\w,]+)\\\}", lambda m: f"(?:{m[1].replace(',', '|')})", re.escape(plain))
        pairs.append((word, re.sub(r"\\\$\w+|\\\*", "[^/]+", pattern)))
    return [(word, pattern) for word, pattern in pairs if not word.endswith(".py")]


def test_there_are_sets_and_readers():
    assert len(SETS) >= 10 and len(FILES) > 60
    assert "data/ffhq1024/train" in MADE and "data/latents/afhq256/wild" in MADE
    assert sum(len(read(path)) for path in FILES) > 150


@pytest.mark.parametrize("path", [path for path in FILES if read(path)], ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_read_below_data_is_what_a_command_makes(path):
    for word, pattern in read(path):
        if word.startswith(GIVEN) and not word.startswith(("data/emoji-64", "data/emoji-latents")):
            continue
        # A folder that holds what is made is named where it is written.
        assert any(re.fullmatch(f"{pattern}(/.*)?", folder) for folder in MADE), (
            f"{path.relative_to(ROOT)} reads {word}, which no command makes; the sets are {', '.join(SETS)}"
        )


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.stem)
def test_a_configuration_reads_folders_that_hold_samples(path):
    """Not their parents: a run takes no folder of folders."""

    def strings(tree):
        if isinstance(tree, dict | list):
            return [leaf for branch in (tree.values() if isinstance(tree, dict) else tree) for leaf in strings(branch)]
        return [tree] if isinstance(tree, str) and tree.startswith("data/") else []

    for folder in strings(yaml.safe_load(path.read_text())):
        assert folder in MADE, f"{path.relative_to(ROOT)} reads {folder}, and no command makes shards there"


def test_a_set_is_packed_in_one_way_everywhere():
    sources = {source for source, *_ in SETS.values()}
    for path in FILES:
        for source, options in commands(text_of(path), PACK):
            out = options["--out"][0]
            if source in sources or out in SETS:
                assert out in SETS, f"{path.relative_to(ROOT)} packs {source} to {out}: docs/data.md packs it elsewhere"
                given = {key: options.get(key) for key in SETTINGS}
                assert (source, given) == SETS[out][:2], f"{path.relative_to(ROOT)} packs {out} with other settings"


def test_the_tables_of_the_paper_look_where_the_sets_are():
    tables = load_config(TablesConfig, ROOT / "configs/eval/paper_tables.yaml").tables
    cells = [cell for table in tables.values() for cell in table.columns.values() if cell.data]
    assert cells
    for cell in cells:
        for domain in {domain for pair in cell.pairs for domain in pair}:
            assert f"data/{cell.data}/{domain}/test" in MADE, (cell.data, domain)
