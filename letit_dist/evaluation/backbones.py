"""One pair of domains on several backbones: what each makes possible, and what it takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from letit_dist.autoencoders.base import Autoencoder, load_autoencoder
from letit_dist.config import StrictConfig, as_tree, load_config, parse_config, read_tree
from letit_dist.data.encoding import EncodeOptions, encode_domain
from letit_dist.data.index import INDEX_NAME, JOURNAL_NAME
from letit_dist.data.latents import LatentSet
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import to_images, to_pixels
from letit_dist.energy.translate import METHOD, Translator, open_translator
from letit_dist.errors import UserError
from letit_dist.evaluation.attributes import Examples, Judge, load_or_train_judge, read_examples
from letit_dist.evaluation.latents import all_latents
from letit_dist.evaluation.paper_tables import training_days
from letit_dist.evaluation.reconstruction import measure_reconstruction, together
from letit_dist.evaluation.report import write_lines, write_report
from letit_dist.evaluation.scoring import match_pairs, score_translations
from letit_dist.evaluation.tables import markdown
from letit_dist.files import write_atomically
from letit_dist.pictures import columns, save_picture
from letit_dist.pretrained import find_folder, tensors_fingerprint
from letit_dist.schemas import TrainEnergyConfig

_SHOWN = 8
_TABLE = (
    *("backbone", "latents", "psnr", "exact", "ssim", "lpips_alex", "lpips_vgg", "lpips_squeeze"),
    *("reconstruction_accuracy", "mean_shift_accuracy", "target_accuracy", "content_error", "pair_error"),
    *("l2_to_source", "moved_lpips_alex", "moved_lpips_vgg", "moved_lpips_squeeze"),
    *("encode_seconds", "train_seconds", "translate_seconds"),
)


class DomainConfig(StrictConfig):
    """Image shards of one domain, as shards/pack.py makes them."""

    train: str
    test: str


class BackbonesConfig(StrictConfig):
    """A file such as configs/eval/backbones_emoji.yaml. Paths are from where the program is called."""

    source: DomainConfig
    target: DomainConfig
    pairs: bool = Field(False, description="test images of equal keys are true counterparts")
    energy: str = Field(description="configuration of launch/train_energy.py, the same for every backbone")
    overrides: tuple[str, ...] = Field((), description="key=value of that configuration")
    flip: bool = Field(False, description="encode mirrored images too")
    judge_steps: int = Field(300, ge=1, description="training steps of the judge, 64 images each")
    seed: int = Field(0, description="of the judge, and of noise in chains and decoders")
    backbones: dict[str, str] = Field(min_length=1, description="name: folder of weights, run, or id on the Hub")

    @field_validator("backbones")
    @classmethod
    def _names(cls, backbones: dict[str, str]) -> dict[str, str]:
        for name in backbones:
            if Path(name).name != name or name.startswith(".") or name == "judge":
                raise ValueError(f"{name!r} cannot name a backbone: it becomes a folder beside the one called judge")
        return backbones


Train = Callable[[list[str], Path], None]  # overrides and the run folder, of launch/train_energy.py


@dataclass(frozen=True)
class Job:
    """Where and with what a pair is measured. `train` runs launch/train_energy.py, and raises where it fails."""

    config: BackbonesConfig
    out: Path
    train: Train
    device: torch.device
    budget: int
    perceptual: Mapping[str, nn.Module] = field(default_factory=dict)
    batch: int = 64

    def dataset(self, side: str, split: str) -> ShardDataset:
        """The images of "source" or "target"."""
        return ShardDataset([getattr(getattr(self.config, side), split)])

    def latents(self, name: str, side: str) -> Path:
        """Where a backbone's latents of one side lie."""
        return self.out / name / "latents" / side

    def energy(self, name: str) -> Path:
        """The run of a backbone's energy."""
        return self.out / name / "energy"


def load_backbones(config: BackbonesConfig) -> dict[str, Autoencoder]:
    """All of them by name. Raises one UserError for those that cannot be read, and for unequal resolutions: at another
    size neither the errors nor the judge mean the same."""
    found: dict[str, Autoencoder] = {}
    problems = []
    for name, path in config.backbones.items():
        try:
            found[name] = load_autoencoder(find_folder(path))
        except UserError as error:
            problems.append(f"backbones.{name}: {error}")
    sizes = {name: model.config.resolution for name, model in found.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        problems.append(f"backbones take images of different sizes ({listed}): a table needs one")
    if problems:
        raise UserError("\n".join(problems))
    return found


def compare_backbones(job: Job) -> Iterator[str]:
    """Make what is missing, backbone by backbone, and measure; yields lines to print, the table among the last.

    OUT/NAME has latents/, energy/ (a run), translation.jsonl and .png; OUT/backbones.jsonl one line a backbone,
    OUT/backbones.png a sheet. What is finished is recognised by the fingerprints of all that made it.
    """
    config, models = job.config, load_backbones(job.config)
    load_config(TrainEnergyConfig, config.energy, _settings(job, next(iter(models))))  # a slip must not wait for step 3
    side = next(iter(models.values())).config.resolution
    sides = [job.dataset(name, "train").require_side(side) for name in ("source", "target")]
    tests = [job.dataset(name, "test").require_side(side) for name in ("source", "target")]
    if config.pairs:
        match_pairs(*tests)
    if (domains := [dataset.domain for dataset in sides])[0] == domains[1]:
        raise UserError(f"source and target are both called {domains[0]}: pack them with --domain")
    examples = read_examples(*sides)
    judge = load_or_train_judge(examples, job.out / "judge", steps=config.judge_steps, seed=config.seed).to(job.device)
    rows, shown = [], {"source": torch.stack([tests[0].pixels(i) for i in _spread(len(tests[0]))])}
    for name, model in models.items():
        yield f"== {name}: {config.backbones[name]} ({model.config.kind}, {model.fingerprint()})"
        yield from _encode(job, name, model.to(job.device), sides)
        yield from _learn(job, name)
        translator = open_translator(job.energy(name), config.backbones[name]).to(job.device)
        rows.append(_measure(job, name, translator, judge, examples, tests))
        again, moved = _pictures(translator, shown["source"], config.seed)
        shown |= {f"{name}:\nreconstruction": again, f"{name}:\n{METHOD}": moved}
        del translator
        models[name] = model.cpu()
        write_lines(rows, job.out / "backbones.jsonl")
    if config.pairs:
        places = match_pairs(*tests)
        shown["true\ncounterpart"] = torch.stack([tests[1].pixels(places[i]) for i in _spread(len(tests[0]))])
    save_picture(columns({name: list(images) for name, images in shown.items()}), job.out / "backbones.png")
    untouched = f"the judge takes {rows[0]['real_accuracy']:.3f} of them, untouched, for {domains[1]}"
    yield f"{domains[0]} to {domains[1]}, {len(tests[0])} test images of {side} pixels; {untouched}"
    yield markdown(rows, [name for name in _TABLE if any(row.get(name) is not None for row in rows)])
    yield f"sheet: {job.out / 'backbones.png'}"


def _spread(count: int) -> list[int]:
    shown = min(_SHOWN, count)
    return [i * count // shown for i in range(shown)]


def _settings(job: Job, name: str) -> list[str]:
    """Overrides that make the one energy configuration this backbone's."""
    sides = [f"data.{side}={job.latents(name, side)}" for side in ("source", "target")]
    return [f"autoencoder={job.config.backbones[name]}", *sides, *job.config.overrides]


def _encode(job: Job, name: str, model: Autoencoder, sides: list[ShardDataset]) -> Iterator[str]:
    """Both domains' training images, with the seconds of those that are encoded in one go."""
    for side, dataset in zip(("source", "target"), sides, strict=True):
        out = job.latents(name, side)
        begun, fresh = time.perf_counter(), not any((out / part).exists() for part in (INDEX_NAME, JOURNAL_NAME))
        options = EncodeOptions(flip=job.config.flip, batch=job.batch)
        said = encode_domain(model, dataset, out, options, device=job.device, budget=job.budget)
        if fresh:
            seconds = {**_seconds(job, name), side: round(time.perf_counter() - begun, 1)}
            write_atomically(job.out / name / "encode_seconds.json", json.dumps(seconds).encode())
        yield said


def _seconds(job: Job, name: str) -> dict[str, float]:
    path = job.out / name / "encode_seconds.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path} is damaged: remove it (the table is then without these seconds)") from None


def _learn(job: Job, name: str) -> Iterator[str]:
    """The energy, by its own program; a finished one of the same configuration is not started again."""
    run, settings = job.energy(name), _settings(job, name)
    wanted = load_config(TrainEnergyConfig, job.config.energy, settings)
    ends = [int(path.parent.name.partition("-")[2]) for path in run.glob("export/images-*/config.json")]
    # The last batch may go beyond the length that was asked for.
    if max(ends, default=0) >= wanted.training.images and (run / "config.yaml").is_file():
        kept = parse_config(TrainEnergyConfig, read_tree(run / "config.yaml")[0], where=str(run / "config.yaml"))
        if as_tree(kept) == as_tree(wanted):
            yield f"{run}: already trained"
            return
    job.train([job.config.energy, "--run", str(run), *settings], run)


@torch.no_grad()
def _measure(
    job: Job, name: str, translator: Translator, judge: Judge, examples: Examples, tests: list[ShardDataset]
) -> dict[str, Any]:
    """The backbone's JSON line: the one in OUT/NAME/backbone.json if it was made of exactly these."""
    path, autoencoder = job.out / name / "backbone.json", translator.autoencoder
    made_of = {
        "autoencoder": autoencoder.fingerprint(),
        "energy": translator.energy.fingerprint(),
        "chain": as_tree(translator.sampler.config),
        "judge": tensors_fingerprint({}, judge.state_dict()),
        "images": [examples.stamp, *(stamp for test in tests for stamp in test.stamp())],
        "settings": [job.config.pairs, job.config.seed, sorted(job.perceptual)],
    }
    if path.is_file():
        try:
            kept = json.loads(path.read_text())
        except ValueError:
            kept = {}
        if kept.get("made_of") == made_of:
            return {**kept["row"], "backbone": name, "path": job.config.backbones[name]}
    again = together([measure_reconstruction(autoencoder, test, job.perceptual) for test in tests]).row()
    scores = score_translations(
        translator,
        judge,
        examples,
        tests[0],
        tests[1] if job.config.pairs else None,
        batch=job.batch,
        seed=job.config.seed,
        perceptual=job.perceptual,
        training_latents=stored_latents(job, name, translator),
    )
    write_report(scores, job.out / name)
    by_method = {row["method"]: row for row in scores.rows}
    moved = by_method[METHOD]
    seconds = _seconds(job, name)
    days = training_days(job.energy(name))
    row: dict[str, Any] = {
        "backbone": name,
        "path": job.config.backbones[name],
        "kind": autoencoder.config.kind,
        **{key: autoencoder.extra[key] for key in ("parent", "parent_fingerprint") if key in autoencoder.extra},
        "latents": "x".join(map(str, autoencoder.latent_shape)),
        **{
            key: value
            for key, value in again.items()
            if key in ("mse", "psnr", "exact", "ssim") or key.startswith("lpips_")
        },
        **{key: value for key, value in again.items() if key.endswith(("_used", "_perplexity"))},
        "real_accuracy": by_method["real"]["target_accuracy"],
        "reconstruction_accuracy": by_method["reconstruction"]["target_accuracy"],
        "mean_shift_accuracy": by_method["mean shift"]["target_accuracy"],
        **{key: moved[key] for key in ("target_accuracy", "content_error", "pair_error") if key in moved},
        "l2_to_source": moved["l2_to_source"],
        **{f"moved_{net}": value for net, value in moved.items() if net.startswith("lpips_")},
        "encode_seconds": round(sum(seconds.values()), 1) if len(seconds) == 2 else None,
        "train_seconds": None if days is None else round(days * 86_400, 1),
        "translate_seconds": moved["seconds"],
        "device": str(job.device),
        "threads": torch.get_num_threads(),
        "samples": moved["samples"],
        **{key: moved[key] for key in ("seed", "images_seen", "source", "target", "autoencoder", "energy", "judge")},
    }
    write_atomically(path, (json.dumps({"made_of": made_of, "row": row}, indent=1) + "\n").encode())
    return row


def stored_latents(job: Job, name: str, translator: Translator) -> tuple[Tensor, Tensor]:
    """The training images' latents, without the mirrored ones."""
    sides = []
    for side in ("source", "target"):
        stored = LatentSet.open(job.latents(name, side), autoencoder_fingerprint=translator.autoencoder.fingerprint())
        latents = torch.cat(list(all_latents(translator.autoencoder, stored)))
        sides.append(latents[:: len(stored.meta["views"])])
    return sides[0], sides[1]


@torch.no_grad()
def _pictures(translator: Translator, pixels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (B, 3, H, W) to those of their reconstructions and of their translations."""
    places = torch.arange(len(pixels))
    noise = translator.autoencoder.decoder_noise(seed, places)
    latents = translator.encode(to_images(pixels.to(translator.device)))
    moved = translator.transport(latents, noise=translator.noise(seed, places)).latents
    again, there = (to_pixels(translator.decode(z, noise=noise)).cpu() for z in (latents, moved))
    return again, there
