"""The built-in apples and oranges as a source of images."""

from __future__ import annotations

from typing import Any

from letit_dist.data.source_base import Item, Layout, Part, Request, Source
from letit_dist.errors import UserError


class FruitSource(Source):
    """The built-in apples and oranges, drawn at the resolution they are packed at."""

    drawn = True
    # Test pictures do not depend on how many are trained on, and a longer train set begins with the shorter one.
    FIRST_TEST = 1_000_000

    def __init__(self, style: str, seed: int, first: int, count: int, resolution: int):
        self.style, self.seed, self.first, self.count, self.resolution = style, seed, first, count, resolution

    def __len__(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        return f"{self.style}-{self.first + number:07d}"

    def item(self, number: int) -> Item:
        from letit_dist.data.synthetic import fruit

        index = self.first + number
        pixels, factors = fruit(self.style, self.seed, index, self.resolution)
        return Item(self.name(number), pixels, {"index": index, "seed": self.seed, "factors": factors.as_json()})

    def settings(self) -> dict[str, Any]:
        return {
            "source": "builtin:fruit",
            "filter": None,  # nothing is resized
            "style": self.style,
            "seed": self.seed,
            "first": self.first,
            "files": self.count,
        }


class FruitLayout(Layout):
    """`builtin:fruit`: domains apple and orange, splits train and test."""

    name = "fruit"
    takes = frozenset({"count", "test", "seed"})

    @staticmethod
    def recognise(spec: str) -> str | None:
        return "drawn apples and oranges" if spec == "builtin:fruit" else None

    @classmethod
    def parts(cls, spec: str, request: Request) -> list[Part]:
        from letit_dist.data.synthetic import MAX_RESOLUTION, MIN_RESOLUTION, STYLES

        if request.resolution is None or request.count is None:
            raise UserError(f"{spec} needs --resolution and --count, e.g. --resolution 64 --count 2000")
        if not MIN_RESOLUTION <= request.resolution <= MAX_RESOLUTION:
            raise UserError(
                f"{spec} draws at {MIN_RESOLUTION} to {MAX_RESOLUTION}, got --resolution {request.resolution}"
            )
        test = 256 if request.test is None else request.test
        most = FruitSource.FIRST_TEST
        if not 0 < request.count <= most:
            raise UserError(f"{spec} draws 1 to {most} training pictures, got --count {request.count}")
        seed = request.seed or 0
        parts = []
        for style in STYLES:
            for split, first, count in (("train", 0, request.count), ("test", most, test)):
                if count:
                    source = FruitSource(style, seed, first, count, request.resolution)
                    parts.append(Part(f"{style}/{split}", style, split, source))
        return parts
