"""DINOv2 and CLIP as extractors, and their metrics: against transformers, written-out formulas, and bad files."""

import hashlib
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import run

from letit_dist.errors import UserError
from letit_dist.evaluation import extractors, vision_transformers
from letit_dist.evaluation.extractors import open_extractor
from letit_dist.evaluation.features import SLICE, Features, assemble, extract_share, stamp_of
from letit_dist.evaluation.fidelity import FidelityOptions, cmmd, measure, metrics_for
from letit_dist.evaluation.frechet import frechet_distance
from letit_dist.evaluation.image_sets import open_image_set
from letit_dist.evaluation.vision_transformers import PUBLISHED

transformers = pytest.importorskip("transformers")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
SIZES = {
    "dinov2": {**TINY, "mlp_ratio": 4, "image_size": 70},
    "clip": {**TINY, "intermediate_size": 64, "projection_dim": 16, "image_size": 28},
}
FOLDERS = {"dinov2": "dinov2-large", "clip": "clip-vit-large-patch14-336"}
KINDS = list(SIZES)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both networks, random and tiny, as the library itself publishes them; and its own objects."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = transformers.CLIPConfig(
        text_config={**text, "vocab_size": 50}, vision_config=SIZES["clip"], projection_dim=16
    )
    models = {
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**SIZES["dinov2"], layer_norm_eps=1e-6)).eval(),
        "clip": transformers.CLIPModel(whole).eval(),
    }
    for kind, model in models.items():
        # As drawn by the library all images are nearly the same to it.
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(folder / FOLDERS[kind])
    return folder, models


@pytest.fixture
def tiny(written, monkeypatch):
    """The folder of weights, with sizes of the published networks that fit them."""
    for kind, sizes in SIZES.items():
        small = {**PUBLISHED[kind].sizes, **sizes}
        monkeypatch.setitem(PUBLISHED, kind, replace(PUBLISHED[kind], side=28, sizes=small))
    return written[0]


def file_of(folder, kind):
    return folder / FOLDERS[kind] / "model.safetensors"


def digits(folder, kind):
    return hashlib.sha256(file_of(folder, kind).read_bytes()).hexdigest()


def noise(count, height=40, width=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The networks


def test_the_sizes_are_those_of_the_published_networks():
    """304,368,640 and 304,293,888 numbers: what the formulas of a ViT-L/14 give."""
    width, blocks = 1024, 24
    block = 12 * width**2 + 13 * width
    dinov2 = 2 * width + 1370 * width + (3 * 14**2 + 1) * width + blocks * (block + 2 * width) + 2 * width
    clip = width + 577 * width + 3 * 14**2 * width + blocks * block + 4 * width + 768 * width
    for kind, expected in (("dinov2", dinov2), ("clip", clip)):
        model, config = vision_transformers._classes(kind, PUBLISHED[kind].sizes)
        with torch.device("meta"):
            assert sum(p.numel() for p in model(config).parameters()) == expected


def test_clip_features_are_unit_image_embeddings(written, tiny):
    extractor = open_extractor("clip", folder=tiny)
    pixels = noise(3, 28, 28)
    found = extractor(pixels)["features"]
    clips = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in clips)
    whole = written[1]["clip"]
    with torch.no_grad():
        inner = whole.vision_model(pixel_values=(pixels / 255 - mean) / std).pooler_output
        expected = whole.visual_projection(inner)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    assert found.shape == (3, 16) and not torch.allclose(found[0], found[1], atol=1e-2)


def test_dinov2_features_are_the_class_token_after_the_norm(written, tiny, monkeypatch):
    """At the side it was trained at, where no position is interpolated."""
    monkeypatch.setitem(PUBLISHED, "dinov2", replace(PUBLISHED["dinov2"], side=70))
    pixels = noise(3, 70, 70)
    found = open_extractor("dinov2", folder=tiny)(pixels)["features"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = written[1]["dinov2"](pixel_values=(pixels / 255 - mean) / std).pooler_output
    torch.testing.assert_close(found, expected)
    assert found.shape == (3, 32) and not torch.allclose(found[0], found[1], atol=1e-2)


def cubic(distance):
    """Keys' kernel with a = -0.75."""
    d = abs(distance)
    if d <= 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def test_positions_are_interpolated_as_dinov2_does_it(written, tiny):
    """From 5 x 5 to 2 x 2 with the side taken for 2.1, written out; and it is seen by the features."""
    network = open_extractor("dinov2", folder=tiny).network.network
    old = written[1]["dinov2"].embeddings.position_embeddings.detach().double()[0]
    grid = old[1:].unflatten(0, (5, 5))
    weights = torch.zeros(2, 5, dtype=torch.float64)
    for place in range(2):
        centre = (place + 0.5) * 5 / 2.1 - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[place, min(max(tap, 0), 4)] += cubic(centre - tap)
    expected = torch.einsum("ai,bj,ijd->abd", weights, weights, grid).flatten(0, 1)
    found = network.embeddings.position_embeddings.double()[0]
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=0)
    assert torch.equal(found[:1], old[:1])
    images = draw(1, 3, 28, 28)
    with torch.no_grad():
        plain = written[1]["dinov2"](pixel_values=images).pooler_output
        assert (network(pixel_values=images).pooler_output - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_prepared_as_in_the_papers_code(kind, tiny):
    """dgm-eval squeezes the image into a square, cmmd cuts out the centred one; then Pillow's bicubic filter."""
    published, pixels = PUBLISHED[kind], noise(2, 61, 90)
    found = extractors._as_published(pixels, published)
    image = Image.fromarray(pixels[1].permute(1, 2, 0).contiguous().numpy())
    if kind == "clip":
        image = image.crop((14, 0, 14 + 61, 61))
    plain = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    expected = ((plain - published.mean) / published.std).transpose(2, 0, 1)
    np.testing.assert_allclose(found[1].numpy(), expected, atol=1e-5)
    assert f"bicubic to {published.side}, antialiased" in published.resize


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_discriminate_and_depend_on_nothing(kind, tiny):
    before = torch.get_rng_state()
    one = open_extractor(kind, folder=Path("/nowhere"), random_weights=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert open_extractor(kind, folder=Path("/nowhere"), random_weights=True).stamp == one.stamp
    assert one.stamp["valid"] is False and one.stamp["weights"].startswith("random ")
    smooth = torch.nn.functional.avg_pool2d(noise(16, 64, 64).float(), 4).round().to(torch.uint8)
    a, b, other = (one(p)["features"] for p in (smooth, smooth.flip(0).roll(1, -1), noise(16, 16, 16, seed=1)))
    assert frechet_distance(a, other) > 2 * frechet_distance(a, b) > 0


# Their files


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_valid_only_with_the_publishers_digits(kind, tiny):
    sha256 = digits(tiny, kind)
    found = open_extractor(kind, folder=tiny)
    assert found.stamp["valid"] is False and found.stamp["weights"] == f"unverified {sha256[:16]}"
    assert found.stamp["extractor"] == PUBLISHED[kind].name and found.stamp["layer"] == PUBLISHED[kind].layer
    vouched = open_extractor(kind, folder=tiny, sha256=sha256[:10])
    assert vouched.stamp["valid"] is True and vouched.stamp["weights"] == sha256[:16]
    with pytest.raises(UserError, match=f"its sha256 begins {sha256[:8]}, that of .* begins 00000000: cut short, or"):
        open_extractor(kind, folder=tiny, sha256="00000000")
    for bad in ("1234567", "none of it"):
        with pytest.raises(UserError, match=f"--weights-sha256 {bad}: expected 8 to 64 hex digits"):
            open_extractor(kind, folder=tiny, sha256=bad)


def test_files_that_cannot_be_used(tiny, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"dinov2-large/model\.safetensors is needed \(FD-DINOv2\) and is not in .*fetch"
    ):
        open_extractor("dinov2", folder=tmp_path)
    (tmp_path / FOLDERS["dinov2"]).mkdir()
    shutil.copy(file_of(tiny, "clip"), file_of(tmp_path, "dinov2"))
    with pytest.raises(UserError, match=r"another network than dinov2-vit-l14: \d+ missing .*; \d+ unexpected"):
        open_extractor("dinov2", folder=tmp_path)
    file_of(tmp_path, "dinov2").write_bytes(file_of(tiny, "dinov2").read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        open_extractor("dinov2", folder=tmp_path)
    wide = replace(PUBLISHED["clip"], sizes={**PUBLISHED["clip"].sizes, "projection_dim": 24})
    monkeypatch.setitem(PUBLISHED, "clip", wide)
    with pytest.raises(UserError, match=r"clip-vit-l14-336: 1 of another shape \(visual_projection\.weight, \.\.\.\)"):
        open_extractor("clip", folder=tiny)
    with pytest.raises(UserError, match="one alone: leave --layer out"):
        open_extractor("clip", folder=tiny, layer="64")
    with pytest.raises(UserError, match="exclude each other"):
        open_extractor("clip", folder=tiny, random_weights=True, sha256="12345678")
    with pytest.raises(UserError, match="is known and always checked"):
        open_extractor("compat", folder=tiny, sha256="12345678")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"--extractor clip needs the package transformers: pip install"):
        open_extractor("clip", folder=tmp_path / "nothing")


def test_clip_as_a_file_of_torch(written, tiny, tmp_path):
    """What the publisher has, with an entry of old versions."""
    folder = tmp_path / FOLDERS["clip"]
    folder.mkdir()
    from safetensors.torch import load_file

    tensors = load_file(file_of(tiny, "clip"))
    torch.save({**tensors, "vision_model.embeddings.position_ids": torch.arange(5)[None]}, folder / "pytorch_model.bin")
    both = [open_extractor("clip", folder=place)(noise(2))["features"] for place in (tiny, tmp_path)]
    assert torch.equal(*both)


def test_the_list_of_files(tiny):
    for command in ("list", "check"):
        done = run("eval/weights.py", command, "--weights", tiny)
        assert "dinov2" in done.out, done.err
    assert digits(tiny, "clip")[:16] in done.out and "unverified" in done.out and done.code == 0
    assert run("eval/weights.py", "import", file_of(tiny, "clip"), "--weights", tiny).code == 2


# CMMD


def slowly(a, b):
    """Every pair on its own, in float64."""

    def mean(x, y):
        pairs = [math.exp(-sum((p - q) ** 2 for p, q in zip(u, v, strict=True)) / 200) for u in x for v in y]
        return math.fsum(pairs) / len(pairs)

    x, y = (side.double().tolist() for side in (a, b))
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def unit(count, shift=0.0, seed=0):
    return torch.nn.functional.normalize(draw(count, 8, seed=seed) + shift, dim=1)


@pytest.mark.parametrize("rows", [5, 1024])
def test_cmmd_is_that_of_all_pairs(rows, monkeypatch):
    monkeypatch.setattr("letit_dist.evaluation.fidelity._ROWS", rows)
    a, b = unit(17), unit(12, 0.7, seed=1)
    assert cmmd(a, b) == pytest.approx(slowly(a, b), rel=1e-9) and cmmd(a, b) > 0.5
    assert cmmd(a, b) == pytest.approx(cmmd(b, a), rel=1e-12) and cmmd(a, a) == 0


def test_cmmd_of_two_points_a_side():
    """At right angles the squared distance is 2; each point meets itself in half of its own side's pairs."""
    e = torch.eye(4)
    kernel = math.exp(-2 / 200)
    assert cmmd(e[:1], e[1:2]) == pytest.approx(2000 * (1 - kernel), rel=1e-12)
    assert cmmd(e[:2], e[2:]) == pytest.approx(1000 * ((1 + kernel) - 2 * kernel), rel=1e-12)


def test_cmmd_falls_with_the_count_between_sets_of_one_distribution():
    near = [cmmd(unit(count), unit(count, seed=1)) for count in (10, 400)]
    assert near[0] > 10 * near[1] > 0


def test_rows_of_the_new_metrics():
    stamp = {"extractor": "x", "layer": "l", "resize": "r", "weights": "w", "valid": True, "data": "d"}
    a, b = (Features({"features": values}, stamp) for values in (unit(40), unit(25, 0.3, seed=1)))
    options = FidelityOptions(metrics=("fd_dinov2", "cmmd"))
    found = {row["metric"]: row for row in measure(a, b, options)}
    assert list(found) == ["fd_dinov2", "fd_dinov2_equal_n", "cmmd", "cmmd_equal_n"]
    assert found["fd_dinov2"]["value"] == pytest.approx(frechet_distance(a.values, b.values), rel=1e-6)
    assert found["cmmd"]["value"] == cmmd(a.values, b.values) and found["cmmd"]["counts"] == [40, 25]
    assert found["cmmd_equal_n"]["counts"] == [25, 25] and found["cmmd_equal_n"]["spread"] > 0
    with pytest.raises(UserError, match="a Frechet distance needs 2 a side"):
        FidelityOptions(metrics=("fd_dinov2",)).check(1, 9)


def test_every_extractor_has_its_metrics():
    assert metrics_for("compat", None) == ("fid", "kid", "prc", "isc") and metrics_for("clip", None) == ("cmmd",)
    assert metrics_for("torchvision", None) == ("fid", "kid", "prc") and metrics_for("clean", ["kid"]) == ("kid",)
    for kind, metric, own in (("dinov2", "fid", "fd_dinov2"), ("clip", "fd_dinov2", "cmmd"), ("compat", "cmmd", "fid")):
        with pytest.raises(UserError, match=f"--metrics {metric}: --extractor {kind} has {own}"):
            metrics_for(kind, [metric])


# Through the program


def pictures(folder, count, seed=0, shift=0):
    folder.mkdir()
    for number, image in enumerate(noise(count, 12, 12, seed)):
        image = (image.float() * 0.7 + shift).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(image).resize((40, 40), Image.Resampling.BILINEAR).save(folder / f"{number:03d}.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_program(kind, tiny, tmp_path):
    a, b = pictures(tmp_path / "a", SLICE + 3), pictures(tmp_path / "b", 12, seed=1, shift=60)
    command = ("eval/fidelity.py", a, b, "--extractor", kind, "--weights", tiny, "--reference", tmp_path / "ref")
    done = run(*command, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    metric = metrics_for(kind, None)[0]
    assert [row["metric"] for row in rows] == [metric, f"{metric}_equal_n"]
    assert rows[0]["valid"] is False and "valid: false until --weights-sha256" in done.err
    assert digits(tiny, kind)[:16] in done.err
    extractor = open_extractor(kind, folder=tiny)
    sides = [open_image_set(side) for side in (a, b)]
    # Two ranks give the bits of one, and what the program says is what they give.
    shares = [extract_share(sides[0], extractor, rank=rank, world=2) for rank in range(2)]
    both = assemble(shares, stamp_of(sides[0], extractor))
    alone = assemble([extract_share(sides[0], extractor)], both.stamp)
    assert torch.equal(both.values, alone.values)
    other = assemble([extract_share(sides[1], extractor)], stamp_of(sides[1], extractor))
    distance = cmmd if kind == "clip" else frechet_distance
    assert rows[0]["value"] == pytest.approx(distance(both.values, other.values), rel=1e-9) and rows[0]["value"] > 0
    vouched = run(*command[:-2], "--out", tmp_path / "out2", "--weights-sha256", digits(tiny, kind)[:12].upper())
    row = json.loads(vouched.out.splitlines()[0])
    assert row["valid"] is True and row["value"] == rows[0]["value"] and "notice" not in vouched.err
    # A reference of unverified weights is not taken for one of verified ones.
    mixed = run(*command, "--out", tmp_path / "out3", "--weights-sha256", digits(tiny, kind)[:12])
    assert mixed.code == 2 and "stored features differ, weights: unverified" in mixed.err.replace("'", "")


def test_random_weights_in_the_program(tiny, tmp_path):
    a, b = pictures(tmp_path / "a", 4), pictures(tmp_path / "b", 4, seed=1, shift=60)
    done = run("eval/fidelity.py", a, b, "--extractor", "clip", "--random-weights", "--out", tmp_path / "out")
    assert done.code == 0 and json.loads(done.out.splitlines()[0])["valid"] is False
    wrong = run("eval/fidelity.py", a, b, "--extractor", "clip", "--metrics", "fid", "--out", tmp_path / "o")
    assert wrong.code == 2 and "--metrics fid: --extractor clip has cmmd" in wrong.err
