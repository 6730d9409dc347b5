"""A judge of translations: which domain an image belongs to, and what it shows, learnt from real images.

Two small networks see only real training images of both domains: a classifier of the domain, and, where the
true factors of the images are known, a regressor of the factors that a translation must keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from letit_dist import pretrained, rng
from letit_dist.data.progress import Progress
from letit_dist.data.reader import ShardDataset, batches
from letit_dist.data.transforms import to_images
from letit_dist.errors import UserError

_SIDE = 64


@dataclass(frozen=True)
class Examples:
    """Real images of the two domains with what is known of them."""

    pixels: Tensor  # uint8 (N, 3, H, W)
    domain: Tensor  # (N,) 0 = source, 1 = target
    factors: Tensor | None  # (N, F) scaled to [0, 1]
    names: tuple[str, ...]  # of the factors
    stamp: str  # identifies the files these came from


def read_factors(dataset: ShardDataset) -> tuple[Tensor | None, tuple[str, ...]]:
    """(N, F) and the names of the numbers under factors.content in every sample's JSON; None if there are none."""
    names = tuple(sorted(_content(dataset, 0)))
    if not names:
        return None, ()
    rows = [_content(dataset, i) for i in range(len(dataset))]
    for i, row in enumerate(rows):
        if tuple(sorted(row)) != names:
            found, expected = (", ".join(sorted(r)) or "none" for r in (row, rows[0]))
            raise UserError(f"{dataset.place(i)}.json: factors.content has {found}; the first sample has {expected}")
    return torch.tensor([[float(row[name]) for name in names] for row in rows]), names


def _content(dataset: ShardDataset, sample: int) -> dict[str, float]:
    factors = dataset.json(sample).get("factors")
    return factors.get("content", {}) if isinstance(factors, dict) else {}


def read_pixels(dataset: ShardDataset) -> Tensor:
    """uint8 (N, 3, H, W); raises UserError for an image that cannot be read or has another size."""
    return torch.cat([pixels for pixels, _ in batches(dataset, 256)])


def read_examples(source: ShardDataset, target: ShardDataset) -> Examples:
    """Both domains in memory; factors are used only if both have the same ones."""
    sides = (source, target)
    factors, names = zip(*(read_factors(side) for side in sides), strict=True)
    known = factors[0] is not None and names[0] == names[1]
    pixels = [read_pixels(side) for side in sides]
    if pixels[0].shape[1:] != pixels[1].shape[1:]:
        sizes = " and ".join("x".join(map(str, p.shape[2:])) for p in pixels)
        raise UserError(f"the two domains have images of different sizes ({sizes}): pack them at one --resolution")
    hashes = [[shard.sha256 for index in side.indexes for shard in index.shards] for side in sides]
    return Examples(
        torch.cat(pixels),
        torch.cat([torch.full((len(side),), i) for i, side in enumerate(sides)]),
        torch.cat(factors) if known else None,
        names[0] if known else (),
        pretrained.tensors_fingerprint({"shards": hashes}, {}),
    )


def small_network(outputs: int) -> nn.Sequential:
    """(B, 3, 64, 64) -> (B, outputs)"""
    layers: list[nn.Module] = []
    for inputs, width in ((3, 24), (24, 48), (48, 96), (96, 96)):
        layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    # Flattened, not pooled: position is one of the factors.
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 4 * 4, outputs))


def seen_by_judge(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as a judge sees them, (B, 3, 64, 64)."""
    if images.shape[-1] != _SIDE:
        images = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True)
    return images.clamp(-1, 1)


class Judge(nn.Module):
    """`domain(images)` -> probability of the target (B,); `factors(images)` -> (B, F)."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self.classifier = small_network(1)
        self.regressor = small_network(len(names)) if names else None

    def domain(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B,) probability that they belong to the target domain."""
        return torch.sigmoid(self.classifier(seen_by_judge(images)).squeeze(1))

    def factors(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, F) in the order of `names`."""
        if self.regressor is None:
            raise ValueError("no factors are known for these domains")
        return self.regressor(seen_by_judge(images))


def _degrade(images: Tensor, amount: Tensor) -> Tensor:
    """Blur half of the images a little, as an autoencoder would, so that sharpness decides nothing."""
    small = F.avg_pool2d(images, 2)
    blurred = F.interpolate(small, scale_factor=2, mode="bilinear")
    return images.lerp(blurred, (2 * amount - 1).clamp(min=0).view(-1, 1, 1, 1).to(images))


def learn(
    judge: nn.Module,
    pixels: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    draws: torch.Generator,
    label: str,
) -> None:
    """Train on pixels uint8 (N, 3, H, W), in place; `loss_of(images (B, 3, 64, 64), rows (B,))` is the loss."""
    judge.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    with Progress(label, steps * batch) as progress:
        for _ in range(steps):
            rows = torch.randint(len(pixels), (batch,), generator=draws)
            images = _degrade(seen_by_judge(to_images(pixels[rows])), torch.rand(batch, generator=draws))
            loss = loss_of(images.contiguous(memory_format=torch.channels_last), rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.step(batch)
    # As a judge lies in memory that was read from disk: the layout decides how its sums are rounded.
    judge.to(memory_format=torch.contiguous_format)
    judge.eval().requires_grad_(False)


def train_judge(examples: Examples, *, steps: int = 300, batch: int = 64, seed: int = 0) -> Judge:
    """Learn from real images alone. Deterministic for a seed; about 20 s on two CPU cores."""
    torch.manual_seed(rng.seed_for(seed, "judge weights", 0))
    judge = Judge(examples.names)

    def loss_of(images: Tensor, rows: Tensor) -> Tensor:
        logits = judge.classifier(images).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logits, examples.domain[rows].float())
        if judge.regressor is not None:
            assert examples.factors is not None
            loss = loss + 10 * F.mse_loss(judge.regressor(images), examples.factors[rows])
        return loss

    draws = rng.generator(seed, "judge batches", 0)
    learn(judge, examples.pixels, loss_of, steps=steps, batch=batch, draws=draws, label="training the judge")
    return judge


def load_or_train_judge(examples: Examples, folder: Path, *, steps: int = 300, seed: int = 0) -> Judge:
    """The judge of these very images and settings, from `folder` if it is there, else trained and kept."""
    tree = {"names": list(examples.names), "data": examples.stamp, "steps": steps, "seed": seed}
    if (folder / pretrained.CONFIG).is_file():
        stored, tensors = pretrained.read_folder(folder)
        if stored == tree:
            judge = Judge(examples.names)
            pretrained.load_exactly(judge, tensors, folder)
            return judge.eval().requires_grad_(False)
    judge = train_judge(examples, steps=steps, seed=seed)
    pretrained.write_folder(folder, tree, judge.state_dict())
    return judge


@torch.no_grad()
def judge_images(
    judge: Judge, images: Tensor, factors: Tensor | None, middle: Tensor | None = None, *, chunk: int = 256
) -> dict[str, float]:
    """Scores of images (N, 3, H, W) in [-1, 1]: `target_accuracy`, the share taken for the target domain, and, of the
    factors (N, F) that should have been kept, `content_error`, their mean absolute error, `content_correlation`, the
    mean over factors of the correlation between what they were and what is seen, and, with their `middle` (F,),
    `kept_accuracy`, the share that is seen on the side of the middle where it was."""
    device = next(judge.parameters()).device
    parts = [part.to(device) for part in images.split(chunk)]
    scores = {"target_accuracy": float(torch.cat([judge.domain(p) for p in parts]).gt(0.5).float().mean())}
    if factors is not None and judge.regressor is not None:
        seen = torch.cat([judge.factors(p) for p in parts]).cpu()
        error = (seen - factors).abs().mean(0)
        scores["content_error"] = float(error.mean())
        scores["content_correlation"] = float(_correlations(seen, factors).mean())
        if middle is not None:
            scores["kept_accuracy"] = float(((seen > middle) == (factors > middle)).float().mean())
        scores |= {f"error_{name}": float(value) for name, value in zip(judge.names, error, strict=True)}
    return scores


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each column of (N, F) with its own: (F,); 0 where a column does not vary."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)
