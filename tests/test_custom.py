"""Anybody's torch module as an autoencoder, by its name."""

import foreign_autoencoders as foreign
import pytest
import torch
from foreign_autoencoders import error_of, images

from letit_dist.autoencoders.base import build_autoencoder, load_autoencoder
from letit_dist.autoencoders.custom import CustomConfig
from letit_dist.interchange.custom import import_custom


@torch.no_grad()
def test_a_module_by_its_name(tmp_path):
    torch.manual_seed(0)
    model = foreign.Codec(16, width=5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    named = {"module": "foreign_autoencoders:Codec", "arguments": {"side": 16, "width": 5}, "images": "unit"}
    ours, x = import_custom(tmp_path / "weights.pth", resolution=16, **named), images(16)
    torch.testing.assert_close(ours.encode(x), model.encode((x + 1) / 2))
    torch.testing.assert_close(ours.decode(ours.encode(x)), model.decode(ours.encode(x)) * 2 - 1)
    ours.save_pretrained(tmp_path / "ours")
    back = load_autoencoder(tmp_path / "ours")
    assert back.config.latent_shape == (5,) and back.fingerprint() == ours.fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": "os"}, "'os': expected package.module:Class"),
        ({"module": "nowhere.nets:Codec"}, "nowhere.nets:Codec: cannot import nowhere.nets (ModuleNotFoundError"),
        ({"module": "foreign_autoencoders:Codek"}, "no torch module (a class) of that name"),
        ({"module": "foreign_autoencoders:Encoder"}, "has no `decode`, which letit_dist would call"),
        ({"arguments": {"side": 16, "depth": 2}}, "refuses arguments"),
        ({"module": "foreign_autoencoders:Tuples"}, "encode gives a tuple, expected a tensor"),
        ({"arguments": {"side": 8}}, "fails on a grey image of 16 pixels: RuntimeError"),
    ],
)
def test_modules_that_cannot_be_used(settings, message):
    given = {"module": "foreign_autoencoders:Codec", "arguments": {"side": 16}, "images": "unit", **settings}
    assert message in error_of(import_custom, None, resolution=16, **given)


def test_a_folder_from_elsewhere_calls_nothing_but_torch_modules(tmp_path):
    for name in ("subprocess:Popen", "os:system", "builtins:exec"):
        config = CustomConfig(resolution=16, module=name, arguments={"args": ["touch", str(tmp_path / "ran")]})
        assert "has no torch module" in error_of(build_autoencoder, config)
    assert not (tmp_path / "ran").exists()
