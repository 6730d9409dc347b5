"""What eval/ measures, put onto the model card of what was scored; nothing else of the card changes."""

import json
import os
import shutil

import pytest
from programs import STYLES, run

from letit_dist import cards
from letit_dist.cards import Card, add_metrics, card_to_mend
from letit_dist.energy.folders import save_translators
from letit_dist.energy.translate import open_translators
from letit_dist.errors import UserError
from letit_dist.pretrained import find_folder, read_folder


@pytest.fixture
def scored(chain, tmp_path):
    """Copies of the weights of a run of each stage, whose cards somebody has written in."""
    for name, run_folder in (("backbone", chain.autoencoder), ("energy", chain.energy())):
        shutil.copytree(find_folder(run_folder), tmp_path / name)
        text = (tmp_path / name / "README.md").read_text().replace("\n## Use\n", "\n## Thanks\n\nto *all*.\n\n## Use\n")
        (tmp_path / name / "README.md").write_text(text + "\nThe last words | of somebody.\n")
    return tmp_path


def apart(text):
    """Lines of a card that are no metrics, and the rows of its table."""
    lines = [line for line in text.splitlines() if not line.startswith("letit_dist: ")]
    begin = lines.index("## Metrics")
    end = next(number for number, line in enumerate(lines) if number > begin and line.startswith("## "))
    return [*lines[:begin], *lines[end:]], lines[begin + 1 : end]


def translation(chain, energy, out, *more):
    given = ("--train", *map(chain.images, STYLES), "--test", chain.images("apple", "test"), "--judge-steps", 2)
    return run("eval/translation.py", energy, *given, "--lpips", "--out", out, *more)


def test_the_scores_of_an_energy(chain, scored):
    path = scored / "energy/README.md"
    before, known = path.read_text(), Card.read(scored / "energy")
    given = ("--autoencoder", chain.autoencoder)
    assert translation(chain, scored / "energy", scored / "out", *given).code == 0
    assert path.read_text() == before
    done = translation(chain, scored / "energy", scored / "out", *given, "--onto-card")
    assert done.code == 0 and f"card: {path}" in done.out, done.err
    row = json.loads((scored / "out/translation.jsonl").read_text().splitlines()[-1])
    card, end = Card.read(scored / "energy"), f"on {chain.images('apple', 'test')}"
    new = {name: value for name, value in card.metrics.items() if name not in known.metrics}
    assert new[f"apple to orange: target_accuracy {end}"] == row["target_accuracy"] and row["method"] == "latent energy"
    assert new[f"apple to orange: samples {end}"] == 8 and not any("seconds" in name for name in new)
    assert known.metrics.items() <= card.metrics.items()
    assert (card.data, card.licence, card.command) == (known.data, known.licence, known.command)
    (others, rows), (old_others, old_rows) = apart(path.read_text()), apart(before)
    assert others == old_others and "to *all*." in others and others[-1] == "The last words | of somebody."
    assert rows[: len(old_rows) - 1] == old_rows[:-1] and len(rows) == len(old_rows) + len(new)
    assert f"| apple to orange: samples {end} | 8 |" in rows

    # The same again takes their place.
    once = path.read_text()
    assert translation(chain, scored / "energy", scored / "out", *given, "--onto-card").code == 0
    assert path.read_text() == once
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


def test_the_scores_of_a_folder_of_translators_and_of_an_autoencoder(chain, scored):
    save_translators(open_translators(chain.energy()), scored / "both", with_autoencoder=True)
    assert translation(chain, scored / "both", scored / "out", "--onto-card").code == 0
    assert any("target_accuracy" in name for name in Card.read(scored / "both").metrics)
    assert open_translators(scored / "both")

    shards = [chain.images(style, "test") for style in STYLES]
    weights = read_folder(scored / "backbone")
    given = ("--autoencoder", scored / "backbone", *shards, "--lpips", "--out", scored / "out", "--onto-card")
    done = run("eval/reconstruction.py", *given)
    assert done.code == 0, done.err
    found = Card.read(scored / "backbone").metrics
    rows = [json.loads(line) for line in (scored / "out/reconstruction.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        assert found[f"reconstruction: psnr on {row['data']}"] == row["psnr"]
        assert found[f"reconstruction: images on {row['data']}"] == 8
    assert read_folder(scored / "backbone")[1].keys() == weights[1].keys()


def test_a_finished_run_that_is_told_its_licence_keeps_what_was_measured(chain, tmp_path):
    command = [*chain.pretrain]
    command[command.index("--run") + 1] = tmp_path / "run"
    assert run(*command).code == 0
    [folder] = (tmp_path / "run/export").iterdir()
    add_metrics(card_to_mend(folder, "--onto-card"), {"psnr": 30.5})
    assert run(*command, "--licence", "mit").code == 0
    card = Card.read(folder)
    assert card.licence == "mit" and card.metrics["psnr"] == 30.5 and len(card.metrics) > 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("## Metrics\n\nnot yet measured\n\n## Use\n",
         "## Metrics\n\n| metric | value |\n| --- | --- |\n| a | 1 |\n\n## Use\n"),
        ("## Metrics\n\n| x | y |\n| --- | --- |\n| a | 7 |\n| b | 3 |\n\nand so on\n",
         "## Metrics\n\n| x | y |\n| --- | --- |\n| a | 1 |\n| b | 3 |\n\nand so on\n"),
        ("Words.\n", "Words.\n\n## Metrics\n\n| metric | value |\n| --- | --- |\n| a | 1 |\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("own", ["", "letit_dist:\n  data: fruit\n  metrics:\n    old: 2\n"])
def test_cards_that_others_wrote(tmp_path, body, expected, own):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{own}tags:\n- x\n---\n\n# Title\n\n{body}")
    add_metrics(card_to_mend(tmp_path, "--onto-card"), {"a": 1})
    card = Card.read(tmp_path)
    assert card == Card("fruit" if own else None, "mit", None, {"old": 2, "a": 1} if own else {"a": 1})
    text = (tmp_path / "README.md").read_text()
    assert text.endswith(f"# Title\n\n{expected}") and "\ntags:\n- x\n" in text


@pytest.mark.parametrize("text", ["# no front matter\n", "---\n[1, 2]\n---\n", "---\na: [\n---\n", "---\n", None])
def test_cards_that_cannot_be_mended_are_named_before_anything_is_measured(chain, scored, text):
    path = scored / "backbone/README.md"
    path.unlink() if text is None else path.write_text(text)
    shards = chain.images("apple", "test")
    given = ("--autoencoder", scored / "backbone", shards, "--out", scored / "out", "--onto-card")
    done = run("eval/reconstruction.py", *given)
    assert done.code == 2 and f"{path}" in done.err and done.err.count("\n") == 1
    assert not (scored / "out").exists() and (text is None or path.read_text() == text)


def test_options_that_do_not_go_together(chain, scored):
    done = run("eval/reconstruction.py", "--sweep", "x.yaml", "a", "--out", scored / "out", "--onto-card")
    assert done.code == 2 and "--onto-card has no effect with --sweep" in done.err
    random = ("--extractor", "compat", "--random-weights", "--onto-card")
    done = translation(chain, scored / "energy", scored / "out", *random)
    assert done.code == 2 and "mean nothing" in done.err


def test_a_full_disk_leaves_the_card(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(Card("fruit").text("t", {}, ""))
    before = (tmp_path / "README.md").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        cards.add_metrics(tmp_path / "README.md", {"a": 1})
    assert (tmp_path / "README.md").read_text() == before
