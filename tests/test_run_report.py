"""The report of a run: what is in it, what it says is not, nothing from outside, and how a real browser shows it."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from browser import screenshot
from PIL import Image
from programs import ROOT, run

from letit_dist.evaluation.curves import chart, compact, ticks
from letit_dist.evaluation.run_folder import read_run
from letit_dist.evaluation.run_page import run_page


class Page(HTMLParser):
    """All tags with their attributes, and all text, cell by cell."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.all("section")]


def assert_self_contained(text):
    page = Page(text)
    assert not page.all("link") and not page.all("iframe") and not page.all("script") and "@import" not in text
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action"):
                assert value.startswith(("data:", "#")), f"{name}={value[:60]}"
            assert "url(" not in (value or "")
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for image in page.all("img"):
        start, data = image["src"].split(",", 1)
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert start == f"data:image/{picture.format.lower()};base64"
            assert picture.size == (int(image["width"]), int(image["height"])) and image["alt"]
    return page


@pytest.fixture(scope="module")
def results(chain, tmp_path_factory):
    """Figures and scores of the chain's energy, by the programs."""
    out = tmp_path_factory.mktemp("results")
    test = chain.images("apple", "test")
    figure = ("eval/paper.py", "trajectories", test, "--energy", chain.energy(), "--count", 2, "--out", out / "paths")
    train = [chain.images(style) for style in ("apple", "orange")]
    scores = ["eval/translation.py", chain.energy(), "--train", *train, "--test", test, "--judge-steps", 1]
    shift = ("eval/paper.py", "shift", "--energy", chain.energy(), "--out", out / "shift")
    for command in (figure, shift, [*scores, "--baselines", "mean-shift", "--lpips", "--out", out / "scores"]):
        done = run(*command)
        assert done.code == 0, done.err
    return out


def report(folder, out, *options):
    done = run("eval/report.py", folder, "--out", out, *options)
    assert done.code == 0, done.err
    return done.out, out.read_text()


# What is in it


def test_an_energy_run_with_its_results(chain, results, tmp_path):
    said, text = report(chain.energy(), tmp_path / "report.html", "--also", results)
    page = assert_self_contained(text)
    assert page.sections == [
        *("summary", "results", "training-curves", "samples-over-training", "translations", "trajectories"),
        *("latent-shift", "configuration", "environment", "not-in-this-report"),
    ]
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in page.sections]
    assert "stage 2: energy, apple to orange (latent_energy)" in page.texts
    stats = [json.loads(line) for line in (chain.energy() / "stats.jsonl").read_text().splitlines()]
    for row in stats:
        for value in row.values():
            assert (f"{value:.6g}" if isinstance(value, float) else str(value)) in page.texts
    named = {attributes["aria-label"].removesuffix(", log scale") for attributes in page.all("svg")}
    constant = {name for name in stats[0] if len({row[name] for row in stats}) == 1}
    assert named == set(stats[0]) - constant - {"images_seen"} and "loss" in named
    rows = [json.loads(line) for line in (results / "scores/translation.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["method"] in page.texts and f"{row['target_accuracy']:.6g}" in page.texts
    config = (chain.energy() / "config.yaml").read_text()
    assert config.strip() in page.texts
    environment = json.loads((chain.energy() / "environment.json").read_text())
    assert environment["torch"] in page.texts and " ".join(environment["command"]) in page.texts
    pictures = [image["alt"] for image in page.all("img")]
    assert pictures[:2] == ["0 images seen", "256 images seen"] and len(pictures) == 5
    assert "not in it: strength: eval/paper.py strength makes them" in said.splitlines()
    assert "strength: eval/paper.py strength makes them" in page.texts
    first = (chain.energy() / "samples/images-000000000000.png").read_bytes()
    assert base64.b64encode(first).decode() in text


def test_a_run_of_stage_1(chain, tmp_path):
    shutil.copytree(chain.autoencoder, tmp_path / "run")
    assert run("eval/reconstruction.py", "--autoencoder", tmp_path / "run", chain.images("apple", "test"), "--lpips",
               "--out", tmp_path / "run/reconstruction").code == 0  # fmt: skip
    said, text = report(tmp_path / "run", tmp_path / "report.html")
    page = assert_self_contained(text)
    assert "stage 1: vqvae2 at 32 pixels" in page.texts and "trajectories" not in said
    assert {"reconstructions", "results"} <= set(page.sections) and "psnr" in page.texts
    assert said.splitlines()[0].startswith("report: ")


def test_a_run_that_has_only_begun(tmp_path):
    """Nothing but its configuration: a page all the same, which says what is missing."""
    (tmp_path / "run").mkdir()
    shutil.copy(ROOT / "configs/debug/vqvae2.yaml", tmp_path / "run/config.yaml")
    config = (tmp_path / "run/config.yaml").read_text().split("\n")
    (tmp_path / "run/config.yaml").write_text("\n".join(line for line in config if not line.startswith("base:")))
    said, text = report(tmp_path / "run", tmp_path / "report.html")
    page = assert_self_contained(text)
    assert page.sections == ["configuration", "not-in-this-report"]
    for words in ("training curves: no line in stats.jsonl", "environment: no", "sample grids", "exported weights"):
        assert words in said and words in text


def test_damage_is_told_and_the_rest_is_shown(chain, tmp_path):
    shutil.copytree(chain.energy(), tmp_path / "run")
    with (tmp_path / "run/stats.jsonl").open("a") as stream:
        stream.write('{"images_seen": 300, "loss": NaN, "moved": 0.25}\n{"images_seen": 30')
    (tmp_path / "run/samples/images-000000000256.png").write_bytes(b"no picture")
    (tmp_path / "run/fidelity.jsonl").write_text('{"metric": "fid", "value": 1.5, "valid": false}\n')
    _, text = report(tmp_path / "run", tmp_path / "report.html")
    page = assert_self_contained(text)
    assert "1 damaged lines of stats.jsonl are left out" in page.texts
    assert any("images-000000000256.png: not an image that can be read" in line for line in page.texts)
    assert any(attributes["aria-label"].startswith("loss (1 not finite)") for attributes in page.all("svg"))
    assert "Not valid: measured with random or unverified weights." in page.texts


def test_a_large_picture_is_shown_smaller(chain, tmp_path, monkeypatch):
    monkeypatch.setattr("letit_dist.evaluation.run_page._MOST_BYTES", 1000)
    monkeypatch.setattr("letit_dist.evaluation.run_page._MOST_WIDTH", 200)
    page = assert_self_contained(run_page(read_run(chain.energy())))
    assert [int(image["width"]) for image in page.all("img")] == [200, 200]
    assert any("pixels, shown smaller)" in text for text in page.texts)


def test_names_are_text_and_never_markup(chain, tmp_path):
    shutil.copytree(chain.energy(), tmp_path / "<b>$x&")
    (tmp_path / "<b>$x&/a.jsonl").write_text(json.dumps({"method": "<script>alert(1)</script>", "x": "</td>"}) + "\n")
    page = assert_self_contained(run_page(read_run(tmp_path / "<b>$x&")))
    assert page.texts.count("<b>$x&") == 2 and "<script>alert(1)</script>" in page.texts and not page.all("b")


def test_long_runs_are_thinned(chain, tmp_path):
    shutil.copytree(chain.energy(), tmp_path / "run")
    lines = [json.dumps({"images_seen": 10 * i, "loss": 1 / (i + 1)}) for i in range(5000)]
    (tmp_path / "run/stats.jsonl").write_text("\n".join(lines))
    for i in range(1, 41):
        shutil.copy(tmp_path / "run/samples/images-000000000000.png", tmp_path / f"run/samples/images-{i:012d}.png")
    text = run_page(read_run(tmp_path / "run"))
    page = assert_self_contained(text)
    assert "numbers of every 25th report" in page.texts and "0.0002" in page.texts and len(text) < 4 << 20
    shown = [image["alt"] for image in page.all("img")]
    assert len(shown) == 8 and shown[0] == "0 images seen" and shown[-1] == "256 images seen"


def test_bad_input(chain, tmp_path):
    for arguments, message in (
        ((chain.fruit, "--out", tmp_path / "x"), "is no run folder (no config.yaml)"),
        ((chain.energy(), "--out", tmp_path), "is a folder, expected the name of a file"),
        ((chain.energy(), "--out", tmp_path / "x", "--also", tmp_path / "none"), "none: no such folder"),
    ):
        done = run("eval/report.py", *arguments)
        assert done.code == 2 and len(done.errors) == 1 and message in done.err
    assert not (tmp_path / "x").exists()


# Charts


def line_of(svg):
    path = re.search(r'class="line" d="([^"]*)"', svg).group(1)
    return [(pen, float(x), float(y)) for pen, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path)]


def test_a_chart_is_to_scale():
    points = line_of(chart("t", [0, 50, 100], [1.0, 3.0, 2.0]))
    assert [pen for pen, *_ in points] == ["M", "L", "L"]
    (_, x0, y0), (_, x1, y1), (_, x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y1 < y2 < y0
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.11)
    logarithmic = chart("t", [0, 1, 2], [1.0, 10.0, 100.0])
    assert "t, log scale" in logarithmic
    heights = [y for *_, y in line_of(logarithmic)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


def test_charts_of_odd_values():
    broken = line_of(chart("t", [0, 1, 2, 3], [1.0, math.nan, 2.0, math.inf]))
    assert [pen for pen, *_ in broken] == ["M", "M"]
    assert "no finite value" in chart("t", [1], [math.nan])
    for ys in ([0.0], [5.0, 5.0], [-1e9, 1e9], [1e-30, 2e-30]):
        svg = chart("<t>", list(range(len(ys))), ys)
        assert "&lt;t&gt;" in svg and "nan" not in svg.lower() and line_of(svg)
    long = chart("t", list(range(100_000)), [math.sin(x / 1000) for x in range(100_000)])
    assert len(long) < 40_000 and len(line_of(long)) <= 801


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.7), (-5, 12345), (1e-7, 2e-7), (7680, 7681)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert len(set(map(compact, found))) == len(found) or high - low < 1e-3 * high


def test_compact():
    assert [compact(v) for v in (0, 20_000, 1.5e6, 0.02, 1e-7, -3, 2e9)] == [
        "0",
        "20k",
        "1.5M",
        "0.02",
        "1e-07",
        "-3",
        "2G",
    ]


# In a browser

LOOK = """() => {
const problems = [], box = element => element.getBoundingClientRect();
const apart = (a, b) =>
  a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 2 || b.bottom <= a.top + 2;
for (const image of document.images)
  if (!image.complete || !image.naturalWidth) problems.push("image " + image.alt);
for (const drawing of document.querySelectorAll("svg")) {
  const texts = [...drawing.querySelectorAll("text")], frame = box(drawing);
  texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
    if (!apart(box(a), box(b))) problems.push(`${a.textContent} over ${b.textContent}`);
  }));
  for (const text of texts) if (box(text).left < frame.left - 1 || box(text).right > frame.right + 1)
    problems.push("outside: " + text.textContent);
}
const blocks = [...document.querySelectorAll("h1, h2, h3, p, figure, .charts > div, table, pre")]
  .filter(element => element.checkVisibility());
blocks.forEach((a, i) => blocks.slice(i + 1).forEach(b => {
  if (!a.contains(b) && box(a).height && box(b).height && !apart(box(a), box(b)))
    problems.push(a.tagName + " over " + b.tagName + ": " + a.textContent.slice(0, 30));
}));
if (document.documentElement.scrollWidth > innerWidth) problems.push("wider than the window");
const colour = getComputedStyle(document.querySelector("p")).color;
return {problems, images: document.images.length, colour};
}"""


def test_a_real_browser_shows_it(browser, chain, results, tmp_path):
    report(chain.energy(), tmp_path / "report.html", "--also", results)
    images = len(Page((tmp_path / "report.html").read_text()).all("img"))
    with browser.open(tmp_path / "report.html", tmp_path / "profile", (1200, 1600)) as page:
        assert page.evaluate(LOOK) == {"problems": [], "images": images, "colour": "rgb(22, 22, 22)"}
        picture = screenshot(page)
    assert picture.size == (1200, 1600) and picture.getpixel((2, 2)) == (255, 255, 255)
    dark = picture.convert("L").point(lambda value: 255 * (value < 70)).getbbox()
    assert dark is not None and dark[2] - dark[0] > 600 and dark[3] - dark[1] > 1000
