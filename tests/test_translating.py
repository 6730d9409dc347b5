"""Many images into a folder."""

import gc
import threading
import time

import pytest
import torch
from PIL import Image
from plain_autoencoders import Pixels

from letit_dist import memory, pictures
from letit_dist.data import inputs
from letit_dist.data.inputs import open_images
from letit_dist.data.transforms import decode, to_images, to_pixels
from letit_dist.energy.classifier import LatentClassifier
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator
from letit_dist.errors import UserError
from letit_dist.evaluation import translating
from letit_dist.evaluation.translating import TranslateOptions, plan_translation, translate_all
from letit_dist.memory import GIB, peak_bytes
from letit_dist.pictures import save_picture

CHAIN = {"steps": 3, "step_size": 2.0}


def translator_of(autoencoder, energy, **changed):
    return Translator(autoencoder, energy, LangevinSampler(LangevinConfig(**{**CHAIN, **changed})))


def painter(**changed):
    """A translator whose latents are the pixels, and whose steps show in them."""
    torch.manual_seed(1)
    energy = build_energy(MLPEnergyConfig(hidden=64), (3, 16, 16)).requires_grad_(False)
    return translator_of(Pixels(16), energy, **{"step_size": 10.0, **changed})


@pytest.fixture(scope="module")
def apples(fruit_shards):
    return fruit_shards / "apple/test"


def translate(translator, source, out, limit=None, budget=None, **options):
    return list(translate_all(translator, open_images(source, 16, limit), out, TranslateOptions(**options), budget))


def pixels_of(folder):
    return {path.name: decode(path.read_bytes()) for path in sorted(folder.glob("*.png"))}


def test_each_image_is_written_under_its_name(apples, tmp_path):
    translator = painter()
    lines = translate(translator, apples, tmp_path / "out", batch=3)
    assert lines == [f"8 translations in {tmp_path / 'out'}"]
    found = pixels_of(tmp_path / "out")
    names, pixels = zip(*open_images(apples, 16), strict=True)
    assert list(found) == [f"{name}.png" for name in names]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(found)
    expected = to_pixels(translator.translate(to_images(torch.stack(pixels))).images)
    unmoved = to_pixels(translator.translate(to_images(torch.stack(pixels)), steps=0).images)
    for image, other in zip(found.values(), expected, strict=True):
        assert (image.int() - other.int()).abs().max() <= 1
    assert (expected.int() - unmoved.int()).abs().float().mean() > 2


def test_noise_belongs_to_the_place_and_the_seed(apples, tmp_path):
    noisy = painter(noise_scale=0.1)
    for name, batch, seed in (("a", 8, 0), ("b", 3, 0), ("c", 8, 1)):
        translate(noisy, apples, tmp_path / name, batch=batch, seed=seed)
    translate(noisy, apples, tmp_path / "few", limit=2)
    a, b, c, few = (pixels_of(tmp_path / name) for name in ("a", "b", "c", "few"))
    for name in a:
        assert (a[name].int() - b[name].int()).abs().max() <= 1
        assert (a[name].int() - c[name].int()).abs().max() > 1
    assert all((a[name].int() - few[name].int()).abs().max() <= 1 for name in few) and len(few) == 2
    assert painter().noise(0, range(3)) is None


def test_paths_have_a_frame_a_step(apples, tmp_path):
    translate(painter(), apples, tmp_path / "out", limit=2, path=True, strength=0.5)
    translate(painter(), apples, tmp_path / "still", limit=1, path=True, strength=0)
    for picture in (tmp_path / "out").glob("*.png"):
        with Image.open(tmp_path / "out/paths" / f"{picture.stem}.gif") as animation:
            assert animation.n_frames == 3  # the start, one step, and half of the second
            assert animation.info["loop"] == 0
            durations = []
            for frame in range(3):
                animation.seek(frame)
                durations.append(animation.info["duration"])
            assert durations == [120, 120, 1000]
        with Image.open(tmp_path / "out/paths" / picture.name) as strip:
            assert strip.width == 3 + 3 * (96 + 3) and strip.height > 99  # a name above each
    [strip] = (tmp_path / "still/paths").glob("*.png")
    assert Image.open(strip).width == 3 + 96 + 3 and strip.with_suffix(".gif").exists()


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (1.0, ["reconstruction", "step 1", "step 2", "step 3"]),
        (0.5, ["reconstruction", "step 1", "strength 0.5"]),  # half of the second step
        (2 / 3, ["reconstruction", "step 1", "strength 0.666667"]),
        (0.0, ["reconstruction"]),
    ],
)
def test_the_end_of_a_shortened_path_is_named_by_its_strength(strength, expected, apples, tmp_path, monkeypatch):
    named = []

    def watched(frames, *, names):
        named.append(names)
        return pictures.strip(frames, names=names)

    monkeypatch.setattr(translating, "strip", watched)
    translate(painter(steps=3), apples, tmp_path / "out", limit=2, path=True, strength=strength)
    assert named == [expected, expected]


def test_a_chain_that_arrives_before_its_strength_keeps_its_steps(apples, tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(translating, "strip", lambda frames, names: named.append(names) or pictures.strip(frames))
    one = painter(steps=3)
    there, elsewhere = ([place + torch.rand(4, 3, 16, 16)] for place in (0, -100))
    arrived = LatentClassifier.fit(elsewhere, there)  # images are all on the target's side
    translate(one, apples, tmp_path / "out", limit=1, path=True, strength=0.5, classifier=arrived)
    assert len(named) == 1 and not any("strength" in name for name in named[0])


def test_a_sheet_names_the_method(apples, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(translating, "grid", lambda images: rows.append(list(images)) or pictures.grid(images))
    translate(painter(), apples, tmp_path / "out", sheet=True, limit=2)
    assert rows == [["source", "reconstruction", "latent energy"]]


def test_sheets_hold_eight_columns(apples, tmp_path):
    lines = translate(painter(), apples, tmp_path / "eight", sheet=True, batch=3)
    assert lines[1] == f"sheets: {tmp_path / 'eight/sheets/sheet-0000.png'}"
    with Image.open(tmp_path / "eight/sheets/sheet-0000.png") as sheet:
        assert sheet.height == 3 * 99 + 3  # source, reconstruction, translation
        columns = [sheet.crop((sheet.width - 99 * i, 3, sheet.width - 99 * i + 96, 99)) for i in range(8, 0, -1)]
        rows = [sheet.crop((sheet.width - 99, 3 + 99 * i, sheet.width - 3, 99 + 99 * i)) for i in range(3)]
    names, pixels = zip(*open_images(apples, 16), strict=True)
    for column, source in zip(columns, pixels, strict=True):
        small = column.resize((16, 16), Image.Resampling.NEAREST)
        assert small.tobytes() == source.permute(1, 2, 0).contiguous().numpy().tobytes()
    result = Image.open(tmp_path / "eight" / f"{names[-1]}.png")
    assert rows[2].resize((16, 16), Image.Resampling.NEAREST).tobytes() == result.tobytes()
    assert rows[1].tobytes() == rows[0].tobytes() != rows[2].tobytes()  # nothing is lost here by encoding


def test_formats(apples, tmp_path):
    translator = painter()
    translate(translator, apples, tmp_path / "jpg", limit=1, format="jpg")
    translate(translator, apples, tmp_path / "png", limit=1)
    [jpg], [png] = (tmp_path / "jpg").iterdir(), (tmp_path / "png").iterdir()
    assert jpg.suffix == ".jpg" and Image.open(jpg).format == "JPEG"
    assert (decode(jpg.read_bytes()).int() - decode(png.read_bytes()).int()).abs().float().mean() < 5


# Memory


@pytest.fixture
def alone(monkeypatch):
    """Memory as if nothing but the pass itself took any: budgets of a few KiB then mean what they say."""
    monkeypatch.setattr(memory, "cost_of", lambda work, _: peak_bytes(work))
    monkeypatch.setattr(memory, "_status", lambda _: 0)


def test_the_budget_decides_how_many_at_once_and_changes_no_picture(apples, tmp_path, alone):
    noisy = painter(noise_scale=0.1)
    line, *_ = translate(noisy, apples, tmp_path / "large", budget=4 * GIB, sheet=True, path=True)
    assert line.startswith("memory: about 0.0 GiB at the peak (weights 0.0, 8 images at once x ")
    sizes, work = [], noisy.autoencoder.encode

    def counted(images):
        if images.amin() < images.amax():  # a grey image only measures
            sizes.append(len(images))
        return work(images)

    noisy.autoencoder.encode = counted
    pixels = 3 * 16**2
    # Sources, noise and gradients: a dozen float images each. A sheet and a path are drawn at a time.
    drawn = 3 * 96**2 * (24 + 4) + 3 * 7 * pixels
    translate(noisy, apples, tmp_path / "small", budget=drawn + 5 * 12 * 4 * pixels, sheet=True, path=True)
    assert max(sizes) in (2, 3, 4, 5) and sum(sizes) == 8 and sizes[:-1] == [max(sizes)] * (len(sizes) - 1)
    for part in ("", "paths", "sheets"):
        large, small = (pixels_of(tmp_path / name / part) for name in ("large", "small"))
        assert large.keys() == small.keys() and large
        for name, image in large.items():
            assert (image.int() - small[name].int()).abs().max() <= 1


def test_kept_frames_and_sheets_are_counted(apples, alone):
    count = len(open_images(apples, 16))

    def planned(**options):
        return plan_translation(painter(), count, TranslateOptions(**options), GIB)

    plain, path, longer = planned(), planned(path=True), planned(path=True, steps=40)
    pixels = 3 * 16**2
    assert plain.images == 8 and plain.beside == 0
    assert path.per_image - plain.per_image >= 4 * pixels
    # A frame of 37 further steps is 768 bytes here, kept as pixels, of the chunk at work and of the one that is
    # written; the strip is drawn at 96 pixels a side.
    assert longer.per_image - path.per_image == pytest.approx(2 * 37 * pixels, abs=pixels)
    assert longer.beside - path.beside == 37 * 3 * 96**2
    sheet = planned(sheet=True)
    assert sheet.beside == 24 * 3 * 96**2 + 21 * pixels and sheet.per_image > plain.per_image
    assert planned(path=True, steps=40, strength=0.5).beside == 21 * 3 * 96**2


@pytest.fixture
def many(tmp_path):
    """A function that makes a folder of that many pictures of 16 pixels."""

    def make(count):
        folder = tmp_path / f"{count} pictures"
        folder.mkdir()
        for number in range(count):
            pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(number))
            Image.fromarray(pixels.byte().numpy()).save(folder / f"{number:03d}.png")
        return folder

    return make


def test_memory_is_flat_in_the_number_of_images(many, tmp_path, monkeypatch):
    """Writing that is slower than the work, and reading that is faster: what lives does not pile up."""
    side, batch, lock, most = 16, 4, threading.Lock(), {}
    write = translating.save_picture

    def slow(picture, path):
        time.sleep(0.02)
        with lock:
            tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
            alive = {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.shape[-1:] == (side,)
            }
            most[path.parent.name] = max(most.get(path.parent.name, 0), sum(alive.values()))
        write(picture, path)

    monkeypatch.setattr(translating, "save_picture", slow)
    for batches in (2, 8):
        images = many(batches * batch)
        translate(painter(), images, tmp_path / f"out{batches}", batch=batch)
        assert len(list((tmp_path / f"out{batches}").iterdir())) == batches * batch
    chunk = batch * 3 * side**2
    # Whether a chunk is seen at work is chance; six more chunks would be, if all that is finished waited to be written.
    assert chunk <= most["out2"] <= most["out8"] + 5 * chunk and most["out8"] <= most["out2"] + 5 * chunk


def test_writing_and_reading_happen_during_the_work(many, tmp_path, monkeypatch):
    """The second chunk is not finished before the first one is written, and was read before that: else this waits for
    ever."""
    written, read, work = threading.Event(), threading.Event(), translating._translate
    seen = []

    def watched(translator, pixels, places, options):
        if places[0] == 4:
            assert written.wait(20), "nothing was written while the second chunk was worked on"
            assert read.wait(20), "the third chunk was not read while the second one was worked on"
        seen.append(list(places))
        return work(translator, pixels, places, options)

    def write(picture, path, **options):
        save_picture(picture, path, **options)
        if path.stem == "003":
            written.set()

    load = inputs._Files._load

    def reading(self, position):
        if position == 11:
            read.set()
        return load(self, position)

    monkeypatch.setattr(translating, "_translate", watched)
    monkeypatch.setattr(translating, "save_picture", write)
    monkeypatch.setattr(inputs._Files, "_load", reading)
    images = many(12)
    translate(painter(), images, tmp_path / "out", batch=4)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [path.stem for path in sorted((tmp_path / "out").iterdir())] == [f"{n:03d}" for n in range(12)]


def test_a_disk_that_is_full_is_heard_of(many, tmp_path, monkeypatch):
    count = []

    def full(picture, path, **options):
        count.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(translating, "save_picture", full)
    with pytest.raises(OSError, match="No space left"):
        translate(painter(), many(12), tmp_path / "out", batch=4)
    assert 1 <= len(count) <= 8  # of the first chunk, and no more than was begun


def test_an_unreadable_picture_is_left_out_in_its_place(many, tmp_path):
    images = many(9)
    (images / "004.png").write_bytes(b"no picture")
    lines = translate(painter(noise_scale=0.1), images, tmp_path / "out", batch=4)
    assert f"left out: {images / '004.png'}" in lines[0] and lines[-1].endswith("1 unreadable images left out")
    (images / "004.png").unlink()
    translate(painter(noise_scale=0.1), images, tmp_path / "alone", batch=3)
    with_bad, without = pixels_of(tmp_path / "out"), pixels_of(tmp_path / "alone")
    assert with_bad.keys() == without.keys() and len(without) == 8
    assert all((with_bad[name].int() - without[name].int()).abs().max() <= 1 for name in without)


def test_what_comes_ahead_is_the_same():
    made = []

    def items():
        for number in range(6):
            made.append(number)
            yield number
        raise UserError("no more")

    source = inputs.ahead(items(), 2)
    assert next(source) == 0 and max(made) <= 2
    with pytest.raises(UserError, match="no more"):
        assert [*source] == "never reached"
    assert list(inputs.ahead(iter(range(7)), 3)) == list(range(7))
    half = inputs.ahead(iter(range(10**9)), 3)
    assert next(half) == 0
    half.close()


def test_a_budget_for_not_even_one(apples, tmp_path, alone):
    with pytest.raises(UserError, match=r"one image at a time takes about .*: give --memory 0\.1$"):
        translate(painter(), apples, tmp_path / "out", budget=1000)
    assert not (tmp_path / "out").exists()


def test_the_plan_comes_before_the_work(apples, tmp_path):
    lines = translate_all(painter(), open_images(apples, 16), tmp_path / "out", TranslateOptions(), GIB * 64)
    assert next(lines).startswith("memory: about ") and not (tmp_path / "out").exists()
    assert next(lines) == f"8 translations in {tmp_path / 'out'}"


def test_nothing_is_written_for_wrong_settings(apples, tmp_path):
    with pytest.raises(UserError, match="strength"):
        translate(painter(), apples, tmp_path / "out", strength=2)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, expected a folder"):
        translate(painter(), apples, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
