"""ALAE against numbers of the published implementation; its layers against their plain formulations."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.func import functional_call

from letit_dist.autoencoders.alae import ALAE
from letit_dist.autoencoders.style_layers import EncoderBlock, EqualizedConv, Styled, blur, double, halve, moments
from letit_dist.config import parse_kind
from letit_dist.errors import UserError
from letit_dist.interchange.alae import import_alae
from letit_dist.registry import AUTOENCODERS

GOLDEN = Path(__file__).parent / "golden"
CASES = [(0, 1.0)] + [(level, blend) for level in range(1, 6) for blend in (0.3, 1.0)]
WITHOUT_DRAWS = {(4, 0.3), (4, 1.0), (5, 1.0)}  # whose draws were left out of the golden file


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "alae_vectors.safetensors")


@pytest.fixture(scope="module")
def golden() -> ALAE:
    """The published weights; shared, so nobody changes it."""
    return import_alae(GOLDEN / "alae_checkpoint.pth")


@pytest.fixture
def tiny() -> ALAE:
    """16 pixels, all weights random: those of noise and the biases too, which start as zeros."""
    torch.manual_seed(0)
    model = ALAE(ALAE.tiny)
    with torch.no_grad():
        for tensor in [*model.parameters(), model.w_mean]:
            if not tensor.any():
                tensor.normal_(std=0.3)
    return model


def close(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """1e-5 of the largest entry."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}")


def draws(model: ALAE, batch: int, generator: torch.Generator, level: int | None = None) -> list[torch.Tensor]:
    """Noise of every layer; the first map shared by the batch."""
    shapes = model.noise_shapes(level)
    return [torch.randn(batch if i else 1, *shape, generator=generator) for i, shape in enumerate(shapes)]


# The published numbers


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("level", "blend"), CASES)
def test_golden(golden, numbers, level, blend, channels_last):
    at = f"lod{level}.blend{blend}"
    image = numbers[f"{at}.image"]
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    w = golden.encode_at(image, level, blend)
    close(w, numbers[f"{at}.encode.w"], "encode")
    close(golden.critic(w), numbers[f"{at}.encode.logit"], "logit")
    styles = numbers["mapping_fl.w"]
    close(golden.generate(styles, level, blend), numbers[f"{at}.decode.no_noise"], "decode")
    noise = [numbers[f"{at}.decode.draw.{i}"] for i in range(2 * level + 2) if f"{at}.decode.draw.{i}" in numbers]
    assert bool(noise) == ((level, blend) not in WITHOUT_DRAWS)
    if noise:
        assert [tuple(item.shape[1:]) for item in noise] == golden.noise_shapes(level)
        close(golden.generate(styles, level, blend, noise=noise), numbers[f"{at}.decode.noise"], "with noise")


def test_golden_at_full_resolution(golden, numbers):
    """`encode` and `decode` are the highest level, fully faded in."""
    assert golden.top == 5 and golden.latent_shape == (16,)
    close(golden.encode(numbers["lod5.blend1.0.image"]), numbers["lod5.blend1.0.encode.w"])
    close(golden.decode(numbers["mapping_fl.w"]), numbers["lod5.blend1.0.decode.no_noise"])


def test_golden_mapping_and_truncation(golden, numbers):
    w = golden.mapping(numbers["z"])
    close(w, numbers["mapping_fl.w"])
    found = golden.generate(golden.truncate(w, psi=0.7, cutoff=4), 2)
    close(found, numbers["truncation.psi0.7.cutoff4.decode.no_noise"])


def test_golden_rates(golden):
    """Factors of the optimiser's step, by our names for the published modules."""
    published = json.loads((GOLDEN / "alae_vectors.json").read_text())["lr_equalization_coef"]
    assert golden.generator.blocks[5].conv1.rates["weight"] == pytest.approx(
        published["decoder.decode_block.5.conv_1.weight"]
    )
    assert golden.encoder.blocks[5].style2.rates["weight"] == pytest.approx(
        published["encoder.encode_block.0.style_2.weight"]
    )
    for ours, theirs in ((golden.critic.layers[2], "d.map_blocks.2"), (golden.mapping.layers[1], "f.map_blocks.1.fc")):
        for part in ("weight", "bias"):
            assert ours.rates[part] == pytest.approx(published[f"mapping_{theirs}.{part}"])


# The network


def test_a_level_that_is_not_faded_in_is_the_level_below(tiny):
    images, w = torch.randn(2, 3, 16, 16), torch.randn(2, 8)
    torch.testing.assert_close(tiny.encode_at(images, 2, 0.0), tiny.encode_at(halve(images), 1))
    torch.testing.assert_close(tiny.generate(w, 2, 0.0), double(tiny.generate(w, 1)))
    assert not torch.allclose(tiny.generate(w, 2, 0.5), tiny.generate(w, 2))
    assert not torch.allclose(tiny.encode_at(images, 2, 0.5), tiny.encode_at(images, 2))


def test_truncation(tiny):
    w = torch.randn(3, 8)
    styles = tiny.truncate(w, psi=0.25, cutoff=2)
    assert styles.shape == (3, 6, 8)
    torch.testing.assert_close(styles[:, :2], 0.75 * tiny.w_mean[:2] + 0.25 * w[:, None])
    assert torch.equal(styles[:, 2:], w[:, None].expand(-1, 4, -1))
    torch.testing.assert_close(tiny.generate(tiny.truncate(w, psi=1.0), 2), tiny.generate(w, 2))
    torch.testing.assert_close(tiny.truncate(w), torch.lerp(tiny.w_mean.expand(3, -1, -1), w[:, None], 0.7))


def test_every_style_input_matters_to_its_own_sample(tiny):
    styles = torch.randn(2, 6, 8)
    expected = tiny.generate(styles, 2)
    for place in range(6):
        changed = styles.clone()
        changed[0, place] += 1
        difference = (tiny.generate(changed, 2) - expected).abs().amax((1, 2, 3))
        assert difference[0] > 1e-3 and difference[1] == 0, place


def test_mapping_sees_only_the_direction_of_z(tiny):
    z = torch.randn(4, 8)
    torch.testing.assert_close(tiny.mapping(7 * z), tiny.mapping(z))


def test_bfloat16_autocast(tiny):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    noise = draws(tiny, 4, torch.Generator().manual_seed(1))
    expected = tiny.decode(tiny.encode(images), noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = tiny.encode(images)
        found = tiny.decode(w, noise=noise)
        loss = found.square().mean() + tiny.critic(w).mean()
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the maps, which take the memory
        assert tiny.encoder.blocks[2](torch.randn(1, 4, 16, 16))[0].dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
    loss.backward()
    quiet = {name for name, parameter in tiny.named_parameters() if parameter.grad is None}
    assert all("rgb.0" in name or "rgb.1" in name or name.startswith("mapping") for name in quiet), quiet
    assert all(p.grad.isfinite().all() for name, p in tiny.named_parameters() if name not in quiet)


# Noise


def test_noise_is_drawn_or_given(tiny):
    assert tiny.noise_shapes() == [(1, 4, 4)] * 2 + [(1, 8, 8)] * 2 + [(1, 16, 16)] * 2
    assert tiny.noise_shapes(0) == [(1, 4, 4)] * 2
    w = torch.randn(3, 8)
    drawn = tiny.decode(w, generator=torch.Generator().manual_seed(1))
    noise = draws(tiny, 3, torch.Generator().manual_seed(1))
    assert torch.equal(tiny.decode(w, noise=noise), drawn)
    assert not torch.allclose(tiny.decode(w, generator=torch.Generator().manual_seed(2)), drawn)
    # The same draws in another precision.
    again = tiny.double().decode(w.double(), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.float(), drawn, rtol=0, atol=1e-4)


def test_without_noise_is_not_noise_of_zeros(tiny):
    w = torch.randn(2, 8)
    zeros = [0 * item for item in draws(tiny, 2, torch.Generator())]
    assert not torch.allclose(tiny.decode(w), tiny.decode(w, noise=zeros), atol=1e-2)


def test_first_noise_is_shared_or_of_each_sample(tiny):
    w = torch.randn(3, 8)
    noise = draws(tiny, 3, torch.Generator().manual_seed(1))
    assert noise[0].shape == (1, 1, 4, 4)
    shared = tiny.decode(w, noise=noise)
    noise[0] = noise[0].repeat(3, 1, 1, 1)
    own = tiny.decode(w, noise=noise)
    torch.testing.assert_close(own, shared, rtol=0, atol=1e-5)
    for i in range(6):
        other = [item.clone() for item in noise]
        other[i][1] += torch.randn(other[i].shape[1:])
        change = (tiny.decode(w, noise=other) - own).abs().amax((1, 2, 3))
        assert change[1] > 1e-4 and change[0] == change[2] == 0, i


# The layers


def derivatives(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The value of `function`, and its first and second derivatives in all inputs, along fixed directions."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    generator = torch.Generator().manual_seed(5)
    value = function(*inputs)
    # The sine, because a convolution is linear in each input: most second derivatives would vanish.
    directed = [torch.randn(value.shape, generator=generator, dtype=value.dtype) * value.sin()]
    first = torch.autograd.grad(directed[0].sum(), inputs, create_graph=True)
    directed = [(torch.randn(g.shape, generator=generator, dtype=g.dtype) * g).sum() for g in first]
    second = torch.autograd.grad(sum(directed), inputs)
    return [value.detach(), *(g.detach() for g in first), *second]


def assert_same_function(function, expected, *inputs: torch.Tensor) -> None:
    for found, wanted in zip(derivatives(function, *inputs), derivatives(expected, *inputs), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def four_shifts(kernel: torch.Tensor) -> torch.Tensor:
    total = kernel.new_zeros(*kernel.shape[:2], 4, 4)
    for row in (0, 1):
        for column in (0, 1):
            total = total + F.pad(kernel, (column, 1 - column, row, 1 - row))
    return total


def nearest(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def means(x: torch.Tensor) -> torch.Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


PLAIN = {
    ("", False): lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1),
    ("up", False): lambda x, weight, bias: F.conv2d(nearest(x), weight, bias, padding=1),
    ("down", False): lambda x, weight, bias: means(F.conv2d(x, weight, bias, padding=1)),
    ("up", True): lambda x, weight, bias: F.conv_transpose2d(x, four_shifts(weight), bias, stride=2, padding=1),
    ("down", True): lambda x, weight, bias: F.conv2d(x, four_shifts(weight) / 4, bias, stride=2, padding=1),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 4), (6, 16)])  # small maps resample apart from the convolution
@pytest.mark.parametrize(("resample", "fused"), list(PLAIN))
def test_convolution_is_the_plain_one(resample, fused, size, memory_format):
    torch.manual_seed(0)
    layer = EqualizedConv(3, 5, 3, bias=True, resample=resample, fused=fused).double()
    assert layer.weight.shape == ((3, 5, 3, 3) if (resample, fused) == ("up", True) else (5, 3, 3, 3))
    weight, bias = torch.randn_like(layer.weight), torch.randn(5).double()

    def function(x, weight, bias):
        x, weight = (tensor.contiguous(memory_format=memory_format) for tensor in (x, weight))
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert_same_function(function, PLAIN[resample, fused], torch.randn(2, 3, *size).double(), weight, bias)


def test_bias_of_the_caller():
    torch.manual_seed(0)
    layer, bias = EqualizedConv(3, 5, 3), torch.randn(1, 5, 1, 1)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x, bias), layer(x) + bias)


@pytest.mark.parametrize("size", [(4, 4), (5, 8)])
def test_blur_is_a_grouped_convolution(size):
    torch.manual_seed(0)
    line = torch.tensor([1.0, 2.0, 1.0]).double()
    kernel = (torch.outer(line, line) / 16).repeat(3, 1, 1, 1)
    x = torch.randn(2, 3, *size).double()
    assert_same_function(blur, lambda x: F.conv2d(x, kernel, padding=1, groups=3), x)


def test_style_is_the_plain_one():
    torch.manual_seed(0)
    layer = Styled(3, 4, level=2).double()
    noise_weight, bias = torch.randn(2, 1, 3, 1, 1).double()
    noise = torch.randn(2, 1, 5, 5).double()

    def function(x, w):
        return functional_call(layer, {"noise": noise_weight, "bias": bias}, (x, w, noise))

    def plain(x, w):
        x = F.instance_norm(F.leaky_relu(x + noise_weight * noise + bias, 0.2), eps=1e-8)
        scale, shift = layer.style(w).view(2, 2, 3, 1, 1).unbind(1)
        return x * (1 + scale) + shift

    assert_same_function(function, plain, torch.randn(2, 3, 5, 5).double(), torch.randn(2, 4).double())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_moments_are_those_of_torch(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8).double().contiguous(memory_format=memory_format)
    for index in (0, 1):
        assert_same_function(
            lambda x, i=index: moments(x)[i].exp(),
            lambda x, i=index: torch.var_mean(x, (2, 3), correction=0, keepdim=True)[1 - i].exp(),
            x,
        )


def test_moments_are_taken_in_float32():
    torch.manual_seed(0)
    x = (100 + torch.randn(2, 3, 16, 16)).bfloat16()
    for found, expected in zip(moments(x), moments(x.double()), strict=True):
        assert found.shape == (2, 3, 1, 1) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_constant_images_have_finite_gradients():
    """The std of a constant channel has no gradient of its own, neither once nor, as in R1, twice."""
    torch.manual_seed(0)
    block = EncoderBlock(3, 4, 6, level=1)
    x = torch.zeros(2, 3, 8, 8, requires_grad=True)
    out, styles = block(x)
    (first,) = torch.autograd.grad(styles.sum() + out.square().sum(), x, create_graph=True)
    assert first.isfinite().all()
    first.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


# Bad input


def test_images_of_another_size(golden):
    with pytest.raises(UserError, match=r"\(B, 3, 128, 128\), got \(2, 3, 64, 64\)"):
        golden.encode(torch.zeros(2, 3, 64, 64))
    with pytest.raises(UserError, match=r"\(B, 3, 16, 16\), got \(2, 3, 128, 128\)"):
        golden.encode_at(torch.zeros(2, 3, 128, 128), 2)
    with pytest.raises(UserError, match=r"\(B, 3, 4, 4\), got \(3, 4, 4\)"):
        golden.encode_at(torch.zeros(3, 4, 4), 0)


@pytest.mark.parametrize("level", [-1, 6])
def test_levels_that_are_not_there(golden, level):
    message = rf"no level {level}: a network of 128 pixels has levels 0 to 5 \(4 to 128 pixels\)"
    with pytest.raises(UserError, match=message):
        golden.generate(torch.zeros(1, 16), level)
    with pytest.raises(UserError, match=message):
        golden.encode_at(torch.zeros(1, 3, 4, 4), level)


@pytest.mark.parametrize(("level", "blend"), [(1, 1.5), (1, -0.1), (0, 0.5), (1, float("nan"))])
def test_blends_that_cannot_be(golden, level, blend):
    message = rf"blend must be in \[0, 1\], and 1 at level 0, got {blend} at level {level}"
    with pytest.raises(UserError, match=message):
        golden.generate(torch.zeros(1, 16), level, blend)
    with pytest.raises(UserError, match=message):
        golden.encode_at(torch.zeros(1, 3, 4 << level, 4 << level), level, blend)


def test_noise_of_other_shapes(tiny):
    w = torch.zeros(3, 8)
    noise = draws(tiny, 3, torch.Generator())
    two = [torch.zeros(2, *shape) for shape in tiny.noise_shapes()]
    shared = [torch.zeros(1, *shape) for shape in tiny.noise_shapes()]
    for wrong in (noise[:-1], [*noise, noise[-1]], two, shared, noise[::-1], []):
        with pytest.raises(UserError, match=r"noise maps of shapes .*\(3, 1, 16, 16\)"):
            tiny.decode(w, noise=wrong)


@pytest.mark.parametrize("resolution", [4, 100, 0, -8])
def test_resolutions_that_do_not_double_from_4(resolution):
    with pytest.raises(UserError, match=rf"resolution: must be a power of two from 8 on .*got {resolution}"):
        parse_kind(AUTOENCODERS, {"kind": "alae", "resolution": resolution}, "config.json")
