"""Sets whose folders say domain and split: ImageNet, AFHQ, CelebA-HQ as StarGAN v2 has it, CycleGAN's."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from letit_dist.data.source_base import (
    FileSource,
    Found,
    Layout,
    Part,
    Request,
    by_domain_and_split,
    first_images,
    images_below,
    select,
    subfolders,
    unseen,
    walk,
    with_notes,
)
from letit_dist.data.source_files import SPLITS
from letit_dist.errors import UserError

SYNSET = re.compile(r"n\d{8}")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SOLUTION = "LOC_val_solution.csv"  # Kaggle's
# CycleGAN's folder is called ukiyoe2photo, the papers say ukiyo2photo: one name for the domain.
SPELLINGS = {"ukiyoe": "ukiyo"}


class ImageNetLayout(Layout):
    """ImageNet-1k unpacked: train/n01440764/*.JPEG; val the same or flat, with its list of classes."""

    name = "imagenet"
    takes = frozenset({"split"})

    @staticmethod
    def _root(spec: str) -> Path:
        inner = (Path(spec, above, "Data", "CLS-LOC") for above in ("", "ILSVRC"))
        return next((path for path in inner if path.is_dir()), Path(spec))

    @staticmethod
    def recognise(spec: str) -> str | None:
        root = ImageNetLayout._root(spec)
        synsets = [name for name in subfolders(root / "train") if SYNSET.fullmatch(name)]
        if synsets:
            return f"ImageNet: train with {len(synsets)} synset folders"
        flat = any(name.startswith("ILSVRC2012_val_") for name in first_images(root / "val"))
        return "ImageNet: val" if flat or any(map(SYNSET.fullmatch, subfolders(root / "val"))) else None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        root = cls._root(spec)
        parts = []
        for split in ("train", "val"):
            folder = root / split
            if not folder.is_dir():
                continue
            classes, told = val_classes(Path(spec), root) if first_images(folder, 1) else ({}, None)
            files = []
            for path in images_below(folder):
                synset = path.partition("/")[0]
                known = {"synset": synset} if SYNSET.fullmatch(synset) else {}
                known = known or class_of(path, classes, told, str(folder))
                files.append((f"{split}/{path}", known))
            notes = without_class(sum(not known for _, known in files), split)
            parts.append(Part(split, None, split, FileSource(root, files, cls.name), notes))
        if not parts:
            raise UserError(f"{spec}: neither train nor val here")
        return select(parts, request, spec)


def class_of(name: str, classes: dict[int, dict[str, Any]], told: Path | None, place: str) -> dict[str, Any]:
    """What `val_classes` knows of a validation image; raises UserError for an image that its list leaves out."""
    match = re.search(r"ILSVRC2012_val_(\d{8})", name)
    if match is None or told is None:
        return {}
    if (number := int(match.group(1))) not in classes:
        raise UserError(f"{place}, {name}: {told.name} has {len(classes)} lines, none for this image")
    return classes[number]


def val_classes(spec: Path, root: Path) -> tuple[dict[int, dict[str, Any]], Path | None]:
    """(the class of each validation image by its number, the list that says it or None).

    Kaggle's list has synsets, as the training folders have; the devkit's has ILSVRC2012_ID, 1 to 1000.
    """
    around = [root, spec, *list(root.absolute().parents)[:3]]
    if path := next((place / SOLUTION for place in around if (place / SOLUTION).is_file()), None):
        rows = re.findall(r"^ILSVRC2012_val_(\d{8}),\s*(n\d{8})", _lines(path), re.MULTILINE)
        return {int(number): {"synset": synset} for number, synset in rows}, path
    places = (root, spec, spec / "data", *spec.glob("ILSVRC2012_devkit*/data"))
    path = next((place / GROUND_TRUTH for place in places if (place / GROUND_TRUTH).is_file()), None)
    if path is None:
        return {}, None
    try:
        return {n: {"ilsvrc_id": int(line)} for n, line in enumerate(_lines(path).split(), 1)}, path
    except ValueError as error:
        raise UserError(f"{path}: a number a line was expected: {error}") from None


def _lines(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def without_class(count: int, split: str) -> tuple[str, ...]:
    """A note on `count` images, or none."""
    lists = f"{GROUND_TRUTH}, no {SOLUTION}"
    return (f"{count} images of {split} without a class (no synset folder, no {lists})",) if count else ()


class SplitDomainsLayout(Layout):
    """split/domain/images: AFHQ v1 (train, val) and v2 (train, test), CelebA-HQ of StarGAN v2, and any other.

    The folders of splits may be called training, validation, valid and testing too, in any case.
    More than MOST_DOMAINS are classes of one domain; images right in the folders of splits have none.
    """

    name = "splits"
    MOST_DOMAINS = 20
    KNOWN = {frozenset({"cat", "dog", "wild"}): "AFHQ", frozenset({"female", "male"}): "CelebA-HQ of StarGAN v2"}

    @staticmethod
    def _found(spec: str) -> dict[str, tuple[str, list[str]]]:
        """Split -> (its folder, its domains, each with images); [""] where the images are right inside."""
        found: dict[str, tuple[str, list[str]]] = {}
        for folder in subfolders(spec):
            if (split := SPLITS.get(folder.lower())) is None:
                continue
            inside = [name for name in subfolders(Path(spec, folder)) if first_images(Path(spec, folder, name), 1)]
            if inside or first_images(Path(spec, folder), 1):
                if split in found:
                    return {}  # train beside training: nothing says what is what
                found[split] = folder, inside or [""]
        return {split: found[split] for split in ("train", "val", "test") if split in found}

    @staticmethod
    def recognise(spec: str) -> str | None:
        found = SplitDomainsLayout._found(spec)
        domains = [names for _, names in found.values()]
        if "train" not in found or len(found) < 2 or set().union(*domains) != set(domains[0]):
            return None
        folders = ", ".join(folder for folder, _ in found.values())
        if domains[0] == [""]:
            return f"folders of splits ({folders})"
        if len(domains[0]) > SplitDomainsLayout.MOST_DOMAINS:
            return f"folders of splits ({folders}) with {len(domains[0])} classes"
        listed = "; ".join(f"{folder}: {', '.join(names)}" for folder, names in found.values())
        return f"{SplitDomainsLayout.KNOWN.get(frozenset(domains[0]), 'a folder a split and domain')} ({listed})"

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        found = cls._found(spec)
        if not found:
            raise UserError(f"{spec}: no folders train/DOMAIN with images here")
        # AFHQ v1 and CelebA-HQ call val what AFHQ v2 and the papers call test.
        held_out = {"val": "test"} if "test" not in found else {}
        classes = max(len(names) for _, names in found.values()) > cls.MOST_DOMAINS
        files = []
        other: Counter[str] = Counter()
        for split, (folder, domains) in found.items():
            for name in domains:
                inside = f"{folder}/{name}".rstrip("/")
                domain, known = (None, {"class": name}) if classes else (name or None, {})
                paths, others = walk(Path(spec, inside))
                other += others
                files += [(domain, held_out.get(split, split), f"{inside}/{path}", known) for path in paths]
        return with_notes(select(by_domain_and_split(spec, files, cls.name), request, spec), unseen(other))


class CycleGanLayout(Layout):
    """trainA, trainB, testA, testB; domains by the folder's name: apple2orange, ukiyo2photo, horse2zebra."""

    name = "cyclegan"
    FOLDERS = {f"{split}{side}": (split, side) for split in ("train", "val", "test") for side in "AB"}

    @staticmethod
    def _found(spec: str) -> list[str]:
        return [name for name in subfolders(spec) if name in CycleGanLayout.FOLDERS]

    @staticmethod
    def recognise(spec: str) -> str | None:
        found = CycleGanLayout._found(spec)
        return f"CycleGAN's folders ({', '.join(found)})" if found else None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        found = cls._found(spec)
        walked = {name: walk(Path(spec, name)) for name in found}
        images = {name: paths for name, (paths, _) in walked.items()}
        if not any(images.values()):
            raise UserError(f"{spec}: no images in trainA, trainB, testA or testB here")
        names = dict(zip("AB", cls.domains(spec), strict=True))
        for side, other in ("AB", "BA"):
            if not any(images.get(name) for name, (_, s) in cls.FOLDERS.items() if s == side):
                raise UserError(
                    f"{spec}: one domain where two are needed: images of {other} ({names[other]}) and none of {side} "
                    f"({names[side]}); add train{side}, or give --layout folder for one domain"
                )
        files: list[Found] = [
            (names[cls.FOLDERS[name][1]], cls.FOLDERS[name][0], f"{name}/{path}", {})
            for name, paths in images.items()
            for path in paths
        ]
        left = sum((others for _, others in walked.values()), Counter())
        return with_notes(select(by_domain_and_split(spec, files, cls.name), request, spec), unseen(left))

    @staticmethod
    def domains(spec: str) -> tuple[str, str]:
        """Names of A and B: `vangogh2photo` -> vangogh, photo; A and B where the folder's name says none."""
        first, two, second = Path(spec).resolve().name.lower().partition("2")
        if not (two and first and second and first != second):
            return "A", "B"
        return SPELLINGS.get(first, first), SPELLINGS.get(second, second)
