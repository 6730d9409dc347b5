"""Pictures for people: labelled sheets, strips and animations, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 3
_PAPER = (255, 255, 255)
_INK = (20, 20, 20)


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


def visible_size(resolution: int) -> int:
    """Pixels a side at which an image can be judged by eye: small ones enlarged by a whole factor."""
    return resolution * max(1, -(-96 // resolution))


def grid(rows: Mapping[str, Sequence[Tensor]], *, cell: int | None = None, title: str | None = None) -> Image.Image:
    """A sheet: each row's name, then its images (B, 3, H, W) in [-1, 1] or uint8."""
    cell = cell or visible_size(next(iter(rows.values()))[0].shape[-1])
    font = ImageFont.load_default(size=max(12, cell // 8))
    label = max(int(font.getlength(name)) for name in rows) + 4 * _MARGIN
    columns = max(len(images) for images in rows.values())
    step = cell + _MARGIN
    head = int(1.8 * font.size) if title else 0
    sheet = Image.new("RGB", (label + columns * step, head + len(rows) * step + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((2 * _MARGIN, head // 2), title, fill=_INK, font=font, anchor="lm")
    for r, (name, images) in enumerate(rows.items()):
        top = head + _MARGIN + r * step
        draw.text((2 * _MARGIN, top + cell // 2), name, fill=_INK, font=font, anchor="lm")
        for c, image in enumerate(images):
            sheet.paste(to_picture(image, cell), (label + c * step, top))
    return sheet


def strip(images: Sequence[Tensor], *, cell: int | None = None) -> Image.Image:
    """T images (3, H, W) in [-1, 1] or uint8 side by side, in order."""
    cell = cell or visible_size(images[0].shape[-1])
    picture = Image.new("RGB", (len(images) * (cell + _MARGIN) - _MARGIN, cell), _PAPER)
    for i, image in enumerate(images):
        picture.paste(to_picture(image, cell), (i * (cell + _MARGIN), 0))
    return picture


def save_picture(picture: Image.Image, path: Path, **options) -> None:
    """Write beside and rename: a viewer never sees half a picture. The format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    format = {".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF"}.get(path.suffix.lower(), "PNG")
    picture.save(beside, format=format, **options)
    os.replace(beside, path)


def save_animation(images: Sequence[Tensor], path: Path, *, milliseconds: int = 120) -> None:
    """A looping GIF of images (3, H, W) in [-1, 1] or uint8; the last one stays for a second."""
    # One at a time: Pillow keeps them all anyway, with a third of the bytes.
    frames = (to_picture(image, visible_size(image.shape[-1])) for image in images)
    durations = [milliseconds] * (len(images) - 1) + [1000]
    save_picture(next(frames), path, save_all=True, append_images=frames, duration=durations, loop=0)
