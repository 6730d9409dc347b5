"""Images inside archives, read where they lie: zips, img2dataset's tars, ImageNet's tar of tars."""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from letit_dist.data.index import INDEX_NAME, scan_tar
from letit_dist.data.progress import Progress
from letit_dist.data.source_base import Item, Layout, Part, Request, Source, fingerprint, first_images, is_image, select
from letit_dist.data.source_files import domain_name
from letit_dist.data.source_sets import class_of, val_classes, without_class
from letit_dist.data.transforms import IMAGE_EXTENSIONS
from letit_dist.errors import UserError


class ZipSource(Source):
    """Members of one zip: (name, what else is known)."""

    def __init__(self, path: str | Path, members: list[tuple[zipfile.ZipInfo, dict[str, Any]]], layout: str):
        self.path, self.members, self.layout = Path(path), members, layout
        self._zip: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self) -> int:
        return len(self.members)

    def name(self, number: int) -> str:
        return self.members[number][0].filename

    def item(self, number: int) -> Item:
        member, known = self.members[number]
        # One handle a process: forked workers would share its position.
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = os.getpid(), zipfile.ZipFile(self.path)
        try:
            content = self._zip[1].read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise OSError(f"{type(error).__name__}: {error}") from None
        return Item(member.filename.rpartition(".")[0], content, {"file": member.filename, **known})

    def settings(self) -> dict[str, Any]:
        lines = (f"{m.filename} {m.file_size} {m.CRC} {json.dumps(known)}" for m, known in self.members)
        return {
            "source": self.path.name,
            "files": len(self),
            "listing": fingerprint(lines),
            "layout": self.layout,
        }

    def bytes(self) -> int:
        return sum(member.file_size for member, _ in self.members)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}


class ZipLayout(Layout):
    """A zip of images; with dataset.json (StyleGAN's) its labels are kept, and `--column label` makes them domains."""

    name = "zip"
    takes = frozenset({"domain", "split", "column"})

    @staticmethod
    def recognise(spec: str) -> str | None:
        path = Path(spec)
        if not (path.is_file() and path.suffix.lower() == ".zip"):
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                labelled = "dataset.json" in archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{spec}: not a readable zip: {error}") from None
        return "a data set of StyleGAN with dataset.json" if labelled else "a zip of images"

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        try:
            with zipfile.ZipFile(spec) as archive:
                members = [m for m in archive.infolist() if not m.is_dir() and is_image(m.filename)]
                labels = cls._labels(archive, spec) if "dataset.json" in archive.namelist() else None
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{spec}: not a readable zip: {error}") from None
        members = sorted((m for m in members if not m.filename.startswith("__MACOSX")), key=lambda m: m.filename)
        if not members:
            raise UserError(f"{spec}: no images in this zip (looked for {', '.join(IMAGE_EXTENSIONS)})")
        if request.column is None:
            known = [(m, {"label": labels[m.filename]} if labels and m.filename in labels else {}) for m in members]
            return [Part("", request.domain, request.split, ZipSource(spec, known, cls.name))]
        if request.column != "label" or not labels:
            have = "its dataset.json has labels: --column label" if labels else "there are no labels in this zip"
            raise UserError(f"--column {request.column} has no effect on {spec}: {have}")
        if odd := [m.filename for m in members if m.filename not in labels]:
            raise UserError(f"{spec}: dataset.json has no label for {len(odd)} images, the first: {odd[0]}")
        groups: dict[str, list[tuple[zipfile.ZipInfo, dict[str, Any]]]] = {}
        for member in members:
            label = labels[member.filename]
            groups.setdefault(domain_name(label), []).append((member, {"label": label}))
        if len(groups) < 2:
            raise UserError(f"{spec}: one domain where two are needed: every label is {next(iter(groups))}")
        parts = [Part(name, name, request.split, ZipSource(spec, groups[name], cls.name)) for name in sorted(groups)]
        return select(parts, request, spec)

    @staticmethod
    def _labels(archive: zipfile.ZipFile, spec: str) -> dict[str, Any] | None:
        """File -> label; None where there are none (StyleGAN writes `"labels": null`)."""
        try:
            labels = json.loads(archive.read("dataset.json")).get("labels")
            return {name: label for name, label in labels} if labels else None
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(f"{spec}: dataset.json is not StyleGAN's: {type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Member:
    """One image in a tar: which tar, its name, and where its bytes and its caption's lie."""

    tar: int
    name: str
    offset: int
    size: int
    known: tuple[tuple[str, Any], ...] = ()
    caption: tuple[int, int] | None = None
    listed: dict[str, Any] | None = None  # what a list beside the tar says of it


class TarSource(Source):
    """Members of uncompressed tars, read by offset."""

    def __init__(self, tars: list[Path], members: list[Member], layout: str):
        self.tars, self.members, self.layout = tars, members, layout
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.members)

    def name(self, number: int) -> str:
        member = self.members[number]
        return f"{self.tars[member.tar].name}/{member.name}"

    def item(self, number: int) -> Item:
        member = self.members[number]
        content = self._read(member.tar, member.offset, member.size)
        known = {**dict(member.known), **(member.listed or {})}
        if member.caption is not None:
            known["caption"] = self._read(member.tar, *member.caption).decode("utf-8", "replace").strip()
        stem = member.name.rpartition("/")[2].partition(".")[0]
        prefix = member.name.rpartition("/")[0]
        return Item(f"{prefix}/{stem}" if prefix else stem, content, {"file": self.name(number), **known})

    def _read(self, tar: int, offset: int, size: int) -> bytes:
        if tar not in self._open:
            self._open[tar] = os.open(self.tars[tar], os.O_RDONLY)
        data = os.pread(self._open[tar], size, offset)
        if len(data) != size:
            raise OSError(f"the tar ends within this file: {len(data)} of {size} bytes")
        return data

    def settings(self) -> dict[str, Any]:
        lines = (
            f"{m.tar} {m.name} {m.offset} {m.size}{f' {json.dumps(m.listed)}' if m.listed else ''}"
            for m in self.members
        )
        return {
            "source": self.tars[0].resolve().parent.name,
            "files": len(self),
            "listing": fingerprint(lines),
            "layout": self.layout,
        }

    def bytes(self) -> int:
        return sum(member.size for member in self.members)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class TarsLayout(Layout):
    """A folder of WebDataset tars, as img2dataset writes them; captions are kept. Our own shards can be packed anew."""

    name = "tars"

    @staticmethod
    def recognise(spec: str) -> str | None:
        tars = sorted(Path(spec).glob("*.tar")) if Path(spec).is_dir() else []
        if not tars or first_images(spec, 1):
            return None
        kind = "shards with an index" if Path(spec, INDEX_NAME).exists() else "tars of samples"
        return f"{kind} ({len(tars)}, {tars[0].name} the first)"

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        tars = sorted(Path(spec).glob("*.tar"))
        members = []
        for number, tar in enumerate(tars):
            for key, files in scan_tar(tar):
                images = {e: place for e, place in files.items() if e.rpartition(".")[2] in IMAGE_EXTENSIONS}
                if not images:
                    continue
                # Of several sizes the largest, from which the others can be made.
                extension, (offset, size) = max(images.items(), key=lambda image: image[1][1])
                members.append(Member(number, f"{key}.{extension}", offset, size, caption=files.get("txt")))
        if not members:
            raise UserError(f"{spec}: {len(tars)} tars without an image")
        return [Part("", request.domain, request.split, TarSource(tars, members, cls.name))]


class ImageNetTarsLayout(Layout):
    """ImageNet as downloaded: ILSVRC2012_img_train.tar (a tar a synset inside) and ILSVRC2012_img_val.tar."""

    name = "imagenet-tars"
    takes = frozenset({"split"})
    NAMES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}

    @staticmethod
    def _found(spec: str) -> dict[str, Path]:
        path = Path(spec)
        if path.is_file():
            return {split: path for split, name in ImageNetTarsLayout.NAMES.items() if path.name == name}
        return {s: path / name for s, name in ImageNetTarsLayout.NAMES.items() if (path / name).is_file()}

    @staticmethod
    def recognise(spec: str) -> str | None:
        found = ImageNetTarsLayout._found(spec)
        return f"ImageNet as downloaded ({', '.join(path.name for path in found.values())})" if found else None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        found = cls._found(spec)
        if not found:
            raise UserError(f"{spec}: {' or '.join(cls.NAMES.values())} was expected here")
        parts = []
        for split, path in found.items():
            if request.split in (None, split):
                members = sorted(_nested(path), key=lambda member: member.name)
                if not members:
                    raise UserError(f"{path}: no images in this tar")
                classes, told = val_classes(path.parent, path.parent)
                members = [
                    member if member.known else replace(member, listed=class_of(member.name, classes, told, str(path)))
                    for member in members
                ]
                notes = without_class(sum(not (member.known or member.listed) for member in members), split)
                parts.append(Part(split, None, split, TarSource([path], members, cls.name), notes))
        if not parts:
            raise UserError(f"--split {request.split}: {spec} has {', '.join(found)}")
        return parts


def _nested(path: Path) -> Iterator[Member]:
    """Images in a tar and in the tars inside it; the inner tar's name is the synset."""
    try:
        with path.open("rb") as stream, Progress(f"reading {path.name}", path.stat().st_size) as progress:
            for outer in _members(stream, 0, path.stat().st_size):
                if outer.name.endswith(".tar"):
                    synset = Path(outer.name).stem
                    for inner in _members(stream, outer.offset_data, outer.offset_data + outer.size):
                        if is_image(inner.name):
                            name = f"{synset}/{inner.name}"
                            yield Member(0, name, inner.offset_data, inner.size, (("synset", synset),))
                elif is_image(outer.name):
                    yield Member(0, outer.name, outer.offset_data, outer.size)
                progress.step(outer.offset_data + outer.size - progress.done)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable, uncompressed tar: {error}") from None


def _members(stream: Any, begin: int, end: int) -> Iterable[tarfile.TarInfo]:
    """The files of the tar that lies between two offsets, in absolute offsets."""
    stream.seek(begin)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"{member.name} is cut off")
            if member.isreg():
                yield member
            tar.members = []  # type: ignore[attr-defined]  # a million headers would stay in memory
