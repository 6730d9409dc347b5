"""What holds for every registered kind of autoencoder, at its `tiny` size; folders of weights."""

import json

import pytest
import torch

from letit_dist import pretrained
from letit_dist.autoencoders.base import Autoencoder, build_autoencoder, load_autoencoder
from letit_dist.config import as_tree, parse_kind
from letit_dist.errors import UserError
from letit_dist.registry import AUTOENCODERS

KINDS = AUTOENCODERS.kinds()


@pytest.fixture(params=KINDS)
def model(request) -> Autoencoder:
    made_by = AUTOENCODERS.get(request.param)
    if made_by.needs:
        pytest.importorskip(made_by.needs)
    torch.manual_seed(0)
    return build_autoencoder(made_by.tiny).eval().requires_grad_(False)


@pytest.fixture
def images(model) -> torch.Tensor:
    side = model.config.resolution
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def decode(model: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    return model.decode(latents, generator=draw())


def test_config(model):
    assert type(model.config) is type(model).config_class
    assert model.config.kind in KINDS
    assert parse_kind(AUTOENCODERS, as_tree(model.config), "here") == model.config


def test_shapes(model, images):
    latents = model.encode(images)
    assert latents.shape == (3, *model.latent_shape)
    decoded = decode(model, latents)
    assert decoded.shape == images.shape
    assert decoded.isfinite().all()
    assert torch.equal(decode(model, latents), decoded)
    assert model.encode(images[:1]).shape == (1, *model.latent_shape)


def test_samples_do_not_mix(model, images):
    latents = model.encode(images)
    torch.testing.assert_close(model.encode(images[1:]), latents[1:], rtol=1e-4, atol=1e-5)


def test_wrong_sizes_are_named(model, images):
    side = model.config.resolution
    with pytest.raises(UserError, match=rf"{side}, {side}\).*{2 * side}, {2 * side}\)"):
        model.encode(images.repeat(1, 1, 2, 2))
    with pytest.raises(UserError, match=rf"\(B, 3, {side}, {side}\)"):
        model.encode(images[:, :1])
    with pytest.raises(UserError, match="expected latents of shape"):
        decode(model, torch.zeros(2, 1 + model.latent_shape[0], *model.latent_shape[1:]))


def test_codes(model, images):
    if not model.stores_codes:
        with pytest.raises(NotImplementedError):
            model.encode_codes(images)
        return
    codes = model.encode_codes(images)
    assert all(len(item) == 3 and not item.is_floating_point() for item in codes.values())
    assert torch.equal(model.latents_from_codes(codes), model.encode(images))


def test_round_trip(model, images, tmp_path):
    model.save_pretrained(tmp_path / "weights", images_seen=7)
    assert pretrained.read_extra(tmp_path / "weights") == {"images_seen": 7}
    for back in (load_autoencoder(tmp_path / "weights"), type(model).from_pretrained(tmp_path / "weights")):
        assert type(back) is type(model)
        assert back.config == model.config
        assert not back.training and not any(parameter.requires_grad for parameter in back.parameters())
        assert torch.equal(back.encode(images), model.encode(images))
        assert torch.equal(decode(back, model.encode(images)), decode(model, model.encode(images)))
        assert back.fingerprint() == model.fingerprint()
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["fingerprint"] == model.fingerprint()


def test_float64_comes_back_as_float64(model, tmp_path):
    model.double().save_pretrained(tmp_path / "weights")
    back = load_autoencoder(tmp_path / "weights")
    assert back.fingerprint() == model.fingerprint()
    assert {p.dtype for p in back.parameters()} <= {torch.float64}


def test_fingerprint(model):
    stable = model.fingerprint()
    assert len(stable) == 16
    assert model.to(memory_format=torch.channels_last).fingerprint() == stable
    name, tensor = next((n, t) for n, t in model.state_dict().items() if t.is_floating_point() and t.numel())
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1).reshape(-1)
    old = flat[-1].clone()
    flat[-1] += 1e-3
    assert model.fingerprint() != stable, name
    flat[-1] = old
    assert model.fingerprint() == stable
    model.config = model.config.model_copy(update={"resolution": 2 * model.config.resolution})
    assert model.fingerprint() != stable


# The folder itself: the same for every kind, so one is enough.


@pytest.fixture
def saved(tmp_path):
    one = build_autoencoder(AUTOENCODERS.get("vqvae2").tiny)
    one.save_pretrained(tmp_path / "weights")
    return one, tmp_path / "weights"


def test_missing_and_damaged(saved, tmp_path):
    _, folder = saved
    with pytest.raises(UserError, match=r"nowhere: it does not exist"):
        load_autoencoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        load_autoencoder(folder / "config.json")
    weights = (folder / "model.safetensors").read_bytes()
    for damaged in (weights[:-10], b"", b"\xff" * 100):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            load_autoencoder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"neither weights \(config\.json and model\.safetensors\)"):
        load_autoencoder(folder)


def test_edited(saved):
    _, folder = saved
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "resolution": 32}))
    with pytest.raises(UserError, match=f"fingerprint {tree['fingerprint']} stored"):
        load_autoencoder(folder)
    path.write_text(json.dumps({k: v for k, v in tree.items() if k != "fingerprint"}))
    with pytest.raises(UserError, match="no `fingerprint`"):
        load_autoencoder(folder)
    path.write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        load_autoencoder(folder)
    path.write_text("[]")
    with pytest.raises(UserError, match="found list"):
        load_autoencoder(folder)


def test_every_wrong_key_is_named(saved, tmp_path):
    one, _ = saved
    tensors = dict(one.state_dict())
    tensors["stray"] = torch.zeros(2)
    tensors["top_projection.weight"] = torch.zeros(1)
    tensors["top_quantizer.updates"] = torch.zeros(())
    del tensors["decoder.conv.bias"]
    pretrained.write_folder(tmp_path / "wrong", as_tree(one.config), tensors)
    with pytest.raises(UserError) as error:
        load_autoencoder(tmp_path / "wrong")
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for part in (
        "missing decoder.conv.bias (8,)",
        "unexpected stray (2,)",
        "top_projection.weight: expected shape (4, 8, 1, 1), got (1,)",
        "top_quantizer.updates: expected torch.int64, got torch.float32",
    ):
        assert any(part in line for line in lines), part


def test_unknown_and_other_kinds(saved, tmp_path):
    one, folder = saved
    tensors = one.state_dict()
    for tree, message in (
        ({"kind": "vqvae", "resolution": 16}, "did you mean 'vqvae2'"),
        ({"resolution": 16}, "no `kind`"),
        ({**as_tree(one.config), "channel": 8}, "did you mean 'channels'"),
    ):
        pretrained.write_folder(tmp_path / "other", tree, tensors)
        with pytest.raises(UserError, match=message):
            load_autoencoder(tmp_path / "other")

    class Another(Autoencoder):
        pass

    with pytest.raises(UserError, match="holds a VQVAE2"):
        Another.from_pretrained(folder)


def test_replaced_whole_or_not_at_all(saved, tmp_path):
    one, folder = saved
    before = one.fingerprint()
    with torch.no_grad():
        one.decoder.conv.bias.add_(1)
    shared = {"a": one.decoder.conv.bias, "b": one.decoder.conv.bias}  # safetensors refuses shared memory
    with pytest.raises(RuntimeError):
        pretrained.write_folder(folder, as_tree(one.config), shared)
    assert load_autoencoder(folder).fingerprint() == before
    one.save_pretrained(folder)
    assert load_autoencoder(folder).fingerprint() == one.fingerprint() != before
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]  # nothing left beside it
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"will not replace .*notes\.txt"):
        one.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="it is a file"):
        one.save_pretrained(folder / "notes.txt")
