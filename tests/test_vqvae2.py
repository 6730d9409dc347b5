"""VQ-VAE-2 against numbers and key lists of the published implementations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from letit_dist.autoencoders.quantize import BatchPlace
from letit_dist.autoencoders.vqvae2 import VQVAE2, VQVAE2Config
from letit_dist.config import parse_kind
from letit_dist.errors import UserError
from letit_dist.interchange.vqvae2 import _pairs, export_vqvae2, import_vqvae2
from letit_dist.losses.reconstruction import mse
from letit_dist.registry import AUTOENCODERS

GOLDEN = Path(__file__).parent / "golden"
RESOLUTION = {"rosinality": 64, "letit": 32}
KEYS = json.loads((GOLDEN / "vqvae2_keys.json").read_text())


def golden(variant: str) -> tuple[VQVAE2, dict[str, torch.Tensor]]:
    path = GOLDEN / f"vqvae2_{variant}_checkpoint.pt"
    model = import_vqvae2(path, resolution=RESOLUTION[variant], variant=variant)
    return model, load_file(GOLDEN / f"vqvae2_{variant}_vectors.safetensors")


def draws(numbers: dict[str, torch.Tensor], stage: str) -> list[torch.Tensor] | None:
    found = [name for name in numbers if name.startswith(f"{stage}.draw.")]
    return [numbers[f"{stage}.draw.{i}"] for i in range(len(found))] or None


def close(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """1e-5 of the largest entry; scalars and single entries therefore to 1e-5 relative."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        found.reshape(expected.shape), expected, rtol=0, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("variant", ["rosinality", "letit"])
def test_golden(variant, channels_last):
    model, numbers = golden(variant)
    image = numbers["image"]
    if channels_last:
        model.to(memory_format=torch.channels_last)
        image = image.to(memory_format=torch.channels_last)
    model.train().requires_grad_(True)

    output = model.forward_training(image, noise=draws(numbers, "train1"))
    close(output.reconstruction, numbers["train1.reconstruction"], "reconstruction")
    commitment = output.commitment_top + output.commitment_bottom
    close(commitment, numbers["train1.commitment"], "commitment")
    loss = mse(output.reconstruction, image) + 0.25 * commitment
    close(loss, numbers["train1.loss"], "loss")

    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    checked = set()
    for theirs, ours in _pairs(model.config):
        if f"train1.grad_norm.{theirs}" in numbers:
            close(gradients[ours].norm(), numbers[f"train1.grad_norm.{theirs}"], theirs)
            checked.add(ours)
        if f"train1.grad.{theirs}" in numbers:
            close(gradients[ours], numbers[f"train1.grad.{theirs}"], theirs)
    assert checked == set(gradients)

    for step in (1, 2):
        if step == 2:
            model.forward_training(image, noise=draws(numbers, "train1"))
        model.update_codebooks()
        published = export_vqvae2(model)
        for name in (n for n in numbers if n.startswith(f"train{step}.quantize_")):
            # Codes of very different size (see Quantizer): every entry counts by itself.
            found = published[name.removeprefix(f"train{step}.")]
            torch.testing.assert_close(found, numbers[name], rtol=1e-5, atol=1e-12)

    model.eval()
    with torch.no_grad():
        codes = model.encode_codes(image)
        assert torch.equal(codes["top"], numbers["eval.id_t"])
        assert torch.equal(codes["bottom"], numbers["eval.id_b"])
        close(model.top_quantizer.embed_codes(codes["top"]), numbers["eval.quant_t"], "quant_t")
        close(model.bottom_quantizer.embed_codes(codes["bottom"]), numbers["eval.quant_b"], "quant_b")
        close(model.encode(image), numbers["eval.latent"], "latent")
        decoded = model.decode(numbers["eval.latent"], noise=draws(numbers, "eval"))
        close(decoded, numbers["eval.decode"], "decode")
        output = model.forward_training(image, noise=draws(numbers, "eval"))
        close(output.commitment_top + output.commitment_bottom, numbers["eval.diff"], "eval.diff")
        if "eval.decode_code" in numbers:
            close(model.decode(model.latents_from_codes(codes)), numbers["eval.decode_code"], "decode_code")


def test_golden_numbers_tell_the_variants_apart():
    path = GOLDEN / "vqvae2_rosinality_checkpoint.pt"
    model = import_vqvae2(path, resolution=64, variant="letit").train()
    numbers = golden("rosinality")[1]
    found = model.forward_training(numbers["image"]).reconstruction
    with pytest.raises(AssertionError):
        close(found, numbers["train1.reconstruction"])


@pytest.mark.parametrize("name", list(KEYS))
def test_published_keys_at_full_size(name):
    published = KEYS[name]
    kwargs = published["kwargs"]
    config = VQVAE2Config(
        code_dim=kwargs.get("embed_dim", 64),
        codes=kwargs.get("n_embed", 512),
        noise=kwargs.get("noise", False),
    )
    model = VQVAE2(config)
    found = {key: list(tensor.shape) for key, tensor in export_vqvae2(model).items()}
    assert found == published["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["parameters"]
    assert model.latent_shape == (2 * config.code_dim, 64, 64)
    counters = {name for name in model.state_dict() if name.endswith(".updates")}
    assert set(model.state_dict()) == {ours for _, ours in _pairs(config)} | counters


@pytest.mark.parametrize("noise", [False, True])
def test_import_undoes_export(noise, tmp_path):
    config = VQVAE2Config(
        resolution=24, channels=12, residual_blocks=3, residual_channels=5, code_dim=4, codes=7, noise=noise
    )
    model = VQVAE2(config)
    published = {f"module.{name}": tensor for name, tensor in export_vqvae2(model).items()}
    torch.save({"model": published, "step": 3}, tmp_path / "wrapped.pt")
    back = import_vqvae2(tmp_path / "wrapped.pt", resolution=24)
    assert back.config == config
    assert not back.training and not any(parameter.requires_grad for parameter in back.parameters())
    assert back.fingerprint() == model.fingerprint()
    assert import_vqvae2(tmp_path / "wrapped.pt", resolution=24, variant="letit").config.relu_skip


def test_import_names_every_problem(tmp_path):
    published = export_vqvae2(VQVAE2(VQVAE2.tiny))
    del published["upsample_t.bias"]
    published["quantize_b.embed"] = torch.zeros(5, 16)
    published["stray"] = torch.zeros(2)
    path = tmp_path / "wrong.pt"
    torch.save(published, path)
    with pytest.raises(UserError) as error:
        import_vqvae2(path, resolution=16)
    for part in (
        "missing upsample_t.bias (4,)",
        "quantize_b.embed: expected shape (4, 16), got (5, 16)",
        "unexpected stray (2,)",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match="divisible by 8"):
        import_vqvae2(path, resolution=20)
    with pytest.raises(UserError, match="known: rosinality, letit"):
        import_vqvae2(path, resolution=16, variant="other")
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"not a published VQ-VAE-2: no enc_b\.blocks\.2\.weight"):
        import_vqvae2(path, resolution=16)
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="found a dict with keys epoch"):
        import_vqvae2(path, resolution=16)
    torch.save(torch.nn.Linear(2, 2), path)  # a pickled class is refused, not run
    with pytest.raises(UserError, match=r"\(torch.nn.modules.linear.Linear\), which is not read"):
        import_vqvae2(path, resolution=16)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="damaged or not"):
        import_vqvae2(path, resolution=16)
    with pytest.raises(UserError, match="no such file"):
        import_vqvae2(tmp_path / "nothing.pt", resolution=16)


def test_config_errors_are_told_together():
    with pytest.raises(UserError) as error:
        parse_kind(AUTOENCODERS, {"kind": "vqvae2", "resolution": 100, "channels": 7, "code": 3}, "config.json")
    text = str(error.value)
    assert "resolution: must be divisible by 8 (the top level has stride 8), e.g. 96, got 100" in text
    assert "channels: must be even" in text
    assert "code: unknown key" in text


def sample(**changes) -> tuple[VQVAE2, torch.Tensor]:
    torch.manual_seed(0)
    config = VQVAE2.tiny.model_copy(update=changes)
    model = VQVAE2(config)
    images = torch.randn(4, 3, config.resolution, config.resolution)
    # Codes spread over what the untrained encoder gives, so that many of them are used.
    with torch.no_grad():
        bottom = model.bottom_encoder(images)
        top = model.top_projection(model.top_encoder(bottom))
        _spread(model.top_quantizer, top)
        context = model.top_decoder(model.top_quantizer(top)[0])
        _spread(model.bottom_quantizer, model.bottom_projection(torch.cat([context, bottom], 1)))
    return model, images


def _spread(quantizer, z):
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    quantizer.embed.copy_(rows.mean(0) + rows.std(0) * torch.randn(quantizer.embed.shape))
    quantizer.embed_avg.copy_(quantizer.embed)


def test_training_pass_agrees_with_encode_and_decode():
    model, images = sample()
    model.eval()
    output = model.forward_training(images)
    codes = model.encode_codes(images)
    assert codes["top"].shape == (4, 2, 2) and codes["bottom"].shape == (4, 4, 4)
    assert len(codes["bottom"].unique()) > 3
    torch.testing.assert_close(output.reconstruction, model.decode(model.encode(images)))


def test_statistics_are_collected_in_training_mode_only():
    model, images = sample()
    model.train().forward_training(2 * images)
    model.discard_statistics()
    model.encode(2 * images)
    model.eval().forward_training(2 * images)
    other, _ = sample()
    for each in (model, other):
        each.train().forward_training(images)
        stats = each.update_codebooks()
        assert stats["top"].usage > 0 and stats["bottom"].perplexity > 3
    assert model.fingerprint() == other.fingerprint()


def test_restart_of_both_levels_from_the_config():
    model, images = sample(restart_below=1.0, restart_every=1)
    for quantizer in (model.top_quantizer, model.bottom_quantizer):
        quantizer.embed[3:] = 1e3
        quantizer.embed_avg.copy_(quantizer.embed)
    model.train().forward_training(images, place=BatchPlace(0, torch.arange(4), 4))
    stats = model.update_codebooks()
    assert stats["top"].restarted >= 13 and stats["bottom"].restarted >= 13
    assert model.top_quantizer.embed.abs().max() < 100


def test_layer_noise():
    model, images = sample()
    shapes = model.noise_shapes()
    assert shapes == [(1, 4, 4), (1, 4, 4), (1, 8, 8)]
    assert VQVAE2(VQVAE2.tiny.model_copy(update={"noise": False})).noise_shapes() == []
    latents = model.encode(images)
    quiet = model.decode(latents)
    assert torch.equal(model.decode(latents, generator=torch.Generator().manual_seed(1)), quiet)  # weights are 0
    for name, parameter in model.named_parameters():
        if "noise" in name:
            parameter.data.fill_(0.5)
    assert torch.equal(model.decode(latents), quiet)
    drawn = model.decode(latents, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(4, *shape, generator=generator) for shape in shapes]
    assert torch.equal(model.decode(latents, noise=noise), drawn)
    assert not torch.allclose(drawn, quiet)
    # Each of the three maps matters, and a sample's noise touches that sample alone.
    for i in range(3):
        other = [n.clone() for n in noise]
        other[i][0] += 1
        change = (model.decode(latents, noise=other) - drawn).abs().amax((1, 2, 3))
        assert change[0] > 0 and change[1:].max() == 0
    with pytest.raises(UserError, match=r"noise maps of shapes .*\(4, 1, 8, 8\)"):
        model.decode(latents, noise=noise[:2])


def test_codes_of_another_autoencoder_are_refused():
    model, images = sample()
    codes = model.encode_codes(images)
    with pytest.raises(UserError, match="reach from 16 to 16, the codebook has 0 to 15"):
        model.latents_from_codes({**codes, "top": torch.full((4, 2, 2), 16)})
    with pytest.raises(UserError, match=r"expected bottom codes of shape \(B, 4, 4\), got \(4, 2, 2\)"):
        model.latents_from_codes({**codes, "bottom": codes["top"]})
    with pytest.raises(UserError, match="no 'bottom' codes"):
        model.latents_from_codes({"top": codes["top"]})


@pytest.mark.parametrize("relu_skip", [False, True])
def test_gradients_in_float64(relu_skip):
    """Straight-through: the encoder's gradient is the decoder's gradient at the codes plus the commitment's."""
    model, images = sample(relu_skip=relu_skip)
    model.double()
    images = images.double()
    output = model.forward_training(images)
    loss = mse(output.reconstruction, images) + output.commitment_top + output.commitment_bottom
    loss.backward()
    quiet = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert quiet == {name for name, _ in model.named_parameters() if "noise" in name}  # noise was left out
    # Along a decoder weight the loss is smooth: finite differences there.
    weight = model.decoder.blocks[0].conv1.weight
    at = (1, 2, 1, 1)
    values = []
    for shift in (1e-6, -1e-6):
        with torch.no_grad():
            weight[at] += shift
            values.append(mse(model.forward_training(images).reconstruction, images).item())
            weight[at] -= shift
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(weight.grad[at].item(), rel=1e-4, abs=1e-9)


def test_bfloat16_autocast():
    model, images = sample()
    expected = model.forward_training(images)
    model.discard_statistics()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.forward_training(images)
        loss = mse(found.reconstruction, images) + found.commitment_top + found.commitment_bottom
    loss.backward()
    assert found.reconstruction.dtype == torch.bfloat16
    assert found.commitment_top.dtype == torch.float32
    torch.testing.assert_close(found.reconstruction.float(), expected.reconstruction, rtol=0, atol=0.02)
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "noise" not in name)
    model.update_codebooks()
    assert model.top_quantizer.embed.isfinite().all()
