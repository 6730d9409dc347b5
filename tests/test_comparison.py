"""Rows of a comparison against methods called one by one; the page against the rows; and what the command refuses."""

import base64
import os
import shutil
from html.parser import HTMLParser

import pytest
import torch
from browser import screenshot
from figure_runs import make_runs, opened
from PIL import Image
from programs import run

from letit_dist.data.inputs import open_images
from letit_dist.data.latents import LatentSet
from letit_dist.data.transforms import decode, encode, to_images, to_pixels
from letit_dist.energy.baselines import MeanShift
from letit_dist.errors import UserError
from letit_dist.evaluation.comparison import compare_images, fit_mean_shift, match_others, parse_others
from letit_dist.evaluation.comparison_page import comparison_page
from letit_dist.evaluation.translating import TranslateOptions


@pytest.fixture(scope="module")
def runs(tmp_path_factory, fruit_latents):
    return make_runs(tmp_path_factory.mktemp("runs"), fruit_latents)


@pytest.fixture(scope="module")
def apples(fruit_shards):
    return fruit_shards / "apple/test"


def write(folder, **pictures):
    folder.mkdir(exist_ok=True)
    for name, pixels in pictures.items():
        (folder / f"{name}.png").write_bytes(encode(pixels))
    return folder


def draw(seed, side=32):
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_rows_are_the_methods(runs, apples, strength):
    translator = opened(runs).translator
    shift = MeanShift(torch.full(translator.energy.latent_shape, 0.3))
    found = compare_images(translator, open_images(apples, 32, 3), TranslateOptions(strength=strength), shift)
    assert list(found.rows) == ["source", "reconstruction", "mean shift", "latent energy"]
    assert all(len(row) == 3 for row in found.rows.values())
    for column, (name, pixels) in enumerate(open_images(apples, 32, 3)):
        images = to_images(pixels[None])
        latents = translator.encode(images)
        expected = {
            "source": images,
            "reconstruction": translator.decode(latents),
            "mean shift": translator.decode(latents + 0.3),
            "latent energy": translator.translate(images, strength=strength).images,
        }
        assert found.names[column] == name
        for label, row in found.rows.items():
            assert torch.equal(row[column], to_pixels(expected[label])[0]), label
    reconstruction, *moved = (found.rows[label][0].int() for label in ("reconstruction", "mean shift", "latent energy"))
    assert all((row - reconstruction).abs().max() > 2 for row in moved)


def test_the_mean_shift_is_that_of_the_runs_latents(runs, fruit_latents):
    run = opened(runs)
    sides = [LatentSet.open(fruit_latents / style) for style in ("apple", "orange")]
    source, target = (run.translator.autoencoder.latents_from_codes(side.take(range(24))) for side in sides)
    torch.testing.assert_close(fit_mean_shift(run, None).shift, target.mean(0) - source.mean(0), rtol=1e-4, atol=1e-6)
    back = fit_mean_shift(run, [str(fruit_latents / style) for style in ("orange", "apple")])
    torch.testing.assert_close(back.shift, source.mean(0) - target.mean(0), rtol=1e-4, atol=1e-6)


def test_others_are_matched_by_name(runs, apples, tmp_path):
    images = open_images(apples, 32, 2)
    same, large = draw(1), draw(2, 64)
    folder = write(tmp_path / "cut", **{images.names[0]: same, images.names[1]: large, "another": draw(3)})
    found = compare_images(opened(runs).translator, images, TranslateOptions(), others={"CUT": folder})
    assert list(found.rows) == ["source", "reconstruction", "latent energy", "CUT"]
    assert torch.equal(found.rows["CUT"][0], same)
    small = large.float().unflatten(1, (32, 2)).unflatten(3, (32, 2)).mean((2, 4)).round().to(torch.uint8)
    assert torch.equal(found.rows["CUT"][1], small)


def test_every_missing_file_is_named_at_once(tmp_path):
    one = write(tmp_path / "one", a=draw(0), b=draw(1))
    two = write(tmp_path / "two", c=draw(0))
    (two / "c.jpg").write_bytes(encode(draw(0), "jpeg"))
    assert match_others({"one": one}, ["b", "a"]) == {"one": {"b": one / "b.png", "a": one / "a.png"}}
    with pytest.raises(UserError) as error:
        match_others({"one": one, "two": two}, ["a", "b", "c", "d"])
    assert str(error.value).splitlines() == [
        f"--also one={one}: no image of the name c, d",
        f"--also two={two}: no image of the name a, b, d",
        f"--also two={two}: several images of one name: c.jpg, c.png",
    ]


def test_names_of_others(tmp_path):
    assert parse_others([f"CUT={tmp_path}", f"star gan={tmp_path}"]) == {"CUT": tmp_path, "star gan": tmp_path}
    wrong = [
        f"={tmp_path}",
        "CUT",
        f"latent energy={tmp_path}",
        f"CUT={tmp_path}",
        f"CUT={tmp_path}",
        f"A={tmp_path}/none",
    ]
    with pytest.raises(UserError) as error:
        parse_others(wrong)
    reasons = ["expected NAME=FOLDER"] * 2 + ["there is a row 'latent energy' already", "there is a row 'CUT' already"]
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    for line, reason in zip(lines, [*reasons, "no such folder"], strict=True):
        assert line.endswith(reason)


def test_a_file_that_is_no_image(runs, apples, tmp_path):
    images = open_images(apples, 32, 1)
    (tmp_path / f"{images.names[0]}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"\.png cannot be read: not an image"):
        compare_images(opened(runs).translator, images, TranslateOptions(), others={"CUT": tmp_path})


# The page


class Page(HTMLParser):
    """All tags in order, and whatever opens is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def images_of(page):
    found = {}
    for image in page.all("img"):
        start, data = image["src"].split(",", 1)
        assert start == "data:image/png;base64"
        found[image["alt"]] = decode(base64.b64decode(data, validate=True))
    return found


def test_the_page_holds_every_image_and_nothing_from_outside():
    rows = {
        name: [draw(10 * i + column) for column in range(2)]
        for i, name in enumerate(("source", "cut", "latent energy"))
    }
    text = comparison_page("a title", ["x", "y"], rows)
    page = Page(text)
    found = images_of(page)
    assert set(found) == {f"{name}, {label}" for name in "xy" for label in rows}
    for label, images in rows.items():
        for name, image in zip("xy", images, strict=True):
            assert torch.equal(found[f"{name}, {label}"], image)
    assert "http:" not in text and "https:" not in text and not page.all("link") and not page.all("iframe")
    assert all("src" not in script for script in page.all("script"))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert page.all("html")[0]["lang"] == "en" and any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert page.texts.count("a title") == 2  # the window's, and the page's


def test_each_image_has_a_slider_and_a_choice_with_labels():
    rows = {name: [draw(0), draw(1)] for name in ("source", "reconstruction", "latent energy")}
    page = Page(comparison_page("t", ["x", "y"], rows))
    controls = [*page.all("input"), *page.all("select")]
    assert sorted(control["id"] for control in controls) == ["method-0", "method-1", "slider-0", "slider-1"]
    assert sorted(label["for"] for label in page.all("label")) == sorted(control["id"] for control in controls)
    assert all(slider["type"] == "range" and slider["max"] == "100" for slider in page.all("input"))
    options = page.all("option")
    assert [option["value"] for option in options] == ["reconstruction", "latent energy"] * 2
    assert [option["value"] for option in options if "selected" in option] == ["latent energy", "latent energy"]
    shown = [image["data-method"] for image in page.all("img") if "hidden" not in image]
    assert shown == ["source", "latent energy"] * 2


def test_names_are_text_and_never_markup():
    nasty = '<script>alert("1")</script> & $x'
    rows = {"source": [draw(0)], "latent energy": [draw(1)], nasty: [draw(2)]}
    page = Page(comparison_page(nasty, [nasty], rows))
    assert len(page.all("script")) == 1 and page.texts.count(nasty) == 4  # two titles, the picture, the option
    assert f"{nasty}, {nasty}" in images_of(page)
    assert page.all("option")[1]["value"] == nasty


def test_a_real_browser_wipes_between_them(browser, tmp_path):
    rows = {
        name: [torch.zeros(3, 32, 32, dtype=torch.uint8) for _ in "xy"] for name in ("source", "cut", "latent energy")
    }
    for channel, images in enumerate(rows.values()):
        for image in images:
            image[channel] = 200
    (tmp_path / "page.html").write_text(comparison_page("a title", ["x", "y"], rows))
    with browser.open(tmp_path / "page.html", tmp_path / "profile") as page:
        boxes = [wipe.bounding_box() for wipe in page.locator(".wipe").all()]

        def colours(number):
            """Which channel is bright at 10, 40, 60 and 90 % of a picture's width."""
            seen, box = screenshot(page), boxes[number]
            points = [(box["x"] + part * box["width"], box["y"] + box["height"] / 2) for part in (0.1, 0.4, 0.6, 0.9)]
            return [[value > 190 for value in seen.getpixel(tuple(map(int, point)))].index(True) for point in points]

        assert colours(0) == colours(1) == [0, 0, 2, 2]
        page.fill("#slider-0", "25")
        assert colours(0) == [0, 2, 2, 2] and colours(1) == [0, 0, 2, 2]
        page.press("#slider-1", "End")
        assert colours(1) == [0, 0, 0, 0]
        page.select_option("#method-0", "cut")
        assert colours(0) == [0, 1, 1, 1]
        assert page.get_attribute("#slider-0", "aria-valuetext") == "25 % source, 75 % cut"


# The command


def call(*arguments):
    return run("eval/paper.py", "compare", *arguments)


def test_the_command_writes_sheet_and_page(runs, apples, tmp_path):
    names = open_images(apples, 32, 4).names
    folder = write(tmp_path / "cut", **{name: draw(seed) for seed, name in enumerate(names)})
    out = tmp_path / "out"
    command = (apples, "--energy", runs / "apple2orange", "--out", out, "--count", 4, "--also", f"CUT={folder}")
    done = call(*command)
    assert done.code == 0, done.err
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.png"]
    assert done.out.splitlines()[0] == "4 images: source, reconstruction, mean shift, latent energy, CUT"
    text = (out / "compare.html").read_text()
    assert "<h1>apple2orange: apple to orange, 1,234 images seen, seed 0</h1>" in text
    found = images_of(Page(text))
    run = opened(runs)
    rows = compare_images(
        run.translator, open_images(apples, 32, 4), TranslateOptions(), fit_mean_shift(run, None), {"CUT": folder}
    ).rows
    sheet = Image.open(out / "compare.png")
    # Cells of 32 pixels are enlarged to 96, with 3 between them; the last column ends 3 before the edge.
    corner = sheet.width - 4 * 99, sheet.height - 5 * 99 - 3 + 3
    for r, (label, images) in enumerate(rows.items()):
        for c, (name, image) in enumerate(zip(names, images, strict=True)):
            assert torch.equal(found[f"{name}, {label}"], image)
            left, top = corner[0] + 99 * c, corner[1] + 99 * r
            cell = sheet.crop((left, top, left + 96, top + 96)).resize((32, 32), Image.Resampling.NEAREST)
            pixels = torch.frombuffer(bytearray(cell.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
            assert torch.equal(pixels, image), (label, name)
    before = (out / "compare.html").read_bytes()
    assert call(*command).code == 0 and (out / "compare.html").read_bytes() == before


def test_without_latents_there_is_no_mean_shift(runs, apples, fruit_latents, tmp_path):
    [export] = (runs / "apple2orange/export").iterdir()
    where = (apples, "--energy", export, "--autoencoder", runs / "autoencoder", "--count", 1)
    done = call(*where, "--out", tmp_path / "a")
    assert done.code == 0, done.err
    first, second, *_ = done.out.splitlines()
    assert first.startswith("without a row for the mean shift: ") and first.endswith("name its latents with --latents")
    assert second == "1 images: source, reconstruction, latent energy"
    sides = (fruit_latents / "apple", fruit_latents / "orange")
    done = call(*where, "--out", tmp_path / "b", "--latents", *sides)
    assert done.out.splitlines()[0] == "1 images: source, reconstruction, mean shift, latent energy"


def test_a_picture_that_cannot_be_read_is_told(runs, tmp_path):
    folder = write(tmp_path / "in", a=draw(0), c=draw(1))
    (folder / "b.png").write_bytes(b"nothing")
    done = call(folder, "--energy", runs / "apple2orange", "--out", tmp_path / "out")
    assert done.code == 0 and done.out.splitlines()[0].startswith(f"left out: {folder / 'b.png'}: not an image")
    assert set(images_of(Page((tmp_path / "out/compare.html").read_text()))) == {
        f"{name}, {label}" for name in "ac" for label in ("source", "reconstruction", "mean shift", "latent energy")
    }


def test_bad_input_gets_clear_lines(runs, apples, fruit_latents, fruit_shards, tmp_path):
    forth = (apples, "--energy", runs / "apple2orange", "--out", tmp_path / "out")
    images = fruit_shards / "apple/test"
    for arguments, message in (
        ((*forth, "--count", 0), "--count must be at least 1"),
        ((*forth, "--strength", 2), "strength is the fraction of the chain"),
        ((*forth, "--also", "CUT"), "--also CUT: expected NAME=FOLDER"),
        ((*forth, "--also", f"CUT={tmp_path}"), "no image of the name"),
        ((*forth, "--latents", images, images), "holds images, not latents"),
        ((*forth, "--latents", fruit_latents / "apple", tmp_path / "none"), "none"),
        ((tmp_path / "nowhere", *forth[1:]), "no such image or folder"),
        ((apples, "--energy", runs / "apple2orange", "--out", apples / "inside"), "lies where the input does"),
    ):
        done = call(*arguments)
        assert done.code == 2 and len(done.errors) == 1 and message in done.err, (message, done.err)
    assert not list((tmp_path / "out").glob("*"))


def test_a_page_is_replaced_by_a_whole_one_only(runs, apples, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = (apples, "--energy", runs / "apple2orange", "--out", out, "--count", 1)
    assert call(*command).code == 0
    kept = tmp_path / "kept"
    shutil.copytree(out, kept)

    replace = os.replace

    def full(beside, path):
        if path.name == "compare.html":
            raise OSError(28, "No space left on device")
        replace(beside, path)

    monkeypatch.setattr("letit_dist.files.os.replace", full)
    done = call(*command, "--seed", 1)
    assert done.code == 2 and done.errors == [f"error: cannot write to {out}: No space left on device"]
    assert (out / "compare.html").read_bytes() == (kept / "compare.html").read_bytes()
