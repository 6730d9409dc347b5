"""What a pass takes, how many images fit, and whether the programs keep to what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from large_images import make_models, watch
from PIL import Image

from letit_dist import memory
from letit_dist.autoencoders.alae import ALAE
from letit_dist.data.synthetic import fruit
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.errors import UserError
from letit_dist.memory import GIB, MemoryPlan, budget_bytes, chunk_for, cost_of, peak_bytes, plan_memory

ROOT = Path(__file__).parent.parent
MIB = 1 << 20


def block(mebibytes=1):
    return torch.ones(mebibytes * MIB // 4)


# What tensors take


def test_live_tensors_are_counted_and_dead_ones_are_not():
    def three():
        first = block()
        second = first + 1
        del first
        third = second * 2
        del second, third
        return block() + 1

    assert peak_bytes(three) == 2 * MIB
    assert peak_bytes(lambda: [block() for _ in range(5)]) == 5 * MIB
    assert peak_bytes(lambda: None) == 0


def test_views_and_what_was_there_before_are_no_new_memory():
    old = block()
    assert peak_bytes(lambda: old.view(512, -1).t()[3:]) == 0
    assert peak_bytes(lambda: old.add_(1)) == 0
    assert peak_bytes(lambda: [old + 1, old.view(512, -1)]) == MIB
    whole = block(2)

    def replaced():
        nonlocal whole
        whole.sum()
        whole = None  # older than the function: its end is no credit
        return block()

    assert peak_bytes(replaced) == MIB


@pytest.mark.parametrize("depth", [3, 9])
def test_what_autograd_keeps_is_counted(depth):
    """exp keeps its result: one block a layer, beside one or two that the walk back needs."""

    def chain(start):
        for _ in range(depth):
            start = start.exp()
        return start.sum()

    start = block()
    assert peak_bytes(lambda: chain(start)) == 2 * MIB
    start.requires_grad_()
    found = peak_bytes(lambda: torch.autograd.grad(chain(start), start))
    assert depth * MIB <= found <= (depth + 3) * MIB


def test_a_langevin_step_keeps_the_activations_of_its_energy():
    energy = build_energy(MLPEnergyConfig(layers=2, hidden=1024), (64,))
    start = torch.randn(256, 64)  # an activation is 1 MiB
    with torch.no_grad():
        forward = peak_bytes(lambda: energy(start))
    assert 2 * MIB <= forward < 2.2 * MIB
    one, two = (
        peak_bytes(
            lambda steps=steps: LangevinSampler(LangevinConfig(steps=steps, step_size=1.0)).sample(energy, start)
        )
        for steps in (1, 2)
    )
    assert 4 * MIB <= one <= two < 7 * MIB


def test_decoding_grows_with_the_images():
    torch.manual_seed(0)
    model = ALAE(ALAE.tiny.model_copy(update={"resolution": 64})).requires_grad_(False)
    one, two, four = (peak_bytes(lambda n=n: model.decode(torch.randn(n, 8))) for n in (1, 2, 4))
    # Twelve channels or so of 64 x 64 are the least that the last level can do with.
    assert one > 12 * 64 * 64 * 4
    assert four - two == pytest.approx(2 * (two - one), rel=0.1)


def test_the_compiler_stays_out():
    """Watching imports nothing: torch's compiler would take 150 MB and two seconds."""
    code = "import sys, torch; from letit_dist.memory import peak_bytes; a = torch.ones(9, requires_grad=True)\n"
    code += "peak_bytes(lambda: torch.autograd.grad(a.exp().sum(), a)); print('torch._dynamo' in sys.modules)"
    done = watch(["-c", code], threads=1)
    assert done.code == 0 and done.lines == ["False"]


# What the system sees


def alone(program: str) -> None:
    """Run it in a process of its own: what this one has allocated and freed before decides what its heap gives back."""
    head = "import torch\nfrom letit_dist import memory\nMIB = 1 << 20\n"
    done = subprocess.run([sys.executable, "-c", head + program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_memory_that_torch_does_not_know_of_is_seen():
    alone("""
memory.return_freed_memory()
def hidden():
    return len(b"x" * (64 * MIB))
assert memory.peak_bytes(hidden) == 0
assert 50 * MIB < memory.cost_of(hidden) < 150 * MIB, memory.cost_of(hidden)
assert memory.cost_of(lambda: torch.ones(2 * MIB)) >= 8 * MIB
""")


def test_a_system_that_does_not_tell(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert cost_of(lambda: block(8)) == 2 * 8 * MIB


def test_freed_blocks_go_back():
    alone("""
memory.return_freed_memory()
before = memory.resident_bytes()
blocks = [torch.ones(2 * MIB) for _ in range(32)]
assert memory.resident_bytes() - before > 250 * MIB
del blocks[::2]
assert memory.resident_bytes() - before < 160 * MIB
del blocks
assert memory.resident_bytes() - before < 40 * MIB
""")


# How many fit


def test_chunks():
    assert chunk_for(100, 20, 10) == 8
    assert chunk_for(109, 20, 10) == 8
    assert chunk_for(29, 20, 10) == 0
    assert chunk_for(10, 20, 10) == 0
    assert chunk_for(100, 20, 0) == 80


def test_budgets():
    assert budget_bytes(None) == 4 * GIB
    assert budget_bytes(2.5) == 5 * GIB // 2
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"--memory \S+: expected GiB, more than 0"):
            budget_bytes(wrong)


@pytest.fixture
def planned(monkeypatch):
    """Plan for a pass of `fixed` + n * `each` MiB in a process of 100 MiB; returns the plan and the n that were run."""
    monkeypatch.setattr(memory, "cost_of", peak_bytes)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 * MIB)

    def call(most, budget, *, each, fixed=0, **options):
        runs = []

        def work(count):
            runs.append(count)
            return [block(each * count)] + ([block(fixed)] if fixed else [])

        weights = torch.nn.Linear(1024, 10 * 256, bias=False)  # 10 MiB
        given = {"modules": [weights, weights], "precision": "fp32", **options}
        return plan_memory(work, most=most, budget=budget * MIB, **given), runs

    return call


def test_as_many_as_fit_and_no_more_than_wanted(planned):
    plan, _ = planned(16, 4096, each=1)
    assert plan.images == 16
    plan, _ = planned(16, 100 + 54, each=10)
    assert plan.images == 4  # of 11 MiB, with the allowance
    assert (plan.weights, plan.runtime, plan.per_image) == (10 * MIB, 90 * MIB, 11 * MIB)
    assert planned(16, 100 + 54, each=10, beside=11 * MIB)[0].images == 3
    assert planned(16, 100 + 54, each=10, kept=7 * MIB)[0].images == 3


def test_small_images_are_tried_together(planned):
    plan, runs = planned(16, 4096, each=1, fixed=50)
    assert runs[0] == 1 and runs[-1] == 16 == plan.images
    assert plan.per_image == pytest.approx(1.1 * (1 + 50 / 16) * MIB, rel=1e-3)
    assert planned(16, 4096, each=300)[1] == [1]
    # Never more than the budget holds, as far as one knows.
    plan, runs = planned(16, 100 + 70, each=1, fixed=50)
    assert all(count == 1 or 1.1 * (1 + 50) * count <= 70 for count in runs)


def test_not_even_one(planned, monkeypatch):
    with pytest.raises(UserError) as error:
        planned(16, 120, each=410)
    assert str(error.value) == (
        "one image at a time takes about 0.54 GiB (weights 0.0, 1 image at once x 0.44, runtime 0.1), the budget is "
        "0.12: give --memory 0.6"
    )
    monkeypatch.setattr(memory, "has_bf16", lambda _: True)
    with pytest.raises(UserError, match=r": give --memory 0\.6, or --precision bf16$"):
        planned(16, 120, each=410)
    with pytest.raises(UserError, match=r": give --memory 0\.6$"):
        planned(16, 120, each=410, precision="bf16")


def test_the_line():
    plan = MemoryPlan(4, GIB // 3, 2 * GIB // 5, 0, GIB // 2, GIB, 4 * GIB)
    assert str(plan) == (
        "memory: about 2.4 GiB at the peak (weights 0.3, 4 images at once x 0.4, runtime 0.5); budget 4.0"
    )
    plan = MemoryPlan(1, GIB // 3, 8 * MIB, GIB // 10, GIB // 2, 2 * GIB, 4 * GIB)
    assert str(plan) == (
        "memory: about 2.0 GiB at the peak (weights 0.3, 1 image at once x 0.0078, sheets and paths 0.1, runtime 0.5, "
        "reading the weights 2.0); budget 4.0"
    )


def test_a_precision_that_does_not_pay_is_named(monkeypatch):
    monkeypatch.setattr(memory, "has_bf16", lambda _: False)
    assert memory.slow_precision("fp32") is None
    assert memory.slow_precision("bf16").startswith("notice: this processor has no bfloat16 arithmetic")
    monkeypatch.setattr(memory, "has_bf16", lambda _: True)
    assert memory.slow_precision("bf16") is None


# The programs keep to it: tests/large_images.py does the same at 1024 pixels.


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("alae", {"max_channels": 16}),
        pytest.param("vqvae2", {"channels": 48}, marks=pytest.mark.full),
    ],
)
def test_a_program_takes_what_it_says(tmp_path, kind, width):
    make_models(tmp_path, kind, 512, steps=1, **width)
    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.fromarray(fruit("apple", 0, number, 64)[0]).save(tmp_path / f"in/{number}.png")
    program = Path(__file__).parent.parent / "launch/translate.py"
    command = [program, tmp_path / "in", "--energy", tmp_path / "energy", "--autoencoder", tmp_path / "autoencoder"]
    done = watch([*command, "--out", tmp_path / "out", "--memory", 3], threads=1)
    assert done.code == 0, done.errors
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert "3 images at once x " in done.lines[0] and done.lines[0].endswith("; budget 3.0")
    # One digit behind the point is 0.05 either way.
    assert 0.7 * done.stated - 0.05 < done.peak / GIB < 1.1 * done.stated + 0.05
