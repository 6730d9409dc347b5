"""PSNR, SSIM, codebook usage, LPIPS from local files, sheets, and the table of a sweep."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_autoencoder
from plain_autoencoders import Pixels
from programs import files, run, shared_chain

from letit_dist.config import load_config
from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import to_images
from letit_dist.errors import UserError
from letit_dist.evaluation.image_distances import faithfulness, l2, psnr, squared_error, ssim
from letit_dist.evaluation.reconstruction import choose, find_backbones, measure_reconstruction, perplexity, together
from letit_dist.evaluation.sweep import SweepConfig, sweep_table
from letit_dist.evaluation.weights import FILES


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Distances of images


def test_psnr_and_l2_of_a_known_difference():
    a = draw(2, 3, 16, 16).double()
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0]).double())
    torch.testing.assert_close(psnr(2 * a, 2 * b, peak=2.0), psnr(a, b))
    torch.testing.assert_close(l2(a, b), torch.tensor([0.1, 0.01]).double() * math.sqrt(3 * 256))
    assert psnr(a, a).tolist() == [math.inf] * 2 and squared_error(a, a).tolist() == [0, 0]


def test_ssim_in_closed_form():
    a = draw(2, 3, 20, 24)
    torch.testing.assert_close(ssim(a, a), torch.ones(2).double())
    # Flat images: only the luminance term is left.
    x, y = torch.full((1, 1, 16, 16), 0.3), torch.full((1, 1, 16, 16), 0.7)
    expected = (2 * 0.3 * 0.7 + 1e-4) / (0.3**2 + 0.7**2 + 1e-4)
    assert float(ssim(x, y)) == pytest.approx(expected, rel=1e-6)
    # One and the same scale for values and peak.
    torch.testing.assert_close(ssim(2 * a, 2 * a.flip(-1), peak=2.0), ssim(a, a.flip(-1)))


def test_ssim_is_its_definition():
    """One window, written out: weighted means, variances and covariance."""
    a, b = draw(1, 1, 11, 11).double(), draw(1, 1, 11, 11, seed=1).double()
    at = torch.arange(11).double() - 5
    row = torch.exp(-(at**2) / (2 * 1.5**2))
    w = torch.outer(row, row) / row.sum() ** 2
    ma, mb = (w * a[0, 0]).sum(), (w * b[0, 0]).sum()
    va, vb = (w * (a[0, 0] - ma) ** 2).sum(), (w * (b[0, 0] - mb) ** 2).sum()
    cov = (w * (a[0, 0] - ma) * (b[0, 0] - mb)).sum()
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert float(ssim(a, b)) == pytest.approx(float(expected), rel=1e-9)
    wide = torch.cat([a, b, a], 3)
    assert ssim(wide, wide.flip(-1)).shape == (1,) and ssim(a[..., :4, :6], b[..., :4, :6]).isfinite().all()


def test_ssim_sees_every_place_and_channel():
    a = draw(1, 3, 32, 32)
    for channel, row, column in ((0, 2, 2), (2, 29, 29), (1, 2, 29)):
        b = a.clone()
        b[0, channel, row - 2 : row + 2, column - 2 : column + 2] = 0
        assert float(ssim(a, b)) < 0.99999


def test_faithfulness_is_of_images_in_0_1():
    a = (draw(2, 3, 16, 16) * 255).to(torch.uint8)
    found = faithfulness(a, a.flip(-1))
    x, y = a.double() / 255, a.flip(-1).double() / 255
    torch.testing.assert_close(found["l2_to_source"], l2(x, y))
    torch.testing.assert_close(found["psnr_to_source"], psnr(x, y))
    torch.testing.assert_close(found["ssim_to_source"], ssim(x, y))


# Data sets


@pytest.fixture(scope="module")
def apples(fruit_shards):
    return ShardDataset([fruit_shards / "apple/train"])


def test_perplexity():
    assert float(perplexity(torch.tensor([5, 5, 5, 5, 0]))) == pytest.approx(4)
    assert float(perplexity(torch.tensor([7, 0, 0]))) == pytest.approx(1)
    assert float(perplexity(torch.tensor([3, 1]))) == pytest.approx(4 / 3**0.75)


class Darker(Pixels):
    """Every image comes back darker by 0.1."""

    def decode(self, latents, *, noise=None, generator=None):
        return super().decode(latents) - 0.1


def test_a_known_error(apples):
    row = measure_reconstruction(Darker(32), apples, batch=7).row()
    images = to_images(torch.stack([apples.pixels(i) for i in range(24)]))
    expected = ((images - 0.1).clamp(-1, 1) - images).double().square().mean()
    assert row["mse"] == pytest.approx(float(expected), rel=1e-6) and row["mse"] <= 0.0100001
    assert row["images"] == 24 and row["domain"] == "apple" and row["split"] == "train" and 0 < row["ssim"] < 1
    perfect = measure_reconstruction(Pixels(32), apples)
    assert perfect.row()["mse"] < 1e-12 and perfect.row()["ssim"] == pytest.approx(1, abs=1e-6)
    assert perfect.counts == {} and not any(name.endswith("_used") for name in perfect.row())


def test_an_image_that_comes_back_exactly_is_counted_and_spoils_no_mean(apples):
    measured = measure_reconstruction(Darker(32), apples)
    before = measured.row()
    assert "exact" not in before
    measured.scores["psnr"] = torch.cat(
        [measured.scores["psnr"], psnr(torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32))]
    )
    assert measured.row()["psnr"] == pytest.approx(before["psnr"]) and measured.row()["exact"] == 1
    measured.scores["psnr"] = torch.full((3,), math.inf).double()
    assert measured.row()["psnr"] is None and measured.row()["exact"] == 3


def test_codebook_usage_and_batches(apples, fruit_shards):
    autoencoder = tiny_autoencoder().eval().requires_grad_(False)
    parts = [measure_reconstruction(autoencoder, apples, batch=batch) for batch in (5, 24)]
    pixels = torch.stack([apples.pixels(i) for i in range(24)])
    codes = autoencoder.encode_codes(to_images(pixels))
    for part in parts:
        for name in ("top", "bottom"):
            expected = torch.bincount(codes[name].flatten(), minlength=16)
            assert torch.equal(part.counts[name], expected)
            assert part.row()[f"{name}_used"] == int((expected > 0).sum()) and part.row()[f"{name}_codes"] == 16
            assert part.row()[f"{name}_perplexity"] == pytest.approx(float(perplexity(expected)))
    torch.testing.assert_close(parts[0].scores["mse"], parts[1].scores["mse"])
    oranges = measure_reconstruction(autoencoder, ShardDataset([fruit_shards / "orange/test"]))
    both = together([parts[0], oranges])
    weighted = (24 * parts[0].row()["mse"] + 8 * oranges.row()["mse"]) / 32
    assert both.row()["mse"] == pytest.approx(weighted, rel=1e-9) and both.row()["images"] == 32
    assert torch.equal(both.counts["top"], parts[0].counts["top"] + oranges.counts["top"])


def test_lpips_is_taken_of_each_image(apples):
    row = measure_reconstruction(
        Darker(32), apples, {"alex": lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True)}, batch=5
    )
    assert row.scores["lpips_alex"].shape == (24,) and row.row()["lpips_alex"] == pytest.approx(0.1, abs=0.03)


def test_the_worst_and_the_typical():
    errors = torch.tensor([5.0, 1.0, 9.0, 4.0, 6.0])
    assert choose(errors, 2)["worst"].tolist() == [2, 4]
    assert choose(errors, 3)["typical"].tolist() == [4, 0, 3]
    assert len(choose(errors, 99)["worst"]) == 5


def test_bad_input(apples, fruit_latents, tmp_path):
    with pytest.raises(UserError, match="images of 32x32, the autoencoder takes 64x64"):
        measure_reconstruction(Pixels(64), apples)
    with pytest.raises(UserError, match="holds codes, not images"):
        measure_reconstruction(Pixels(32), ShardDataset([fruit_latents / "apple"]))
    found, missing = find_backbones(tmp_path, ["alex", "vgg"])
    assert not found and "lpips_alex is left out: alexnet-owt-7be5be79.pth is needed" in missing[0]
    (tmp_path / FILES["lpips-vgg"].name).write_bytes(b"cut")
    with pytest.raises(UserError, match="cut short, or another file"):
        find_backbones(tmp_path, ["alex", "vgg"])


# The program


def test_the_program_with_weights_for_one_backbone(tmp_path_factory, tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("lpips")
    chain = shared_chain(tmp_path_factory)
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()
    file = replace(FILES["lpips-squeeze"], sha256=digest[:8])
    monkeypatch.setitem(FILES, "lpips-squeeze", file)
    (tmp_path / "weights").mkdir()
    (tmp_path / "net.pth").rename(tmp_path / "weights" / file.name)
    before = files(chain.root)
    shards = [chain.images("apple", "test"), chain.images("orange", "test")]
    given = ("eval/reconstruction.py", "--autoencoder", chain.autoencoder, *shards, "--weights", tmp_path / "weights")
    done = run(*given, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out/reconstruction.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [8, 8, 16]
    assert all(row["lpips_squeeze"] > 0 and "lpips_alex" not in row for row in rows)
    assert "lpips_alex is left out" in done.err and "lpips_vgg" in done.err and "lpips_squeeze is" not in done.err
    assert sorted(p.name for p in (tmp_path / "out/sheets").iterdir()) == ["0-apple-test.png", "1-orange-test.png"]
    assert files(chain.root) == before
    quiet = run(*given, "--out", tmp_path / "two", "--lpips")
    assert quiet.code == 0 and "left out" not in quiet.err and "lpips" not in quiet.out


# The sweep


def test_the_shipped_sweep():
    from programs import ROOT

    sweep = load_config(SweepConfig, ROOT / "configs/eval/table8.yaml")
    cells = list(sweep.cells())
    assert len(cells) == 9 and (ROOT / sweep.config).is_file()
    assert any(cell[:2] == (256, 32) for cell in cells)
    codes, dim, run_folder, command = cells[0]
    assert f"--run {run_folder} autoencoder.codes={codes} autoencoder.code_dim={dim}" in command


def test_a_sweep_prints_what_is_there_and_the_commands_of_the_rest(apples, tmp_path):
    for codes, dim in ((16, 4), (8, 4)):
        autoencoder = tiny_autoencoder(codes=codes, code_dim=dim)
        autoencoder.save_pretrained(tmp_path / f"c{codes}d{dim}")
    sweep = SweepConfig(config="x.yaml", run=str(tmp_path / "c{codes}d{code_dim}"), codes=(8, 16), code_dim=(4, 2))
    table, cells, missing = sweep_table(sweep, [apples])
    assert [(cell["codes"], cell["code_dim"]) for cell in cells] == [(8, 4), (16, 4)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0] == ["dimension \\ codes", "8", "16"]
    assert lines[2] == ["4", *(f"{cell['mse']:.4g}" for cell in cells)] and lines[3] == ["2", "-", "-"]
    assert len(missing) == 2 and all("autoencoder.code_dim=2" in line for line in missing)
    (tmp_path / "c8d4").rename(tmp_path / "c8d2")
    with pytest.raises(UserError, match="codes and code_dim are 8 and 4, the sweep has 8 and 2"):
        sweep_table(sweep, [apples])


def test_the_sweep_as_a_program(fruit_shards, tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "c16d4")
    config = tmp_path / "sweep.yaml"
    config.write_text(f"config: x.yaml\nrun: {tmp_path}/c{{codes}}d{{code_dim}}\ncodes: [16, 32]\ncode_dim: [4]\n")
    done = run("eval/reconstruction.py", "--sweep", config, fruit_shards / "apple/test", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "not trained yet:" in done.out and "autoencoder.codes=32" in done.out
    assert len((tmp_path / "out/sweep.jsonl").read_text().splitlines()) == 1
    config.write_text("config: x.yaml\nrun: y\ncodes: []\n")
    assert run("eval/reconstruction.py", "--sweep", config, "x", "--out", tmp_path / "o").code == 2
