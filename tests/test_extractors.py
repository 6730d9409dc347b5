"""Networks whose features are compared: their weights, and their resizes against Pillow's."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_inception import noise

from letit_dist.errors import UserError
from letit_dist.evaluation import extractors
from letit_dist.evaluation.extractors import open_extractor
from letit_dist.evaluation.frechet import frechet_distance

pytest.importorskip("torch_fidelity")


def test_random_weights_discriminate_and_say_that_they_are_not_valid(inception):
    assert inception.stamp["valid"] is False and inception.stamp["weights"].startswith("random ")
    smooth = torch.nn.functional.avg_pool2d(noise(16, 64).float(), 4).round().to(torch.uint8)
    a, b, other = (inception(p)["features"] for p in (smooth, smooth.flip(-1), noise(16, 16, 1)))
    assert frechet_distance(a, other) > 20 * frechet_distance(a, b) > 0


def test_random_weights_touch_no_other_randomness():
    before = torch.get_rng_state()
    one = open_extractor("compat", folder=Path("/nowhere"), layer="64", random_weights=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    two = open_extractor("compat", folder=Path("/nowhere"), layer="64", random_weights=True)
    assert one.stamp == two.stamp


def test_weights_from_a_file(inception, known_weights):
    loaded = open_extractor("compat", folder=known_weights, layer="64")
    digest = hashlib.sha256(next(known_weights.iterdir()).read_bytes()).hexdigest()
    assert loaded.stamp["valid"] is True and loaded.stamp["weights"] == digest[:16]
    assert torch.equal(loaded(noise(2))["features"], inception(noise(2))["features"])


def test_weights_that_cannot_be_used(tmp_path, inception, monkeypatch):
    with pytest.raises(UserError, match=r"fetch https://github\.com/toshas"):
        open_extractor("compat", folder=tmp_path)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"weights of another network: fc\.weight: expected shape \(1008, 2048\)"):
        extractors.load_network(inception.network, tmp_path / "x.pth")
    with pytest.raises(UserError, match="extractor 'x', known: compat, clean"):
        open_extractor("x", folder=tmp_path)
    with pytest.raises(UserError, match="layer '64', the extractor torchvision has 2048"):
        open_extractor("torchvision", folder=tmp_path, layer="64", random_weights=True)
    with pytest.raises(UserError, match="Inception score needs"):
        open_extractor("torchvision", folder=tmp_path, logits=True, random_weights=True)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="pip install"):
        open_extractor("compat", folder=tmp_path)


def with_kind(extractor, kind):
    return extractors.Extractor(kind, extractor.network, extractor.stamp)


def test_every_resize_leaves_299_pixels_alone(inception):
    """What reaches the network is then the same up to its range."""
    pixels = noise(1, 299)
    seen = []
    hook = inception.network.Conv2d_1a_3x3.conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        for kind in ("compat", "clean", "pytorch-fid"):
            with_kind(inception, kind)(pixels)
    finally:
        hook.remove()
    assert torch.equal(seen[0], (pixels.float() - 128) / 128)
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[2], pixels.float() / 127.5 - 1, atol=1e-5, rtol=0)
    assert len(inception.network.Conv2d_1a_3x3._forward_pre_hooks) == 0


def test_clean_is_pillows_bicubic_of_every_channel_in_float():
    pixels = noise(2, 40)
    found = extractors._clean(pixels) * 128 + 128
    plane = Image.fromarray(pixels[1, 2].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(found[1, 2].numpy(), np.asarray(plane).clip(0, 255), atol=1e-4)
    assert found.min() >= 0 and found.max() <= 255 and (found != found.round()).any()


def test_only_clean_is_antialiased():
    """Stripes at a third of the size: a filter makes them grey, sampling keeps one of the colours."""
    stripes = torch.zeros(1, 3, 897, 897, dtype=torch.uint8)
    stripes[..., ::3] = 255
    inner = (..., slice(10, -10), slice(10, -10))
    clean = extractors._clean(stripes)[inner] * 128 + 128
    plain = (extractors._plain(stripes)[inner] + 1) * 127.5
    assert clean.std() < 1 and float(clean.mean()) == pytest.approx(85, abs=1)
    assert float(plain.mean()) < 1


def test_torchvisions_network_gives_what_its_last_layer_gets():
    extractor = open_extractor("torchvision", folder=Path("/nowhere"), random_weights=True)
    pixels = noise(2, 299)
    found = extractor(pixels)["features"]
    assert found.shape == (2, 2048) and extractor.stamp["extractor"] == "inception-torchvision"
    with torch.no_grad():
        torch.testing.assert_close(extractor.network.fc(found), extractor.network(extractors._imagenet(pixels)))
    grey = torch.full((1, 3, 299, 299), 124, dtype=torch.uint8)
    assert float(extractors._imagenet(grey)[0, 0].mean()) == pytest.approx((124 / 255 - 0.485) / 0.229, abs=1e-6)
