"""The sets of faces: FFHQ, CelebA, CelebA-HQ."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path

from letit_dist.data.source_base import (
    FileItem,
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
    with_notes,
)
from letit_dist.data.transforms import UnreadableImage
from letit_dist.errors import UserError

FFHQ_TRAIN = 60_000  # of 70,000: the first ones, by the official list
PARTITION = {0: "train", 1: "val", 2: "test"}
# What the two sides of an attribute are called; any other is `smiling` and `not_smiling`.
SIDES = {"Male": ("male", "female"), "Young": ("young", "old")}


class FfhqSource(FileSource):
    """Files whose MD5 is compared with the official list where that knows it."""

    def item(self, number: int) -> FileItem:
        item = super().item(number)
        stated = item.metadata.get("md5")
        if stated and (found := hashlib.md5(item.content).hexdigest()) != stated:
            raise UnreadableImage(f"MD5 {found[:12]}, the official list says {stated[:12]}: download it again")
        return item


class FfhqLayout(Layout):
    """FFHQ: the official folders or a flat dump; training the first 60,000, test the other 10,000."""

    name = "ffhq"
    FOLDERS = ("images1024x1024", "thumbnails128x128")
    LIST = "ffhq-dataset-v2.json"

    @staticmethod
    def recognise(spec: str) -> str | None:
        folder = Path(spec)
        if not folder.is_dir():
            return None
        if folder.name in FfhqLayout.FOLDERS:
            return "the official folder of FFHQ"
        if inside := [name for name in FfhqLayout.FOLDERS if (folder / name).is_dir()]:
            return f"FFHQ's {inside[0]}"
        numbers = [name for name in _some_images(folder) if _number(name) is not None]
        return "FFHQ by its name and numbered files" if "ffhq" in folder.resolve().name.lower() and numbers else None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        folder = Path(spec)
        prefix = next((f"{name}/" for name in cls.FOLDERS if (folder / name).is_dir()), "")
        official = folder.name if folder.name in cls.FOLDERS else prefix.rstrip("/")
        table = next((path for path in (folder / cls.LIST, folder.parent / cls.LIST) if path.is_file()), None)
        listed = _ffhq_list(table, official) if table else {}
        files, odd, seen = [], [], set()
        for path in images_below(folder / prefix):
            number = _number(path)
            if number is None:
                odd.append(path)
                continue
            seen.add(number)
            split, official_path, md5 = listed.get(number, ("train" if number < FFHQ_TRAIN else "test", None, None))
            checked = md5 and official_path == f"{official}/{path}"
            files.append((None, split, prefix + path, {"md5": md5} if checked else {}))
        if not files:
            raise UserError(f"{spec}: no file is called by its number (00000.png to 69999.png), as FFHQ's are")
        notes = []
        if odd:
            notes.append(f"{len(odd)} images without an FFHQ number are left out, the first: {odd[0]}")
        if missing := sorted(set(listed) - seen):
            notes.append(f"{len(missing)} of {len(listed)} images in {cls.LIST} are not there: {missing[0]:05d}, ...")
        if not any(known for *_, known in files):
            why = "only files in the official folders can be" if table else f"{cls.LIST} is not there"
            notes.append(f"MD5 not checked: {why}")
        parts = by_domain_and_split(folder, files, cls.name, FfhqSource)
        return with_notes(select(parts, request, spec), notes)


def _some_images(folder: Path) -> list[str]:
    """A few images of a folder, or of its first subfolder."""
    return first_images(folder) or next((first_images(folder / name) for name in subfolders(folder)), [])


def _number(path: str) -> int | None:
    match = re.fullmatch(r"(?:img)?(\d{5,8})", path.rpartition("/")[2].rpartition(".")[0])
    return int(match.group(1)) if match else None


def _ffhq_list(path: Path, official: str) -> dict[int, tuple[str, str | None, str | None]]:
    """Number -> (split, official path, MD5)."""
    field = "thumbnail" if official.startswith("thumb") else "image"
    try:
        tree = json.loads(path.read_bytes())
        return {
            int(number): (
                "train" if entry["category"] == "training" else "test",
                entry[field]["file_path"],
                entry[field]["file_md5"],
            )
            for number, entry in tree.items()
        }
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not FFHQ's list: {type(error).__name__}: {error}; download it again") from None


class _AttributedFaces(Layout):
    """Numbered faces with a table of attributes, of which one may divide them into two domains."""

    takes = frozenset({"domain", "split", "attribute"})
    TABLES: tuple[str, ...]
    FOLDERS: tuple[str, ...]
    _split_hint: str

    @classmethod
    def _found(cls, spec: str) -> tuple[Path, Path, str] | None:
        """(root, table, folder of the images below root)."""
        asked = Path(spec).resolve()
        for root in (Path(spec), *list(Path(spec).absolute().parents)[:3]):
            table = _first(root, cls.TABLES)
            for inside in cls.FOLDERS if table else ():
                images = (root / inside).resolve()
                # The root, the images, or a folder between them: Kaggle's images lie in two folders of one name.
                if table and asked in (root.resolve(), images, *images.parents) and first_images(images, 1):
                    return root, table, inside
        return None

    @classmethod
    def _splits(cls, root: Path) -> dict[str, str]:
        """Stem -> split; empty where no official one is there."""
        raise NotImplementedError

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        found = cls._found(spec)
        if found is None:
            raise UserError(f"{spec}: no {cls.FOLDERS[0]} with images beside {cls.TABLES[0]} here")
        root, table, inside = found
        values = read_attribute(table, request.attribute) if request.attribute else None
        splits = cls._splits(root)
        attribute = request.attribute or ""
        yes, no = SIDES.get(attribute, (attribute.lower(), f"not_{attribute}".lower()))
        files: list[Found] = []
        unknown = []
        for path in images_below(root / inside):
            stem = path.rpartition("/")[2].rpartition(".")[0]
            value = None if values is None else values.get(stem)
            split = splits.get(stem)
            if (values is not None and value is None) or (splits and split is None):
                unknown.append(path)
                continue
            domain = None if value is None else (yes if value else no)
            files.append((domain, split, f"{inside}/{path}", {}))
        notes = []
        if unknown:
            notes.append(f"{len(unknown)} images without a row in the tables are left out, the first: {unknown[0]}")
        if values is None:
            notes.append("no attribute divides them: --attribute Male makes the domains male and female")
        elif len(domains := {domain for domain, *_ in files}) < 2:
            have = f"--attribute {request.attribute} gives only {next(iter(domains), 'none')}"
            raise UserError(f"{spec}: one domain where two are needed: {have}")
        if not splits:
            notes.append(f"no split: {cls._split_hint}")
        return with_notes(select(by_domain_and_split(root, files, cls.name), request, spec), notes)


class CelebaLayout(_AttributedFaces):
    """CelebA: img_align_celeba with list_attr_celeba and the official partition."""

    name = "celeba"
    TABLES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
    FOLDERS = tuple(
        f"{outer}{name}{inner}"
        for outer in ("", "Img/")
        for name in ("img_align_celeba", "img_align_celeba_png")
        for inner in ("", "/img_align_celeba")
    )
    _split_hint = "list_eval_partition.txt is not there"

    @staticmethod
    def recognise(spec: str) -> str | None:
        found = CelebaLayout._found(spec)
        return f"CelebA: {found[2]} with {found[1].name}" if found else None

    @classmethod
    def _splits(cls, root: Path) -> dict[str, str]:
        return _partition(root)


class CelebaMaskLayout(_AttributedFaces):
    """CelebAMask-HQ: CelebA-HQ-img with its attributes, and CelebA's partition if the official mapping is there."""

    name = "celebamask-hq"
    TABLES = ("CelebAMask-HQ-attribute-anno.txt",)
    FOLDERS = ("CelebA-HQ-img",)
    MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
    _split_hint = "CelebA's needs list_eval_partition.txt and CelebA-HQ-to-CelebA-mapping.txt beside the images"

    @staticmethod
    def recognise(spec: str) -> str | None:
        found = CelebaMaskLayout._found(spec)
        return f"CelebAMask-HQ: {found[2]} with {found[1].name}" if found else None

    @classmethod
    def _splits(cls, root: Path) -> dict[str, str]:
        partition, mapping = _partition(root), _first(root, (cls.MAPPING,))
        if not partition or mapping is None:
            return {}
        rows = [line.split() for line in mapping.read_text().splitlines()[1:] if line.strip()]
        return {row[0]: partition[Path(row[2]).stem] for row in rows if Path(row[2]).stem in partition}


class CelebaHqFlatLayout(Layout):
    """CelebA-HQ as one folder of numbered 1024-pixel images (Kaggle): no domains, no split."""

    name = "celeba-hq-flat"

    @staticmethod
    def recognise(spec: str) -> str | None:
        name = Path(spec).resolve().name.lower()
        known = Path(spec).is_dir() and "celeb" in name and ("hq" in name or "1024" in name)
        if not known or not any(_number(image) is not None for image in first_images(spec)):
            return None
        return "CelebA-HQ in one folder; male and female need CelebAMask-HQ (--attribute Male) or StarGAN v2's folders"

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        return [Part("", request.domain, request.split, FileSource(spec, images_below(spec), cls.name))]


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files in a set's root or in the folders where the official archives put them."""
    places = (root / folder / name for name in names for folder in ("", "Anno", "Eval"))
    return next((path for path in places if path.is_file()), None)


def _table(path: Path) -> list[tuple[int, list[str]]]:
    """(line, fields) of a file with fields between commas or spaces; empty lines left out."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = enumerate(text.splitlines(), 1)
    return [(number, re.split(r"[,\s]+", line.strip())) for number, line in lines if line.strip()]


def read_attribute(path: Path, name: str, *, option: str = "--attribute") -> dict[str, bool]:
    """Stem of the file -> whether it has the attribute."""
    rows = _table(path)
    if rows and len(rows[0][1]) == 1:
        rows = rows[1:]  # the number of rows
    names = rows[0][1] if rows else []
    if names[:1] == ["image_id"]:
        names = names[1:]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"{option} {name}: {path} has {', '.join(names[:40])}{hint}")
    column = names.index(name) + 1
    values = {}
    for line, row in rows[1:]:
        if len(row) != len(names) + 1 or row[column] not in ("1", "-1", "0"):
            raise UserError(f"{path}, line {line}: a name and {len(names)} values of 1 or -1 were expected")
        values[row[0].rpartition(".")[0]] = row[column] == "1"
    return values


def _partition(root: Path) -> dict[str, str]:
    """Stem -> split, by list_eval_partition; empty where that is not there."""
    path = _first(root, ("list_eval_partition.txt", "list_eval_partition.csv"))
    splits = {}
    for line, row in _table(path) if path else []:
        if row[0] == "image_id":
            continue
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise UserError(f"{path}, line {line}: a file and 0 (train), 1 (val) or 2 (test) were expected")
        splits[row[0].rpartition(".")[0]] = PARTITION[int(row[1])]
    return splits
