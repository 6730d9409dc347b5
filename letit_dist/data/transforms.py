"""Between encoded bytes, pixels (uint8) and images (float in [-1, 1])."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from letit_dist.errors import UserError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm")
FORMATS = ("png", "jpeg", "webp")
FILTERS = ("box", "lanczos")
EXIF_MARKS = (b"Exif\0", b"eXIf", b"EXIF", b"Raw profile type exif")  # of JPEG, PNG, WebP, older PNG
_RGB = 3  # torchvision.io.ImageReadMode.RGB


class UnreadableImage(Exception):
    """These bytes are not one image; the message is the reason."""


@functools.cache
def fast_decoders() -> ModuleType | None:
    """torchvision's decoders, or None where they are not there: Pillow reads everything too, at 60 % of the speed.

    Loaded for the first picture, because torchvision brings torch's compiler with it: a third of the time in which a
    program starts that reads none. (torchvision 0.29 announces that its decoders will go one day.)
    """
    try:
        from torchvision import io as decoders

        torch.ops.image.decode_jpeg  # noqa: B018
    except (ImportError, AttributeError):
        return None
    return decoders


def decode(data: bytes, notes: list[str] | None = None, *, trusted: bool = False) -> Tensor:
    """Encoded image -> pixels of one image, uint8 (3, H, W) RGB, upright; in memory (H, W, 3), as decoders write it.

    16 bits become 8, grey is repeated, transparency is laid over white, CMYK is converted; what changes the
    picture is appended to `notes`. Raises UnreadableImage (empty, truncated, animated, not an image).

    `trusted` says that our packer wrote these bytes, in RGB and upright, so that a JPEG needs no look at its header.
    PNG then takes torchvision's decoder, half again as fast as Pillow's, which (0.29) ends the process by a
    segmentation fault where libpng reports an error.
    """
    if not data:
        raise UnreadableImage("empty file")
    if notes is None:
        notes = []
    elif _turned(data):
        notes.append("turned upright, as EXIF says")
    pixels = _fast(data, notes, trusted) if fast_decoders() else None
    return _pillow(data, notes) if pixels is None else pixels


def _turned(data: bytes) -> bool:
    """Whether EXIF says that the stored pixels are not upright."""
    if not data.startswith((b"II*\0", b"MM\0*")) and not any(mark in data for mark in EXIF_MARKS):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(0x0112, 1) in range(2, 9)
    except Exception:
        return False  # what is wrong with it is said where it is decoded


def image_type(data: bytes) -> str | None:
    """The usual extension of what these bytes are (png, jpg, webp, gif, bmp, tif), whatever their file is called."""
    if data[:4] == b"RIFF":
        return "webp" if data[8:12] == b"WEBP" else None
    heads: dict[str, bytes | tuple[bytes, ...]]
    heads = {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff", "gif": b"GIF8", "bmp": b"BM", "tif": (b"II*\0", b"MM\0*")}
    return next((name for name, head in heads.items() if data.startswith(head)), None)


def _fast(data: bytes, notes: list[str], trusted: bool) -> Tensor | None:
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg(data, trusted)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _png(data, trusted)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data, notes)
    except RuntimeError:
        pass  # torchvision gave up; Pillow knows more variants, and words the reason better
    return None


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _jpeg(data: bytes, trusted: bool) -> Tensor | None:
    if not trusted and (frame := _jpeg_frame(data)) and frame[0] == 4:
        return None  # CMYK: Pillow knows Adobe's inverted inks
    # Without torchvision's function around it, which warns at every call: a tenth of the time of a small image. The
    # last argument turns the picture upright, as EXIF says: ours are.
    return torch.ops.image.decode_jpeg(_bytes(data), _RGB, not trusted)


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """(components, height, width) that a JPEG's header states, without turning it upright."""
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[at + 9], *struct.unpack_from(">HH", data, at + 5)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def decode_reduced(data: bytes, side: int, resolution: int) -> Tensor | None:
    """A JPEG of side x side pixels at 1/2, 1/4 or 1/8 of that, uint8 (3, R, R), from its low frequencies alone.

    Faster than decoding all and averaging, and not the same: about 55 dB from the box filter's result. None for
    anything else than such a JPEG in grey or YCbCr; `decode` then says what it is. Raises UnreadableImage.
    """
    if side not in (2 * resolution, 4 * resolution, 8 * resolution) or data[:3] != b"\xff\xd8\xff":
        return None
    if (frame := _jpeg_frame(data)) is None or frame[0] == 4 or frame[1:] != (side, side):
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (resolution, resolution))
            pixels = _from_pillow(ImageOps.exif_transpose(image), [])
    except Exception as error:
        raise _unreadable(error) from None
    return pixels if pixels.shape[1:] == (resolution, resolution) else None


def _png(data: bytes, trusted: bool) -> Tensor | None:
    if not trusted:
        return None
    at, chunks, whole = 8, set(), True
    view = memoryview(data)
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        chunks.add(name)
        if end + 4 <= len(data):  # a flipped bit must not reach libpng
            whole = whole and zlib.crc32(view[at + 4 : end]) == int.from_bytes(data[end : end + 4], "big")
        at = end + 4
    depth, colour = data[24:26].ljust(2, b"\0")
    simple = depth == 8 and colour in (0, 2) and not chunks - {b"IHDR", b"IDAT", b"IEND"}
    if simple and whole and at == len(data) and (decoders := fast_decoders()) is not None:
        return decoders.decode_png(_bytes(data), mode=decoders.ImageReadMode.RGB)
    return None


def _webp(data: bytes, notes: list[str]) -> Tensor | None:
    flags = int.from_bytes(data[20:21], "big") if data[12:16] == b"VP8X" else 0
    if flags & 0x02:
        raise UnreadableImage("animated WebP")
    decoders = fast_decoders()
    if decoders is None or flags & 0x08:
        return None  # has EXIF, perhaps an orientation, which torchvision does not apply here
    pixels = decoders.decode_webp(_bytes(data))
    return _over_white(pixels, notes) if len(pixels) == 4 else pixels


def _over_white(rgba: Tensor, notes: list[str]) -> Tensor:
    """uint8 (4, H, W) -> (3, H, W)."""
    alpha = rgba[3:].to(torch.int32)
    if bool((alpha == 255).all()):
        return rgba[:3].contiguous()
    notes.append("transparency laid over white")
    return ((rgba[:3] * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def _pillow(data: bytes, notes: list[str]) -> Tensor:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        notes.append("16 bits reduced to 8")  # in colour, Pillow keeps the high byte and does not say so
    try:
        with Image.open(io.BytesIO(data)) as image:
            frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and frames > 1:
                raise UnreadableImage(f"animated or several pages: {frames} frames in a {image.format}")
            image.load()
            return _from_pillow(ImageOps.exif_transpose(image), notes)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image that Pillow or torchvision knows") from None
    except Exception as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> UnreadableImage:
    # Decoders of hostile bytes raise nearly anything: OSError, SyntaxError, struct.error, bomb errors.
    return UnreadableImage(f"{type(error).__name__}: {' '.join(str(error).split())}")


def picture_pixels(picture: Image.Image) -> Tensor:
    """A Pillow picture as `decode` gives its file: uint8 (3, H, W) RGB, upright, transparency over white."""
    try:
        return _from_pillow(ImageOps.exif_transpose(picture), [])
    except (UnreadableImage, OSError) as error:
        raise UserError(f"this picture cannot be read: {error}") from None


def _from_pillow(image: Image.Image, notes: list[str]) -> Tensor:
    if image.mode.startswith("I"):
        if "16 bits reduced to 8" not in notes:
            notes.append("16 bits reduced to 8")
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return torch.from_numpy(((grey * 255 + 32767) // 65535).astype(np.uint8)).expand(3, -1, -1).contiguous()
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels without a stated range")
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over_white(_planes(image.convert("RGBA")), notes)
    return _planes(image.convert("RGB"))


def _planes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encode(pixels: Tensor, format: str = "png", quality: int | None = None) -> bytes:
    """uint8 (3, H, W) -> bytes. JPEG is written 4:4:4; WebP without a quality is lossless."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    stream = io.BytesIO()
    if format == "png":
        image.save(stream, "PNG")
    elif format == "jpeg":
        image.save(
            stream, "JPEG", quality=default_quality(max(image.size)) if quality is None else quality, subsampling=0
        )
    elif format == "webp":
        # exact: keep the colours under no matter what, so that lossless means every bit.
        options = {"lossless": True, "exact": True} if quality is None else {"quality": quality}
        image.save(stream, "WEBP", method=4, **options)
    else:
        raise ValueError(f"format {format!r}, known: {', '.join(FORMATS)}")
    return stream.getvalue()


def default_quality(resolution: int) -> int:
    """q95 keeps 49.8 dB at 1024 but only 41.9 dB at 128, so small images get q98."""
    return 98 if resolution <= 128 else 95


def resize_crop(pixels: Tensor, resolution: int, filter: str = "box") -> Tensor:
    """uint8 (3, H, W) -> (3, R, R): the centred square, resized.

    `box` is the exact rounded average when the square is a multiple of R (what progressive growing sees), and
    the area average otherwise. A square smaller than R is enlarged with Lanczos, whatever the filter.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter {filter!r}, known: {', '.join(FILTERS)}")
    height, width = pixels.shape[1:]
    if height == width == resolution:
        return pixels
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[:, top : top + side, left : left + side]
    if side == resolution:
        return pixels
    if side % resolution == 0 and filter == "box":
        return _box(pixels, side // resolution)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if side < resolution or filter == "lanczos":
        return _planes(image.resize((resolution, resolution), Image.Resampling.LANCZOS))
    return _planes(image.resize((resolution, resolution), Image.Resampling.BOX))


def _box(pixels: Tensor, factor: int) -> Tensor:
    """uint8 (3, H, W) -> (3, H/f, W/f): averages rounded to nearest, halves to even, as `avg_pool2d` and `round`.

    In whole numbers of 16 bits, and rows first: several times faster than the pooling of floats. Pillow's reduce()
    rounds halves up.
    """
    planes = pixels.numpy()
    wide = np.uint16 if 255 * factor**2 < 1 << 16 else np.uint32
    rows = np.add(planes[:, ::factor], planes[:, 1::factor], dtype=wide)
    for k in range(2, factor):
        rows += planes[:, k::factor]
    sums = np.empty((planes.shape[0], rows.shape[1], rows.shape[2] // factor), wide)
    # Plane by plane: decoders give interleaved colours, over whose three numpy would loop innermost.
    for plane, into in zip(rows, sums, strict=True):
        np.add(plane[:, ::factor], plane[:, 1::factor], out=into)
        for k in range(2, factor):
            into += plane[:, k::factor]
    means = sums.astype(np.float32)
    means /= factor**2
    return torch.from_numpy(np.rint(means, out=means).astype(np.uint8))


def to_images(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """pixels uint8 (B, 3, H, W) -> images in [-1, 1], row-major however the pixels lie."""
    return pixels.to(dtype, copy=True, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_pixels(images: Tensor) -> Tensor:
    """images (B, 3, H, W) -> pixels uint8, clamped and rounded; undoes `to_images` exactly."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def flip_(pixels: Tensor, mask: Tensor) -> None:
    """Mirror left and right, in place, where mask (B,) is true; any dtype, (B, 3, H, W)."""
    for row in mask.nonzero().flatten().tolist():
        pixels[row] = pixels[row].flip(-1)


def grayscale_(pixels: Tensor, mask: Tensor) -> None:
    """Replace uint8 (B, 3, H, W), in place, by its luma (ITU-R BT.601, rounded) where mask (B,) is true."""
    weights = torch.tensor([299, 587, 114], dtype=torch.int32).view(3, 1, 1)
    for row in mask.nonzero().flatten().tolist():
        pixels[row] = (((pixels[row] * weights).sum(0) + 500) // 1000).to(torch.uint8)
