"""`throughput.py zero`: DDP against DeepSpeed's stages, on two real ranks."""

import json
import sys

import pytest
import torch
from programs import ROOT, run

from letit_dist.errors import UserError

sys.path.insert(0, str(ROOT / "eval"))  # as Python does for a program there

from speed.zero_rank import built, configuration
from speed.zero_speed import ZeroSpeed, way_apart

CONFIG = ROOT / "configs/debug/vqvae2.yaml"
TINY = ["autoencoder.resolution=16", "autoencoder.channels=64", "autoencoder.residual_channels=16", "training.batch=4"]
ZERO = ("eval/throughput.py", "zero", "--repeats", 1, "--steps", 2, "--device", "cpu")


def json_file(folder, **keys):
    path = folder / "asked.json"
    path.write_text(json.dumps({"gradient_clipping": 0.0, "zero_optimization": {"stage": 1}, **keys}))
    return path


def test_what_a_rank_holds_under_stage_3_and_that_it_learns_what_ddp_learns(tmp_path):
    pytest.importorskip("deepspeed")
    files = ("--files", ROOT / "launch/deepspeed/zero3.json", "--out", tmp_path)
    done = run(*ZERO, *files, "--", *TINY)
    assert done.code == 0, done.err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines() if line[0] == "|"]
    columns, _, ddp, stage3 = rows
    assert "ranks: 2, 4 images a step of all together" in done.out
    recipe = built(configuration(str(CONFIG), TINY))
    parameters, buffers = (sum(t.nbytes for t in found()) / 2**20 for found in (recipe.parameters, recipe.buffers))
    assert parameters > 0.5 and buffers > 0.05
    held = [columns.index(f"{kind}, MiB") for kind in ("weights", "Adam's moments", "copies")]
    expected = {"DDP": (parameters + buffers, 2 * parameters, 0)}
    expected["zero3"] = (parameters / 2 + buffers, parameters, parameters / 2)
    for row in (ddp, stage3):
        assert [float(row[place]) for place in held] == pytest.approx(expected[row[0]], abs=0.01)
        rate, ratio, peak, apart = (
            row[columns.index(name)] for name in ("images/s", "of DDP", "peak, MiB", "weights apart")
        )
        assert float(peak) > sum(expected[row[0]]) and float(apart) < 1e-3
        assert float(ratio.split()[0]) == pytest.approx(float(rate) / float(ddp[1]), abs=0.02)
    assert ddp[0] == "DDP" and float(ddp[columns.index("weights apart")]) == 0
    (report,) = tmp_path.glob("*-zero.md")
    assert done.out.splitlines()[0] in report.read_text() and "Weights apart" in report.read_text()


@pytest.mark.full
def test_a_file_that_learns_something_else_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    clipped = json_file(tmp_path, gradient_clipping=1e-12)
    done = run(*ZERO, "--files", clipped, "--", *TINY)
    assert done.code == 2 and f"the two sides disagree: weights of {clipped} and DDP by " in done.err
    nonsense = json_file(tmp_path, zero_optimization={"stage": 7})
    with pytest.raises(UserError, match=r"asked\.json failed: .* -m accelerate\.commands\.launch"):
        ZeroSpeed(tmp_path, CONFIG, TINY, device="cpu", steps=1).start(nonsense)


def test_how_far_weights_are_apart_in_units_of_their_way():
    start = {"a": torch.zeros(4), "b": torch.zeros(1)}
    expected = {"a": torch.full((4,), 2.0), "b": torch.full((1,), 3.0), "buffer": torch.ones(1)}
    found = {"a": torch.full((4,), 1.0), "b": torch.full((1,), 3.0), "buffer": torch.full((1,), 9.0)}
    assert way_apart(expected, expected, start) == 0
    assert way_apart(found, expected, start) == pytest.approx((4 / 25) ** 0.5)
    assert way_apart(start, expected, start) == 1


def test_what_cannot_be_compared_is_refused_before_anything_starts(tmp_path):
    pytest.importorskip("deepspeed")
    half = json_file(tmp_path, bf16={"enabled": True})
    done = run(*ZERO, "--files", half)
    assert done.code == 2 and f"error: {half}: the DeepSpeed JSON enables bf16, which casts" in done.err
    done = run(*ZERO, "--files", tmp_path / "none.json")
    assert done.code == 2 and "none.json: No such file" in done.err
    done = run(*ZERO, "training.batch=5")
    assert done.code == 2 and "training.batch: 5 images do not divide over 2 ranks" in done.err
    done = run(*ZERO, "--threads", 1)
    assert done.code == 2 and "--threads has no effect on zero: leave it out" in done.err
    done = run("eval/throughput.py", "zero", "--steps", 0)
    assert done.code == 2 and "--steps 0: must be at least 1" in done.err
