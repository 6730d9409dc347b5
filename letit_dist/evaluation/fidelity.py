"""FID, KID, precision and recall, and the Inception score from features: torch-fidelity's kernels, honest counts.

Beside them the metrics of other networks: FD-DINOv2 (2306.04675) and CMMD (2401.09603).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from letit_dist import rng
from letit_dist.errors import UserError
from letit_dist.evaluation.extractors import Kind
from letit_dist.evaluation.features import Features, check_alike
from letit_dist.evaluation.frechet import frechet_distance

_INCEPTION = ("fid", "kid", "prc", "isc")
# By kind of extractor, where it has not all of Inception's.
METRICS_OF = {"torchvision": _INCEPTION[:3], "dinov2": ("fd_dinov2",), "clip": ("cmmd",)}
METRICS = (*_INCEPTION, "fd_dinov2", "cmmd")
_SIGMA, _SCALE = 10, 1000  # of CMMD
_SEEDS = 2**32  # those that NumPy takes, which draws KID's subsets
_ROWS = 1024  # of a kernel that are made at once
_FAITHFUL = ("l2_to_source", "psnr_to_source", "ssim_to_source")


def metrics_for(kind: Kind, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics asked for, or all that this extractor has; UserError for those of another."""
    own = METRICS_OF.get(kind, _INCEPTION)
    if other := [name for name in asked or () if name not in own]:
        raise UserError(f"--metrics {' '.join(other)}: --extractor {kind} has {', '.join(own)}")
    return tuple(asked or own)


@dataclass(frozen=True)
class FidelityOptions:
    """What to measure. `seed` is torch-fidelity's, of KID's subsets and IS's order; `seeds` those of equal counts."""

    metrics: tuple[str, ...] = _INCEPTION
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    neighbours: int = 3  # of precision and recall
    splits: int = 10  # of the Inception score
    seed: int = 2020
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    equal_n: int | None = None  # None: as many as the smaller side has

    def check(self, a: int, b: int) -> None:
        """UserError with all that these counts of images are too small for, and options that no count allows."""
        problems = [f"metric {name!r}, known: {', '.join(METRICS)}" for name in self.metrics if name not in METRICS]
        least, n = min(a, b), self.equal_n or min(a, b)
        found = f"found {a} and {b} images"
        if not self.metrics:
            problems.append("no metric was asked for")
        if min(self.kid_subsets, self.kid_subset_size, self.neighbours, self.splits, len(self.seeds)) < 1:
            problems.append("--kid-subsets, --kid-subset-size and --seeds: at least 1")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < _SEEDS]:
            problems.append(f"--seeds {' '.join(map(str, wrong))}: expected 0 .. {_SEEDS - 1}")
        if n > least or n < 2:
            problems.append(f"{found}: --equal-n must lie in 2 .. {least}, got {n}")
        elif "kid" in self.metrics and min(n, least) < self.kid_subset_size:
            problems.append(
                f"{found}: KID needs --kid-subset-size <= {min(n, least)}, got {self.kid_subset_size} (and another "
                "subset size gives numbers that are comparable only among themselves)"
            )
        if {"fid", "fd_dinov2"} & {*self.metrics} and least < 2:
            problems.append(f"{found}: a Frechet distance needs 2 a side")
        if "prc" in self.metrics and least <= self.neighbours:
            problems.append(f"{found}: precision and recall need more than {self.neighbours} a side")
        if "isc" in self.metrics and a < self.splits:
            problems.append(f"{found}: the Inception score of the first needs {self.splits}")
        if problems:
            raise UserError("\n".join(problems))


def fid(a: Tensor, b: Tensor) -> float:
    """Frechet (Inception) distance of features (N, D) and (M, D): torch-fidelity's, or where a side has fewer than D
    rows the same by `frechet_distance`, which then is many times faster."""
    if min(len(a), len(b)) < a.shape[1]:
        return frechet_distance(a, b)
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    sides = [fid_features_to_statistics(side.cpu()) for side in (a, b)]
    return fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID]


def kid(a: Tensor, b: Tensor, *, subsets: int, subset_size: int, seed: int) -> tuple[float, float]:
    """Kernel Inception distance (1801.01401), and its standard deviation over subsets, by torch-fidelity."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(a, b, kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=seed, verbose=False)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def cmmd(a: Tensor, b: Tensor) -> float:
    """1000 times the squared maximum mean discrepancy of unit vectors (N, D) and (M, D), in float64 (2401.09603).

    The kernel is exp(-|x - y|^2 / (2 * 10^2)), and the estimator the biased one that the published code has (Gretton
    et al., JMLR 13, 2012, eq. 5): each vector is compared with itself too, so that two sets of one distribution are at
    a distance that falls with their counts, and a set is at none from itself.
    """
    return _SCALE * float(_kernel_mean(a, a) + _kernel_mean(b, b) - 2 * _kernel_mean(a, b))


def _kernel_mean(x: Tensor, y: Tensor) -> Tensor:
    """Mean of kernel - 1 over all pairs: kernels are near 1, and what tells the sides apart are their last digits."""
    y = y.double()
    blocks = x.double().split(_ROWS)
    squares = (block.square().sum(1)[:, None] + y.square().sum(1) - 2 * block @ y.t() for block in blocks)
    total = sum((torch.expm1(square / (-2 * _SIGMA**2)).sum() for square in squares), y.new_zeros(()))
    return total / (len(x) * len(y))


def precision_recall(a: Tensor, b: Tensor, *, neighbours: int) -> tuple[float, float]:
    """Improved precision and recall (1904.06991) of the generated (N, D) and the real (M, D), by torch-fidelity."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(a, b, prc_neighborhood=neighbours, verbose=False)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def inception_score(logits: Tensor, *, splits: int, seed: int) -> tuple[float, float]:
    """Inception score (1606.03498) of logits (N, 1008), and its deviation over splits, by torch-fidelity."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def draw_equal(features: Tensor, n: int, seed: int, side: str) -> Tensor:
    """n of the rows (N, D) without replacement, in their order; all of them where n is N."""
    chosen = torch.randperm(len(features), generator=rng.generator(seed, f"equal n {side}", 0))[:n]
    return features[chosen.sort().values]


def measure(
    a: Features,
    b: Features,
    options: FidelityOptions,
    *,
    snapshot: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row a metric, of the generated `a` against the real `b`; `extra` goes into every row.

    All but precision, recall and the Inception score stand twice: of all images, and of equally many from both sides,
    as mean and standard deviation over draws with each of `seeds`. Raises UserError for too few images and for
    features of different networks.
    """
    check_alike(a.stamp, b.stamp)
    options.check(len(a), len(b))
    n = options.equal_n or min(len(a), len(b))
    names = ("extractor", "layer", "resize", "weights")
    common = {
        "snapshot": snapshot,
        **{name: a.stamp[name] for name in names},
        "data": [a.stamp["data"], b.stamp["data"]],
        "valid": a.stamp["valid"] and b.stamp["valid"],
        **(extra or {}),
    }

    def row(metric: str, value: float, begun: float, **more: Any) -> dict[str, Any]:
        given = {"counts": [len(a), len(b)], **more}
        return {"metric": metric, "value": value, **given, **common, "seconds": _since(begun)}

    def equal(metric: str, of: Callable[[Tensor, Tensor, int], float], seeded: bool, **more: Any) -> dict[str, Any]:
        begun = time.perf_counter()
        # Of all images of both sides there is only one draw.
        seeds = options.seeds if seeded or n < max(len(a), len(b)) else options.seeds[:1]
        values = [of(draw_equal(a.values, n, s, "a"), draw_equal(b.values, n, s, "b"), s) for s in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = statistics.fmean(values)
        return row(f"{metric}_equal_n", mean, begun, counts=[n, n], seeds=list(seeds), spread=spread, **more)

    for metric, distance in (("fid", fid), ("fd_dinov2", fid), ("cmmd", cmmd)):
        if metric in options.metrics:
            begun = time.perf_counter()
            yield row(metric, distance(a.values, b.values), begun)
            yield equal(metric, _seedless(distance), seeded=False)
    if "kid" in options.metrics:
        begun, given = time.perf_counter(), {"subsets": options.kid_subsets, "subset_size": options.kid_subset_size}
        value, spread = kid(a.values, b.values, seed=options.seed, **given)
        yield row("kid", value, begun, spread_of_subsets=spread, seeds=[options.seed], **given)
        yield equal("kid", lambda x, y, s: kid(x, y, seed=s, **given)[0], seeded=True, **given)
    if "prc" in options.metrics:
        begun = time.perf_counter()
        found = precision_recall(a.values, b.values, neighbours=options.neighbours)
        for name, value in zip(("precision", "recall"), found, strict=True):
            yield row(name, value, begun, neighbours=options.neighbours)
    if "isc" in options.metrics:
        begun = time.perf_counter()
        value, spread = inception_score(a.tensors["logits"], splits=options.splits, seed=options.seed)
        yield row("inception_score", value, begun, spread_of_splits=spread, splits=options.splits, seeds=[options.seed])
    for name in _FAITHFUL:
        if (column := a.tensors.get(f"column {name}")) is not None:
            yield {**row(name, float(column.mean()), time.perf_counter()), "valid": True}


def _seedless(distance: Callable[[Tensor, Tensor], float]) -> Callable[[Tensor, Tensor, int], float]:
    return lambda x, y, _: distance(x, y)


def _since(begun: float) -> float:
    return round(time.perf_counter() - begun, 3)
