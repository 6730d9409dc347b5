import pytest
import torch
from PIL import Image

from letit_dist.pictures import grid, save_animation, save_picture, strip, to_picture, visible_size


def flat(value, size=4):
    return torch.full((3, size, size), float(value))


def test_pixels_are_rounded_and_clipped():
    values = [-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]
    shades = [to_picture(flat(value)).getpixel((0, 0))[0] for value in values]
    assert shades == [0, 0, 128, 191, 255, 255]
    colour = torch.tensor([-1.0, 0.0, 1.0])[:, None, None].expand(3, 2, 3)
    assert to_picture(colour).size == (3, 2) and to_picture(colour).getpixel((2, 1)) == (0, 128, 255)


def test_pixels_are_taken_as_they_are(tmp_path):
    pixels = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    assert to_picture(pixels).getpixel((1, 0)) == (1, 17, 33)
    floats = pixels.float() / 127.5 - 1
    for draw in (lambda image: strip([image, image]), lambda image: grid({"row": [image]})):
        assert draw(pixels).tobytes() == draw(floats).tobytes()
    save_animation([pixels, pixels.flip(-1)], tmp_path / "a.gif")
    save_animation(torch.stack([floats, floats.flip(-1)]), tmp_path / "b.gif")
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    assert Image.open(tmp_path / "a.gif").n_frames == 2


def test_whole_factors_keep_the_pixels():
    image = torch.zeros(3, 2, 2)
    image[:, 0, 1] = 1
    assert sorted(colour for _, colour in to_picture(image, 8).getcolors()) == [(128,) * 3, (255,) * 3]
    assert to_picture(image, 8).getpixel((4, 3)) == (255,) * 3 and to_picture(image, 8).getpixel((3, 3)) == (128,) * 3
    assert to_picture(image, 5).size == (5, 5)


def test_small_images_are_enlarged_until_they_can_be_seen():
    assert [visible_size(size) for size in (4, 32, 64, 96, 256)] == [96, 96, 128, 96, 256]


def test_a_sheet_has_a_row_for_each_name():
    rows = {"one": torch.stack([flat(-1), flat(0)]), "two": torch.stack([flat(1)] * 3)}
    sheet, titled = grid(rows, cell=16), grid(rows, cell=16, title="both")
    label = sheet.width - 3 * 19
    assert label > 12 and sheet.height == 2 * 19 + 3 and titled.height > sheet.height
    assert sheet.getpixel((label + 8, 3 + 8)) == (0, 0, 0) and sheet.getpixel((label + 19 + 8, 3 + 8)) == (128,) * 3
    assert sheet.getpixel((label + 2 * 19 + 8, 3 + 8)) == (255,) * 3  # paper: the first row is shorter
    names = sheet.crop((0, 0, label - 3, sheet.height))
    assert min(names.convert("L").getextrema()) < 100, "no name was written"


def test_a_strip_is_in_order():
    picture = strip(torch.stack([flat(-1), flat(1), flat(0)]), cell=10)
    assert picture.size == (36, 10)
    assert [picture.getpixel((x, 5))[0] for x in (5, 18, 31)] == [0, 255, 128]


def test_a_strip_with_names_says_them_above_each_picture():
    picture = strip(torch.stack([flat(-1), flat(1)]), cell=40, names=["first", "second"])
    assert picture.size == (2 * 43 + 3, picture.height) and picture.height > 40
    head = picture.crop((0, 0, picture.width, picture.height - 43)).convert("L")
    assert all(min(head.crop((left, 0, left + 43, head.height)).getextrema()) < 100 for left in (0, 43))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        strip([flat(0)], names=["one", "too many"])


@pytest.mark.parametrize(
    ("name", "format"), [("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.jpeg", "JPEG"), ("d.gif", "GIF")]
)
def test_the_format_follows_the_suffix(tmp_path, name, format):
    save_picture(to_picture(flat(0)), tmp_path / "new" / name)
    assert Image.open(tmp_path / "new" / name).format == format
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    save_picture(to_picture(flat(1)), tmp_path / "a.jpg")
    before = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(OSError):
        save_picture(to_picture(flat(0)).convert("RGBA"), tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == before


@pytest.mark.parametrize("count", [1, 3])
def test_an_animation_loops_and_rests_on_its_last_image(tmp_path, count):
    frames = [flat(value, 96) for value in (-1.0, 0.0, 1.0)[:count]]
    save_animation(frames, tmp_path / "a.gif", milliseconds=50)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.format == "GIF" and film.n_frames == count
        durations = []
        for number in range(count):
            film.seek(number)
            durations.append(film.info["duration"])
        assert durations == [50, 50, 1000][3 - count :]
        if count > 1:
            assert film.info["loop"] == 0
