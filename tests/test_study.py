"""The human study: orders and secrecy of the page, its script in a real browser, shares, intervals and agreement."""

import base64
import csv
import json
import math
import re

import pytest
import torch
from browser import screenshot
from PIL import Image
from programs import run

from letit_dist.data.transforms import decode
from letit_dist.errors import UserError
from letit_dist.evaluation.study import (
    Vote,
    analyse,
    bootstrap,
    krippendorff,
    make_study,
    read_key,
    read_votes,
    wilson,
)

# A colour a method, and a brightness an image: what was shown can be told from the pixels.
COLOURS = {"ours": (1, 0, 0), "CUT": (0, 1, 0), "star gan": (0, 0, 1), "before": (1, 1, 1)}
NAMES = [f"img{number}" for number in range(6)]


def write(folder, name):
    folder.mkdir()
    for number, stem in enumerate(NAMES):
        colour = tuple((90 + 25 * number) * part for part in COLOURS[name])
        Image.new("RGB", (40, 48), colour).save(folder / f"{stem}.png")
    return folder


@pytest.fixture
def folders(tmp_path):
    return {name: write(tmp_path / f"secret-{name.replace(' ', '')}", name) for name in COLOURS}


def made(folders, **given):
    methods = {name: folder for name, folder in folders.items() if name != "before"}
    return make_study(methods, folders["before"], **{"side": 32, **given})


def data_of(page):
    return json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', page, re.S).group(1))


def seen(uri):
    """(method, number of the image) from the pixels."""
    start, data = uri.split(",", 1)
    assert start == "data:image/jpeg;base64"
    pixels = decode(base64.b64decode(data, validate=True))
    assert pixels.shape == (3, 32, 32)
    colour = pixels.float().mean((1, 2))
    bits = tuple(int(value > 45) for value in colour)
    return next(name for name, c in COLOURS.items() if c == bits), round((float(colour.max()) - 90) / 25)


# The page


def test_every_image_is_shown_by_every_method_and_the_key_knows_where(folders):
    page, key = made(folders)
    data = data_of(page)
    assert data["id"] == key["study"] and len(data["trials"]) == len(key["trials"]) == 6
    for trial, secret in zip(data["trials"], key["trials"], strict=True):
        number = NAMES.index(secret["image"])
        assert seen(trial["source"]) == ("before", number)
        assert [seen(picture) for picture in trial["pictures"]] == [(name, number) for name in secret["methods"]]
    assert sorted(secret["image"] for secret in key["trials"]) == NAMES
    assert all(sorted(secret["methods"]) == ["CUT", "ours", "star gan"] for secret in key["trials"])
    assert [question["source"] for question in data["questions"]] == [False, True]


def test_orders_are_a_function_of_the_seed(folders):
    (page, key), (again, same), (_, other) = made(folders), made(folders), made(folders, seed=1)
    assert page == again and key == same
    assert key["study"] != other["study"] and key["trials"] != other["trials"]
    first = {tuple(secret["methods"]) for secret in key["trials"]}
    assert len(first) > 1 and [secret["image"] for secret in key["trials"]] != NAMES


def test_the_page_says_nothing_of_the_methods_and_holds_everything(folders):
    page, _ = made(folders, target="an orange", title="a </script> & <b>")
    words = page.replace("colour", "").lower()
    assert not any(word in words for word in ("ours", "cut", "star gan", "stargan", "img0", "secret"))
    assert "http" not in page.replace("http-equiv", "") and "<link" not in page and "src=" not in page
    assert page.count("</script>") == 2 and "a &lt;/script&gt; &amp; &lt;b&gt;" in page
    assert "default-src 'none'; img-src data:;" in page


def test_pictures_of_any_size_and_coding_leave_alike(folders):
    Image.new("RGB", (300, 200), (115, 0, 0)).save(folders["ours"] / "img1.jpg")
    (folders["ours"] / "img1.png").unlink()
    page, key = made(folders)
    place = next(i for i, secret in enumerate(key["trials"]) if secret["image"] == "img1")
    position = key["trials"][place]["methods"].index("ours")
    assert seen(data_of(page)["trials"][place]["pictures"][position])[0] == "ours"


def test_what_cannot_be_made_is_told(folders, tmp_path):
    methods = {"ours": folders["ours"], "CUT": folders["CUT"]}
    with pytest.raises(UserError, match="1 methods: a study compares 2 to 9"):
        make_study({"ours": folders["ours"]}, folders["before"])
    with pytest.raises(UserError, match="no such folder"):
        make_study(methods, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        make_study(methods, tmp_path / "empty")
    (folders["CUT"] / "img3.png").unlink()
    with pytest.raises(UserError, match=r"--method CUT=.*: no image of the name img3"):
        make_study(methods, folders["before"])
    (folders["CUT"] / "img3.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"img3\.png cannot be read"):
        make_study(methods, folders["before"])
    assert len(make_study(methods, folders["before"], count=2)[1]["trials"]) == 2


# The page's script, in a browser

NOTE = """() => [at("place").textContent, at("source").hidden, at("progress").value,
  document.querySelectorAll("#choices [aria-pressed=true]").length, at("start").hidden, at("end").hidden]"""


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def begin(page, rater):
    page.fill("#rater", rater)
    page.click("#start button")


def saved(page, folder):
    """The file that the page hands out, in `folder`."""
    with page.expect_download() as waiting:
        page.click("#save")
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_a_real_browser_takes_votes_keeps_them_and_hands_them_out(browser, folders, tmp_path):
    text, key = made(folders)
    path = tmp_path / "study.html"
    path.write_text(text)
    with browser.open(path, tmp_path / "profile") as page:
        # Nothing counts before there is a name.
        press(page, "1")
        assert page.evaluate(NOTE) == ["", False, 0, 0, False, True]
        begin(page, 'Ann "A", x')
        assert page.evaluate(NOTE) == ["1 of 12", True, 0, 0, True, True]
        # A key that is held down is one vote; keys of no picture are none.
        page.keyboard.down("2")
        page.keyboard.down("2")
        page.keyboard.up("2")
        press(page, "9", "x")
        assert page.evaluate(NOTE) == ["2 of 12", True, 1, 0, True, True]
        page.click("#choices button >> nth=0")
        assert page.evaluate(NOTE) == ["3 of 12", True, 2, 0, True, True]
        press(page, "Backspace")
        assert page.evaluate(NOTE) == ["2 of 12", True, 2, 1, True, True]
        press(page, "3", "3", "1")
        assert page.evaluate(NOTE) == ["5 of 12", True, 4, 0, True, True]
        first = saved(page, tmp_path)
    assert first.name == f"votes-{key['study']}-Ann_A_x.csv"
    with first.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["question"], row["trial"], row["position"]) for row in rows] == [
        *(("quality", str(trial), position) for trial, position in enumerate("1220")),
    ]
    assert {row["rater"] for row in rows} == {'Ann "A", x'} and all(float(row["seconds"]) >= 0 for row in rows)
    # Closed and opened again: it goes on where it stopped.
    with browser.open(path, tmp_path / "profile") as page:
        assert page.evaluate(NOTE) == ["5 of 12", True, 4, 0, True, True]
        press(page, *"21" * 10)
        assert page.evaluate(NOTE) == ["12 of 12", False, 12, 0, True, False]
        votes = read_votes([saved(page, tmp_path)], key)
    assert len(votes) == 12 and [vote.question for vote in votes] == ["quality"] * 6 + ["faithfulness"] * 6
    positions = [1, 2, 2, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    for vote, position in zip(votes, positions, strict=True):
        assert vote.method == key["trials"][vote.trial]["methods"][position]
    # Another study in the same browser begins anew.
    path.write_text(made(folders, seed=1)[0])
    with browser.open(path, tmp_path / "profile") as page:
        assert page.evaluate(NOTE) == ["", False, 0, 0, False, True]


def test_votes_become_a_file(browser, folders, tmp_path):
    """The real download, through the page's own policy."""
    text, key = made(folders)
    (tmp_path / "study.html").write_text(text)
    with browser.open(tmp_path / "study.html", tmp_path / "profile") as page:
        begin(page, "Ann")
        press(page, "2", "3")
        path = saved(page, tmp_path)
    assert path.name == f"votes-{key['study']}-Ann.csv"
    votes = read_votes([path], key)
    assert [vote.method for vote in votes] == [key["trials"][i]["methods"][i + 1] for i in range(2)]


def test_what_a_rater_sees(browser, folders, tmp_path):
    """The first trial of the question that shows the source: every picture is where it says, in its own colour."""
    text, key = made(folders)
    (tmp_path / "study.html").write_text(text)
    with browser.open(tmp_path / "study.html", tmp_path / "profile", (900, 700)) as page:
        begin(page, "x")
        press(page, *"1" * 6)
        pictures = [page.locator("#source img"), *page.locator("#choices img").all()]
        boxes = [picture.bounding_box() for picture in pictures]
        seen = screenshot(page)
    assert seen.size == (900, 700) and seen.getpixel((2, 690)) == (255, 255, 255)
    trial = key["trials"][0]
    brightness = 90 + 25 * NAMES.index(trial["image"])
    for name, box in zip(["before", *trial["methods"]], boxes, strict=True):
        found = seen.getpixel((int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2)))
        assert found == pytest.approx([brightness * part for part in COLOURS[name]], abs=8), name  # JPEG's rounding


# Votes


def rows_of(key, *rows):
    lines = [f"{key['study']},{rater},{question},{trial},{position},1.5" for rater, question, trial, position in rows]
    return "\n".join(["study,rater,question,trial,position,seconds", *lines]) + "\n"


def test_votes_that_do_not_belong_are_told(folders, tmp_path):
    _, key = made(folders)
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text(rows_of(key, ("ann", "quality", 0, 1), ("ann", "faithfulness", 0, 2)))
    votes = read_votes([good], key)
    assert [vote.method for vote in votes] == [key["trials"][0]["methods"][i] for i in (1, 2)]
    for rows, message in (
        (("ann", "quality", 0, 2), r"bad\.csv: rater 'ann' has 1 votes in .*good\.csv already"),
        (("bob", "beauty", 0, 2), "question 'beauty', the study has quality, faithfulness"),
        (("bob", "quality", 6, 0), "trial 6, position 0: the study has no such picture"),
        (("bob", "quality", 0, -1), "trial 0, position -1: the study has no such picture"),
        (("bob", "quality", "x", 1), "trial x, position 1: the study has no such picture"),
    ):
        bad.write_text(rows_of(key, rows))
        with pytest.raises(UserError, match=message):
            read_votes([good, bad], key)
    with pytest.raises(UserError, match=r"^\S*good\.csv: given twice, name it once$"):
        read_votes([good, good], key)
    bad.write_text(rows_of({**key, "study": "other"}, ("bob", "quality", 0, 0)))
    with pytest.raises(UserError, match=f"votes of study other, the key is of {key['study']}"):
        read_votes([bad], key)
    bad.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no votes in it: columns study, rater"):
        read_votes([bad], key)
    bad.write_text("{}")
    with pytest.raises(UserError, match="is no key of a study"):
        read_key(bad)


# Statistics


def test_wilson_in_closed_form():
    z2 = 1.959964**2
    assert wilson(0, 10) == (0, pytest.approx(z2 / (10 + z2)))
    assert wilson(10, 10)[0] == pytest.approx(10 / (10 + z2)) and wilson(10, 10)[1] == pytest.approx(1)
    # It is where the share lies z standard errors from the bound.
    for bound in wilson(7, 20):
        assert abs(7 / 20 - bound) == pytest.approx(math.sqrt(z2 * bound * (1 - bound) / 20))


def fleiss(counts):
    """Fleiss' kappa (1971), written out; every row has equally many votes."""
    images, raters = len(counts), sum(counts[0])
    agreement = sum(sum(v * (v - 1) for v in row) / (raters * (raters - 1)) for row in counts) / images
    chance = sum((sum(row[m] for row in counts) / (images * raters)) ** 2 for m in range(len(counts[0])))
    return (agreement - chance) / (1 - chance)


def test_agreement_in_closed_form():
    """For complete data 1 - alpha = (1 - kappa) (N - 1) / N, N votes in all."""
    counts = torch.randint(0, 4, (30, 2), generator=torch.Generator().manual_seed(1))
    counts = torch.cat([counts, 6 - counts.sum(1, keepdim=True)], 1)
    votes = 30 * 6
    expected = 1 - (1 - fleiss(counts.tolist())) * (votes - 1) / votes
    assert krippendorff(counts) == pytest.approx(expected, rel=1e-12) and 0 < abs(expected) < 0.9
    assert krippendorff(torch.tensor([[4, 0], [0, 4], [4, 0]])) == 1
    # Votes that nobody else checked change nothing.
    assert krippendorff(torch.cat([counts, torch.eye(3).long()])) == pytest.approx(krippendorff(counts), rel=1e-12)
    assert krippendorff(torch.tensor([[1, 0], [0, 1]])) is None
    assert krippendorff(torch.tensor([[3, 0], [3, 0]])) is None


def test_the_example_of_krippendorff():
    """Of Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers, gaps, 0.743."""
    observers = (
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    )
    counts = torch.zeros(12, 5)
    for observer in observers:
        for unit, value in enumerate(observer.split()):
            if value != ".":
                counts[unit, int(value) - 1] += 1
    assert krippendorff(counts) == pytest.approx(0.743, abs=5e-4)


def test_the_bootstrap_draws_images():
    """Where raters always agree, ten of them know no more than one; the interval is the binomial's over images."""
    images = torch.zeros(60, 2)
    images[:24, 0], images[24:, 1] = 1, 1
    one, ten = bootstrap(images), bootstrap(10 * images)
    assert torch.equal(one, ten)
    spread = 1.96 * math.sqrt(0.4 * 0.6 / 60)
    assert one[0].tolist() == pytest.approx([0.4 - spread, 0.4 + spread], abs=0.03)
    torch.testing.assert_close(one[0] + one[1].flip(0), torch.ones(2).double())
    assert wilson(240, 600)[1] - 0.4 < 0.5 * spread  # which takes the votes for independent


def test_shares():
    key = {"study": "s", "seed": 0, "questions": ["quality", "faithfulness"], "methods": ["a", "b"], "trials": [{}] * 4}
    votes = [Vote(r, "quality", t, "a" if t < 3 else "b") for r in ("x", "y") for t in range(4)]
    votes += [Vote("x", "faithfulness", 0, "b")]
    rows = analyse(votes, key)
    found = [(row["question"], row["method"], row["share"], row["votes"], row["images"], row["raters"]) for row in rows]
    assert found == [
        ("quality", "a", 0.75, 8, 4, 2),
        ("quality", "b", 0.25, 8, 4, 2),
        ("faithfulness", "a", 0, 1, 1, 1),
        ("faithfulness", "b", 1, 1, 1, 1),
    ]
    assert rows[0]["alpha"] == 1 and rows[2]["alpha"] is None
    assert rows[0]["low"] < 0.75 < rows[0]["high"] and (rows[0]["wilson_low"], rows[0]["wilson_high"]) == wilson(6, 8)
    with pytest.raises(UserError, match="not a single vote"):
        analyse([], key)


# The program


def test_the_program(folders, tmp_path):
    methods = [f"--method={name}={folder}" for name, folder in folders.items() if name != "before"]
    command = ("eval/study.py", "make", "--source", folders["before"], *methods, "--side", 32)
    done = run(*command, "--out", tmp_path / "study.html", "--count", 4)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "4 images x 3 methods x 2 questions"
    key = read_key(tmp_path / "study.key.json")
    assert data_of((tmp_path / "study.html").read_text())["id"] == key["study"]
    again = run(*command, "--out", tmp_path / "study.html")
    assert again.code == 2 and "study.key.json is there: " in again.err
    assert read_key(tmp_path / "study.key.json") == key
    place = [trial["methods"].index("ours") for trial in key["trials"]]
    for rater in ("ann", "bob"):
        rows = [(rater, question, trial, place[trial]) for question in key["questions"] for trial in range(4)]
        (tmp_path / f"{rater}.csv").write_text(rows_of(key, *rows))
    given = (
        "eval/study.py",
        "analyse",
        tmp_path / "ann.csv",
        tmp_path / "bob.csv",
        "--key",
        tmp_path / "study.key.json",
    )
    done = run(*given, "--out", tmp_path / "study.jsonl")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert {(row["method"], row["share"]) for row in rows} == {("ours", 1), ("CUT", 0), ("star gan", 0)}
    assert len(done.out.splitlines()) == 2 + 6
    bad = run(*command[:4], "--method", "ours", "--out", tmp_path / "x.html")
    assert bad.code == 2 and bad.errors == ["error: --method ours: expected NAME=FOLDER"]


def test_one_mistake_is_one_line_a_file(folders, tmp_path):
    _, key = made(folders)
    places = [("ann", question, trial, 0) for question in key["questions"] for trial in range(len(NAMES))]

    def lines_of(*keys):
        paths = [tmp_path / f"{number}.csv" for number in range(len(keys))]
        for path, one in zip(paths, keys, strict=True):
            path.write_text(rows_of(one, *places))
        with pytest.raises(UserError) as error:
            read_votes(paths, key)
        return str(error.value).splitlines()

    first, second = (tmp_path / f"{number}.csv" for number in range(2))
    remedy = "leave one file out, or, if two people took one name, rename one in the column rater"
    assert lines_of(key, key) == [f"{second}: rater 'ann' has 12 votes in {first} already: {remedy}"]
    other = {**key, "study": "other"}
    remedy = f"the key is of {key['study']}: name the key that was written beside that page"
    assert lines_of(other, other) == [f"{path}: votes of study other, {remedy}" for path in (first, second)]
    first.write_text(rows_of(key, *places, *places[:3]))
    with pytest.raises(UserError, match=r"^\S*0\.csv: rater 'ann' has 3 votes more than once in it: keep one line of"):
        read_votes([first], key)
