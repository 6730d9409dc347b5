import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from letit_dist.data import transforms
from letit_dist.data.transforms import UnreadableImage, decode, encode, resize_crop

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def smooth(height=24, width=32, channels=3):
    y, x, c = np.mgrid[:height, :width, :channels]
    return ((x * 7 + y * 3 + c * 40) % 256).astype(np.uint8)


def saved(array, format, mode=None, **options):
    stream = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, format, **options)
    return stream.getvalue()


def hwc(pixels):
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})])
def test_lossless_formats_are_exact(format, options):
    assert (hwc(decode(saved(smooth(), format, **options))) == smooth()).all()


def test_jpeg_is_close_and_grey_is_repeated():
    pixels = decode(saved(smooth() // 4, "JPEG", quality=98, subsampling=0))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 24, 32) and pixels.permute(1, 2, 0).is_contiguous()
    assert np.abs(hwc(pixels).astype(int) - smooth() // 4).max() <= 8
    grey = decode(saved(smooth()[:, :, 0], "PNG"))
    assert (grey == torch.from_numpy(smooth()[:, :, 0])).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is on the right
    array = np.zeros((16, 32, 3), np.uint8)
    array[:, :16] = 255
    upright = decode(saved(array, format, exif=exif.tobytes() if format != "TIFF" else exif))
    assert upright.shape == (3, 32, 16)
    assert upright[:, :12].float().mean() > 240 and upright[:, 20:].float().mean() < 15


def test_cmyk_is_converted_and_said_so():
    notes = []
    red = np.zeros((16, 16, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
    pixels = decode(saved(red, "JPEG", mode="CMYK", quality=98), notes)
    assert notes == ["CMYK converted to RGB"]
    assert (pixels.float().mean((1, 2)) - torch.tensor([200.0, 30, 30])).abs().max() < 4


def png16(array, colour):
    """A PNG of 16 bits a channel, which Pillow cannot write in colour."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def test_sixteen_bits_are_scaled():
    values = (np.arange(8 * 8 * 3).reshape(8, 8, 3) * 341).astype(np.uint16)
    expected = values / 257
    notes = []
    assert np.abs(hwc(decode(png16(values, 2), notes)) - expected).max() < 1
    assert notes == ["16 bits reduced to 8"]
    grey = expected[:, :, :1].round()
    assert (hwc(decode(png16(values[:, :, 0], 0), notes)) == grey).all()
    assert (hwc(decode(saved(Image.fromarray(values[:, :, 0]), "TIFF"), notes)) == grey).all()
    assert set(notes) == {"16 bits reduced to 8"}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(format):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, 0] = (10, 20, 30, 255)
    rgba[:, 1] = (10, 20, 30, 0)
    rgba[:, 2] = (100, 0, 0, 128)
    notes = []
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    pixels = hwc(decode(saved(rgba, format, **options), notes))
    assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255], [177, 127, 127]]
    assert notes == ["transparency laid over white"]


def test_opaque_alpha_and_palettes():
    rgba = np.concatenate([smooth(), np.full((24, 32, 1), 255, np.uint8)], 2)
    notes = []
    assert (hwc(decode(saved(rgba, "PNG"), notes)) == smooth()).all() and notes == []
    flat = Image.fromarray(smooth()).quantize(16)
    assert (hwc(decode(saved(flat, "PNG"))) == np.asarray(flat.convert("RGB"))).all()
    assert (hwc(decode(saved(flat, "PNG", transparency=0)))[np.asarray(flat) == 0] == 255).all()
    assert set(decode(saved(Image.fromarray(smooth()).convert("1"), "PNG")).unique().tolist()) == {0, 255}


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_refused(format):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 200)]
    with pytest.raises(UnreadableImage, match="animated"):
        decode(saved(frames[0], format, save_all=True, append_images=frames[1:]))
    if format == "GIF":
        assert decode(saved(frames[1], "GIF")).unique().tolist() == [200]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.97])
def test_truncated_files_are_refused(format, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = saved(noise, format)
    with pytest.raises(UnreadableImage):
        decode(data[: int(len(data) * part)], trusted=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF8",
        b"<html>not found</html>",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF0000WEBP",
        b"RIFF0000WEBPVP8X",
    ],
)
def test_what_is_not_an_image_is_refused(data):
    with pytest.raises(UnreadableImage):
        decode(data)


def test_a_flipped_byte_never_gives_anything_but_pixels_or_unreadable():
    # torchvision's PNG decoder dies of half of these.
    generator = np.random.default_rng(1)
    for format, trusted in (("JPEG", True), ("PNG", True), ("PNG", False), ("WEBP", True)):
        data = saved(smooth(), format)
        for _ in range(150):
            broken = bytearray(data)
            broken[generator.integers(len(data))] ^= 1 << generator.integers(8)
            with contextlib.suppress(UnreadableImage):
                assert decode(bytes(broken), trusted=trusted).dtype == torch.uint8


def test_encoding_round_trips():
    pixels = torch.from_numpy(smooth()).permute(2, 0, 1)
    for format, trusted in (("png", True), ("png", False), ("webp", True)):
        assert torch.equal(decode(encode(pixels, format), trusted=trusted), pixels)
    jpeg = encode(pixels // 4, "jpeg", 95)
    assert Image.open(io.BytesIO(jpeg)).layer[0][1:3] == (1, 1)  # 4:4:4
    assert (decode(jpeg).float() - pixels // 4).abs().mean() < 3
    assert len(encode(pixels, "jpeg", 30)) < len(jpeg)
    assert encode(pixels, "jpeg") == encode(pixels, "jpeg", 98)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_box_is_the_exact_average_at_whole_factors(factor):
    pixels = torch.randint(
        0, 256, (3, 6 * factor, 6 * factor), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    exact = pixels.double().unfold(1, factor, factor).unfold(2, factor, factor).mean((3, 4))
    assert (resize_crop(pixels, 6).double() - exact).abs().max() <= 0.5 + 1e-9


def test_crop_is_centred_and_filters_do_what_they_say():
    pixels = torch.zeros(3, 8, 16, dtype=torch.uint8)
    pixels[:, :, 4:12] = 200
    assert resize_crop(pixels, 8).unique().tolist() == [200]
    assert resize_crop(pixels.mT, 4).unique().tolist() == [200]
    ramp = torch.from_numpy(smooth(32, 32)).permute(2, 0, 1)
    assert resize_crop(ramp, 16, "lanczos").shape == (3, 16, 16)
    assert not torch.equal(resize_crop(ramp, 16, "lanczos"), resize_crop(ramp, 16))
    assert torch.equal(resize_crop(ramp, 48), resize_crop(ramp, 48, "lanczos"))
    assert resize_crop(ramp, 12).shape == (3, 12, 12)
    with pytest.raises(ValueError, match="box, lanczos"):
        resize_crop(ramp, 12, "bicubic")


def test_images_and_pixels():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    images = transforms.to_images(pixels)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(transforms.to_pixels(images), pixels)
    assert transforms.to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_flip_and_grayscale_follow_their_masks():
    pixels = torch.from_numpy(np.stack([smooth()] * 2)).permute(0, 3, 1, 2)
    mask = torch.tensor([True, False])
    flipped, grey = pixels.clone(), pixels.clone()
    transforms.flip_(flipped, mask)
    transforms.grayscale_(grey, mask)
    assert torch.equal(flipped[0], pixels[0].flip(-1)) and torch.equal(flipped[1], pixels[1])
    assert torch.equal(grey[1], pixels[1]) and grey.dtype == torch.uint8
    assert (
        hwc(grey[0])[:, :, 0].astype(int) - np.asarray(Image.fromarray(smooth()).convert("L"), int)
    ).__abs__().max() <= 1
    assert (grey[0] == grey[0, :1]).all()


# Decoding at a fraction of the size


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_reduced_jpeg_is_near_its_average(factor):
    image = Image.fromarray(smooth(64, 64) // 2 + 60).resize((256, 256), Image.Resampling.BICUBIC)
    for mode, options in (("RGB", {"subsampling": 0}), ("RGB", {"subsampling": 2, "progressive": True}), ("L", {})):
        data = saved(image, "JPEG", mode, quality=95, **options)
        found, expected = transforms.decode_reduced(data, 256, 256 // factor), resize_crop(decode(data), 256 // factor)
        assert found.shape == expected.shape and found.dtype == torch.uint8
        error = (found.float() - expected.float()).square().mean().sqrt()
        assert 0 < error < 3 and not torch.equal(found, expected)


def test_only_what_can_be_reduced_is_reduced():
    reduced = transforms.decode_reduced
    picture = Image.fromarray(smooth(64, 64))
    data = saved(picture, "JPEG")
    assert reduced(data, 64, 16).shape == (3, 16, 16)
    for side, resolution in ((64, 64), (64, 4), (128, 32), (64, 48)):  # as large; 1/16; not its size; no power of two
        assert reduced(data, side, resolution) is None
    assert reduced(saved(picture, "PNG"), 64, 16) is None
    assert reduced(saved(picture.convert("CMYK"), "JPEG"), 64, 16) is None
    assert reduced(saved(Image.fromarray(smooth(64, 32)), "JPEG"), 64, 16) is None
    assert reduced(data[:100], 64, 16) is None  # no size in it: `decode` says what is wrong
    with pytest.raises(UnreadableImage, match="truncated"):
        reduced(data[: len(data) // 2], 64, 16)
