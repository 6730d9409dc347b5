"""The demo: what its page calls, and the page itself in a real browser."""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from browser import screenshot
from PIL import Image
from programs import ROOT
from test_hub import translator

import letit_dist
from letit_dist import demo
from letit_dist.data.synthetic import fruit
from letit_dist.energy.folders import save_translators
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two translators between cats and dogs, and a picture."""
    root = tmp_path_factory.mktemp("demo")
    ways = [translator("cat", "dog"), translator("dog", "cat", seed=1)]
    for way, size in zip(ways, (50.0, 200.0), strict=True):  # so far that they differ to the eye
        way.sampler = LangevinSampler(LangevinConfig(steps=3, step_size=size, noise_scale=1.0))
    save_translators(ways, root / "both", with_autoencoder=True)
    Image.fromarray(fruit("apple", 0, 0, 96)[0]).save(root / "apple.png")
    return root


def test_translators_by_the_names_of_the_page(folder, tmp_path):
    found = demo.open_all([str(folder / "both")])
    assert list(found) == ["cat to dog", "dog to cat"]
    assert list(demo.open_all([str(folder / "both"), str(folder / "both")]))[2:] == ["cat to dog (2)", "dog to cat (2)"]
    translator(None, None).save_pretrained(tmp_path / "t", with_autoencoder=True)
    assert list(demo.open_all([str(tmp_path / "t")])) == ["any to target"]


@pytest.mark.parametrize("strength", [0.0, 0.2, 1 / 3, 0.5, 0.9, 1.0])
def test_the_strength_is_that_of_the_programs(folder, strength):
    """One walk decoded anywhere equals a translation made for that strength alone."""
    one = translator()
    one.sampler = LangevinSampler(LangevinConfig(steps=3, step_size=50.0, noise_scale=1.0))
    picture = Image.open(folder / "apple.png")
    found = np.asarray(demo.walk(one, picture).at(strength)).astype(int)
    wanted = np.asarray(letit_dist.translate_picture(one, picture, strength=strength)).astype(int)
    assert abs(found - wanted).max() <= 1  # rounding of a point between two steps
    others = [np.asarray(demo.walk(one, picture).at(s)).astype(int) for s in (0.0, 1 / 3, 2 / 3, 1.0) if s != strength]
    assert all(abs(found - other).max() > 3 for other in others)


def test_the_trajectory_is_every_step(folder, tmp_path):
    found = demo.walk(translator(), Image.open(folder / "apple.png"))
    assert len(found.frames()) == 4 and torch.equal(found.path[0], found.translator.encode(_images(found))[0])
    paths = [demo.trajectory(found, tmp_path) for _ in range(2)]
    assert paths[0] != paths[1]
    with Image.open(paths[0]) as animation:
        assert animation.format == "GIF" and animation.n_frames == 4


def _images(found):
    return found.source[None] / 127.5 - 1


def test_without_gradio_one_line_says_what_to_install(folder):
    code = "import sys; sys.modules['gradio'] = None\nimport importlib.util as u\n"
    code += "find = u.find_spec\nu.find_spec = lambda name, *a: None if name == 'gradio' else find(name, *a)\n"
    code += f"from letit_dist import demo; sys.exit(demo.main([{str(folder / 'both')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "error: the demo needs gradio: pip install 'letit_dist[demo]'\n"


def test_help_is_quick():
    command = [sys.executable, "-X", "importtime", "-m", "letit_dist.demo", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "python -m letit_dist.demo runs/cats2dogs" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "pydantic", "gradio"}


def bad_files(root):
    """(name, content, what is said of it) of files that are no picture."""
    import io

    whole = io.BytesIO()
    Image.fromarray(fruit("apple", 0, 0, 96)[0]).save(whole, "png")
    return [
        ("text.png", b"no picture", "not an image"),
        ("empty.png", b"", "empty file"),
        ("cut.png", whole.getvalue()[:2000], "truncated"),
        ("broken.png", whole.getvalue()[:30] + bytes(20), "not an image"),
    ]


def test_a_picture_that_is_none_is_one_line(folder, tmp_path, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'letit_dist[demo]'")
    for name, content, said in bad_files(tmp_path):
        (tmp_path / name).write_bytes(content)
        assert demo.main([str(folder / "both"), "--picture", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --picture {tmp_path / name}: ") and said in line
    for path, said in ((tmp_path, "Is a directory"), (tmp_path / "gone.png", "No such file or directory")):
        assert demo.main([str(folder / "both"), "--picture", str(path)]) == 2
        assert capsys.readouterr().err == f"error: --picture {path}: {said}\n"
    assert demo.read_picture(folder / "apple.png").tobytes() == Image.open(folder / "apple.png").tobytes()


def test_an_address_that_cannot_be_served_is_one_line(folder, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'letit_dist[demo]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for given, said in (
            (("--host", "no such host"), "--host no such host: no such address; 127.0.0.1 is this machine alone"),
            (("--host", "192.0.2.1"), "--host 192.0.2.1: not an address of this machine"),
            (("--port", str(port)), f"cannot serve at 127.0.0.1:{port}: Address already in use; name another --port"),
            (("--port", "70000"), "--port 70000: a number from 1 to 65535"),
        ):
            assert demo.main([str(folder / "both"), *given]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {said}")


def test_an_autoencoder_that_is_none_is_one_line(folder, tmp_path, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'letit_dist[demo]'")
    translator().energy.save_pretrained(tmp_path / "energy")
    for given, said in (
        (
            (folder / "both", "--autoencoder", tmp_path / "gone"),
            f"no weights at {tmp_path / 'gone'}: it does not exist",
        ),
        ((folder / "both", "--autoencoder", folder), f"{folder}: neither weights"),
        (
            (folder / "both", "--autoencoder", folder / "both/energies/cat2dog"),
            "unknown autoencoder kind 'conv' (known: alae,",
        ),
        ((tmp_path / "energy",), "name its autoencoder with --autoencoder"),
        ((tmp_path / "gone",), f"no such energy: {tmp_path / 'gone'}"),
    ):
        assert demo.main([str(part) for part in (*given, "--port", 7861)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line


@pytest.fixture
def served(folder):
    """The address of the page, from its own process; the second value is what that said."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'letit_dist[demo]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "letit_dist.demo", str(folder / "both"), "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    address, end = f"http://127.0.0.1:{port}/", time.monotonic() + 120
    try:
        while True:
            assert process.poll() is None, process.stdout.read()
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.3)
        yield address
    finally:
        process.terminate()  # not SIGINT, which children of a background job ignore
        process.wait(30)


# The images of the page in order: the picture, what the autoencoder sees, the translation, the trajectory.
SOURCES = "[...document.querySelectorAll('img')].map(i => i.src).filter(s => s.includes('/file='))"


def shown(address, side=32):
    """A picture of the page, as small as the translator made it."""
    with urllib.request.urlopen(address) as answer, Image.open(answer) as picture:
        return np.asarray(picture.convert("RGB").resize((side, side), 0)).astype(int)


def test_a_picture_is_dropped_and_another_translator_chosen(browser, served, folder, tmp_path):
    content = base64.b64encode((folder / "apple.png").read_bytes()).decode()
    carry = """text => {
        const held = new DataTransfer();
        const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
        held.items.add(new File([bytes], 'apple.png', {type: 'image/png'}));
        return held;
    }"""
    with browser.open(served, tmp_path / "profile") as page:
        page.wait_for_selector("input[type=file]", state="attached")
        held = page.evaluate_handle(carry, content)
        page.dispatch_event("button:has(input[type=file])", "drop", {"dataTransfer": held})
        page.wait_for_function(f"{SOURCES}.length == 4")
        before = page.evaluate(SOURCES)
        chosen = page.get_by_label("translator", exact=True)
        assert chosen.input_value() == "cat to dog"
        chosen.click()
        offered = [text.split("\n")[-1] for text in page.get_by_role("option").all_inner_texts()]  # after a tick
        assert offered == ["cat to dog", "dog to cat"]
        page.get_by_role("option", name="dog to cat").click()
        page.wait_for_function(
            f"{SOURCES}.length == 4 && {SOURCES}[2] != {before[2]!r} && {SOURCES}[3] != {before[3]!r}"
        )
        after = page.evaluate(SOURCES)
        ways = demo.open_all([str(folder / "both")])
        picture = Image.open(folder / "apple.png")
        results = {name: np.asarray(demo.walk(one, picture).at(1.0)).astype(int) for name, one in ways.items()}
        for address, name, other in ((before[2], "cat to dog", "dog to cat"), (after[2], "dog to cat", "cat to dog")):
            seen = shown(address)
            assert abs(seen - results[name]).mean() < 4 < abs(seen - results[other]).mean()


def test_the_page_in_a_real_browser(browser, served, folder, tmp_path):
    with browser.open(served, tmp_path / "profile") as page:
        page.wait_for_selector("input[type=file]", state="attached")
        assert page.evaluate(SOURCES) == []
        assert page.get_by_text("latent energy", exact=True).count() == 1  # the name of the method, as in sheets
        page.set_input_files("input[type=file]", folder / "apple.png")
        page.wait_for_function(f"{SOURCES}.length == 4")
        page.wait_for_function("[...document.querySelectorAll('img')].every(i => i.complete && i.naturalWidth > 0)")
        before = page.evaluate(SOURCES)
        assert before[3].endswith(".gif")
        slider = page.locator("input[type=range]")
        box = slider.bounding_box()
        height = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] - 2, height)
        page.mouse.down()
        page.mouse.move(box["x"], height)
        page.mouse.up()
        assert slider.input_value() == "0"
        page.wait_for_function(f"{SOURCES}.length == 4 && {SOURCES}[2] != {before[2]!r}")
        after = page.evaluate(SOURCES)
        assert after[3] == before[3], "the chain was not walked again"
        one = demo.open_all([str(folder / "both")])["cat to dog"]
        chain = demo.walk(one, Image.open(folder / "apple.png"))
        for address, strength in ((before[2], 1.0), (after[2], 0.0)):
            # It may come as a lossy WebP.
            assert abs(shown(address) - np.asarray(chain.at(strength))).mean() < 4
        seen = screenshot(page)
    seen.save(os.environ.get("LETIT_DEMO_SCREENSHOT", tmp_path / "demo.png"))
    assert seen.width > 1000 and len(np.unique(np.asarray(seen.convert("L")))) > 50
