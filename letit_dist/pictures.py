"""Pictures for people: labelled sheets, strips and animations, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 3
_PAPER = (255, 255, 255)
_INK = (20, 20, 20)
_SMALLEST = 9  # a font that can still be read
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}


def to_picture(image: Tensor, cell: int | None = None) -> Image.Image:
    """One image (3, H, W) in [-1, 1], clipped, or pixels as uint8; enlarged or reduced to `cell` pixels a side if
    given."""
    pixels = image.detach()
    if pixels.dtype != torch.uint8:
        pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    if cell and picture.width != cell:
        # Whole factors keep the pixels honest; everything else is resampled.
        whole = cell % picture.width == 0
        picture = picture.resize((cell, cell), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's other font has one size
    return font


def visible_size(resolution: int, least: int = 96) -> int:
    """Pixels a side, `least` or more, to judge an image by eye: small ones are enlarged by a whole factor."""
    return resolution * max(1, -(-least // resolution))


def grid(
    rows: Mapping[str, Sequence[Tensor] | Tensor], *, cell: int | None = None, title: str | None = None
) -> Image.Image:
    """A sheet: each row's name, then its images (B, 3, H, W) in [-1, 1] or uint8."""
    cell = cell or visible_size(next(iter(rows.values()))[0].shape[-1])
    font = _font(max(12, cell // 8))
    label = max(int(font.getlength(name)) for name in rows) + 4 * _MARGIN
    columns = max(len(images) for images in rows.values())
    step = cell + _MARGIN
    head = int(1.8 * font.size) if title else 0
    width = max(label + columns * step, int(font.getlength(title or "")) + 4 * _MARGIN)
    sheet = Image.new("RGB", (width, head + len(rows) * step + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((2 * _MARGIN, head // 2), title, fill=_INK, font=font, anchor="lm")
    for r, (name, images) in enumerate(rows.items()):
        top = head + _MARGIN + r * step
        draw.text((2 * _MARGIN, top + cell // 2), name, fill=_INK, font=font, anchor="lm")
        for c, image in enumerate(images):
            sheet.paste(to_picture(image, cell), (label + c * step, top))
    return sheet


def strip(images: Sequence[Tensor], *, cell: int | None = None, names: Sequence[str] | None = None) -> Image.Image:
    """T images (3, H, W) in [-1, 1] or uint8 side by side, in order; `names` stand above them."""
    cell = cell or visible_size(images[0].shape[-1])
    if names is not None:
        return columns({name: [image] for name, image in zip(names, images, strict=True)}, cell=cell)
    picture = Image.new("RGB", (len(images) * (cell + _MARGIN) - _MARGIN, cell), _PAPER)
    for i, image in enumerate(images):
        picture.paste(to_picture(image, cell), (i * (cell + _MARGIN), 0))
    return picture


def columns(pictures: Mapping[str, Sequence[Tensor]], *, cell: int | None = None) -> Image.Image:
    """A sheet read from left to right: each column's name, of one line or more, above its images (B, 3, H, W) in
    [-1, 1] or uint8."""
    cell = cell or visible_size(next(iter(pictures.values()))[0].shape[-1])
    font = _fitting([line for name in pictures for line in name.splitlines()], cell, cell // 8)
    head = int(1.3 * font.size * max(name.count("\n") + 1 for name in pictures)) + 2 * _MARGIN
    step, rows = cell + _MARGIN, max(map(len, pictures.values()))
    sheet = Image.new("RGB", (len(pictures) * step + _MARGIN, head + rows * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, (name, images) in enumerate(pictures.items()):
        left = _MARGIN + c * step
        place = (left + cell // 2, head - _MARGIN)
        draw.multiline_text(place, name, fill=_INK, font=font, anchor="md", align="center", spacing=0.2 * font.size)
        for r, image in enumerate(images):
            sheet.paste(to_picture(image, cell), (left, head + r * step))
    return sheet


def captioned(
    images: Sequence[Tensor], captions: Sequence[str], *, cell: int | None = None, among: Sequence[str] = ()
) -> Image.Image:
    """T images as in `strip`, each with its lines of text below, all in the largest font in which each of them fits
    its cell, and each of those `among` which they stand: frames of an animation have one size."""
    cell = cell or visible_size(images[0].shape[-1])
    font = _fitting(
        [line for caption in (*captions, *among) for line in caption.splitlines()], 15 * cell // 16, cell // 9
    )
    pictures = strip(images, cell=cell)
    rows = max(caption.count("\n") + 1 for caption in captions)
    sheet = Image.new("RGB", (pictures.width, cell + int(1.3 * rows * font.size) + 2 * _MARGIN), _PAPER)
    sheet.paste(pictures, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        place = (i * (cell + _MARGIN) + cell // 2, cell + _MARGIN)
        draw.multiline_text(place, caption, fill=_INK, font=font, anchor="ma", align="center", spacing=0.2 * font.size)
    return sheet


def _fitting(lines: Sequence[str], width: int, largest: int) -> ImageFont.FreeTypeFont:
    size = max(_SMALLEST, largest)
    while size > _SMALLEST and max(map(_font(size).getlength, lines)) > width:
        size -= 1
    return _font(size)


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of any size in a row, their upper edges on one line."""
    width = sum(picture.width + _MARGIN for picture in pictures) - _MARGIN
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), _PAPER)
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + _MARGIN
    return sheet


def stacked(pictures: Mapping[str, Image.Image], title: str, *, size: int) -> Image.Image:
    """Pictures below one another, each under its name, and a title above; `size` is the height of the letters."""
    font = _font(max(12, size))
    head, gap = int(1.8 * font.size), 2 * _MARGIN
    wide = max(*(p.width for p in pictures.values()), *(font.getlength(name) for name in (title, *pictures)))
    height = head + sum(head + picture.height + gap for picture in pictures.values())
    sheet = Image.new("RGB", (int(wide) + 2 * gap, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, head // 2), title, fill=_INK, font=font, anchor="lm")
    top = head
    for name, picture in pictures.items():
        draw.text((gap, top + head // 2), name, fill=_INK, font=font, anchor="lm")
        sheet.paste(picture, (gap, top + head))
        top += head + picture.height + gap
    return sheet


def save_picture(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write beside and rename: a viewer never sees half a picture. The format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    picture.save(beside, format=_FORMATS.get(path.suffix.lower(), "PNG"), **options)
    os.replace(beside, path)


def save_animation(images: Sequence[Tensor], path: Path, *, milliseconds: int = 120) -> None:
    """A looping GIF of images (3, H, W) in [-1, 1] or uint8; the last one stays for a second."""
    frames = (to_picture(image, visible_size(image.shape[-1])) for image in images)
    save_frames(frames, len(images), path, milliseconds=milliseconds)


def save_frames(frames: Iterator[Image.Image], count: int, path: Path, *, milliseconds: int = 120) -> None:
    """A looping animation of `count` pictures, a GIF or a WebP by the suffix; the last one stays for a second."""
    # One at a time: Pillow keeps those of a GIF anyway, with a third of the bytes.
    durations = [milliseconds] * (count - 1) + [1000]
    save_picture(next(frames), path, save_all=True, append_images=frames, duration=durations, loop=0)
