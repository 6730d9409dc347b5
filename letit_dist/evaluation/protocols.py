"""Named protocols: which images, which network and which counts make a number comparable with published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from letit_dist.config import Count, StrictConfig, load_config
from letit_dist.errors import UserError
from letit_dist.evaluation.extractors import Kind

Split = Literal["train", "val", "test"]
_HELD_OUT = ("val", "test")  # AFHQ calls its test images val


class KidConfig(StrictConfig):
    """Of torch-fidelity's kernel."""

    subsets: Count = 100
    subset_size: Count = 1000


class ProtocolConfig(StrictConfig):
    """A file of configs/eval/."""

    name: str
    reference_split: Split = Field(description="of the real images of the target")
    source_split: Split = Field(description="of the images that are translated")
    outputs: Count = Field(description="translations of every source image")
    resize: Count | None = Field(description="side that all images are brought to first")
    extractor: Kind
    metrics: tuple[Literal["fid", "kid", "prc", "isc", "fd_dinov2", "cmmd"], ...]
    kid: KidConfig = KidConfig()
    faithfulness: bool = Field(default=False, description="also L2, PSNR and SSIM to the source")
    equal_counts: bool = Field(default=False, description="the headline is that of equally many images a side")
    minimum_source: Count
    minimum_reference: Count
    aggregation: str
    checkpoint: str
    comparable_with: str
    not_comparable: str

    def check(self, *, sources: int, outputs: int, reference: int, splits: tuple[str | None, str | None]) -> None:
        """UserError with all that keeps a result from being this protocol's; `splits` as far as shards state them."""
        problems = []
        if sources < self.minimum_source:
            problems.append(f"found {sources} source images, it needs {self.minimum_source}")
        if reference < self.minimum_reference:
            problems.append(f"found {reference} reference images, it needs {self.minimum_reference}")
        if outputs != self.outputs:
            problems.append(f"found {outputs} outputs a source image, it takes {self.outputs}")
        for side, found, expected in zip(
            ("source", "reference"), splits, (self.source_split, self.reference_split), strict=True
        ):
            same = found == expected or (found in _HELD_OUT and expected in _HELD_OUT)
            if found is not None and not same:
                problems.append(f"the {side} images are the {found} split, it takes {expected}")
        if problems:
            hint = "measure without --protocol, and compare with nothing published"
            raise UserError("\n".join([*(f"protocol {self.name}: {problem}" for problem in problems), hint]))

    def annotate(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of results, with what it may be compared with, and whether it is the number to report.

        `splits` of the row are those of the source and of the real images, None where nothing states them.
        """
        sides = zip(
            ("source", "real"),
            row.get("splits", (None, None)),
            (self.source_split, self.reference_split),
            strict=True,
        )
        unstated = [f"the {side} images are the {expected} split" for side, found, expected in sides if found is None]
        condition = f"if {' and '.join(unstated)}, which nothing here states: " if unstated else ""
        return {
            **row,
            "protocol": self.name,
            "headline": row["metric"].endswith("_equal_n") == self.equal_counts,
            "aggregation": self.aggregation,
            "checkpoint": self.checkpoint,
            "comparable_with": condition + self.comparable_with
            if row["valid"]
            else "nothing: the network's weights are random or unverified",
            "not_comparable": self.not_comparable,
        }


def load_protocol(name: str, folder: Path) -> ProtocolConfig:
    """The protocol of `folder`/`name`.yaml; UserError that lists the known ones."""
    # Other files of evaluation lie beside them.
    texts = {path.stem: path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.yaml"))}
    known = [stem for stem, text in texts.items() if "comparable_with" in text]
    if name not in known:
        raise UserError(f"no protocol {name!r}, known: {', '.join(known)}")
    return load_config(ProtocolConfig, folder / f"{name}.yaml")
