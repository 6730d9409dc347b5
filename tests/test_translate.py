"""Images through encoder, chain and decoder, with a tiny VQ-VAE-2."""

import pytest
import torch

from letit_dist.autoencoders.base import build_autoencoder
from letit_dist.energy.langevin import LangevinConfig, LangevinSampler
from letit_dist.energy.mlp import MLPEnergyConfig
from letit_dist.energy.models import build_energy
from letit_dist.energy.translate import Translator, load_translators
from letit_dist.errors import UserError
from letit_dist.registry import AUTOENCODERS

STEPS = 4


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    model = build_autoencoder(AUTOENCODERS.get("vqvae2").tiny)
    for name, parameter in model.named_parameters():
        if parameter.numel() == 1 and "noise" in name:
            torch.nn.init.constant_(parameter, 0.5)  # so that the decoder's noise shows
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def energy(autoencoder):
    torch.manual_seed(1)
    return build_energy(MLPEnergyConfig(hidden=16), autoencoder.latent_shape).requires_grad_(False)


@pytest.fixture(scope="module")
def translator(autoencoder, energy):
    return Translator(autoencoder, energy, LangevinSampler(LangevinConfig(steps=STEPS, step_size=2.0)))


@pytest.fixture(scope="module")
def images(autoencoder):
    side = autoencoder.config.resolution
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_translation_is_encode_chain_decode(translator, images):
    result = translator.translate(images)
    source = translator.autoencoder.encode(images)
    chain = translator.sampler.sample(translator.energy, source)
    assert torch.equal(result.source_latents, source)
    assert torch.equal(result.latents, chain.latents)
    assert torch.equal(result.shift, chain.shift)
    assert torch.equal(result.images, translator.autoencoder.decode(chain.latents))
    assert result.path is None and result.path_images is None
    assert not torch.equal(result.latents, source)


def test_path(translator, images):
    result = translator.translate(images, keep_path=True)
    assert result.path.shape == (STEPS + 1, 2, *translator.autoencoder.latent_shape)
    assert result.path_images.shape == (STEPS + 1, *images.shape)
    assert torch.equal(result.path[0], result.source_latents)
    assert torch.equal(result.path_images[0], translator.autoencoder.decode(result.source_latents))
    assert torch.equal(result.path_images[-1], result.images)
    assert torch.equal(result.images, translator.translate(images).images)


def test_settings_can_be_overridden(translator, images):
    source = translator.autoencoder.encode(images)
    other = LangevinSampler(LangevinConfig(steps=2, step_size=0.5)).sample(translator.energy, source)
    assert torch.equal(translator.translate(images, steps=2, step_size=0.5).latents, other.latents)
    assert translator.sampler.config.steps == STEPS
    with pytest.raises(UserError, match="step_size"):
        translator.translate(images, step_size=-1.0)
    with pytest.raises(UserError, match="steps"):
        translator.translate(images, steps=-1)


@pytest.mark.parametrize(
    ("strength", "below", "fraction", "ran"),
    [(0.0, 0, 0.0, 0), (0.25, 1, 0.0, 1), (0.4, 1, 0.6, 2), (0.9, 3, 0.6, 4), (1.0, STEPS, 0.0, STEPS)],
)
def test_strength_is_a_position_on_the_path(translator, images, strength, below, fraction, ran):
    full = translator.translate(images, keep_path=True).path
    expected = full[below].lerp(full[min(below + 1, STEPS)], fraction)
    part = translator.translate(images, strength=strength, keep_path=True)
    assert len(part.path) == ran + 1
    torch.testing.assert_close(part.latents, expected)
    assert torch.equal(part.path[-1], part.latents)
    brief = translator.translate(images, strength=strength)
    assert torch.equal(brief.latents, part.latents)
    assert torch.equal(brief.shift, part.shift)


def test_partial_step_counts_partially_in_the_shift(translator, images):
    one, two = (translator.translate(images, steps=n).shift for n in (1, 2))
    torch.testing.assert_close(translator.translate(images, strength=0.4).shift, one.lerp(two, 0.6))


def test_rounding_costs_no_step(translator, images):
    latents = translator.autoencoder.encode(images)
    assert 0.07 * 100 > 7
    assert len(translator.transport(latents, steps=100, strength=0.07, keep_path=True).path) == 8


def test_strength_moves_monotonically(translator, images):
    distances = [
        (r.latents - r.source_latents).norm().item()
        for r in (translator.translate(images, strength=s) for s in (0.1, 0.3, 0.55, 0.8, 1.0))
    ]
    assert distances == sorted(distances) and distances[0] > 0


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan")])
def test_strength_out_of_range(translator, images, strength):
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        translator.translate(images, strength=strength)


@pytest.mark.parametrize("by_step", [False, True])
def test_noise_is_the_same_at_any_strength(autoencoder, energy, images, by_step):
    """A partial chain sees the draws that the whole chain saw at the same steps."""
    noisy = Translator(
        autoencoder, energy, LangevinSampler(LangevinConfig(steps=STEPS, step_size=2.0, noise_scale=0.3))
    )

    def random():
        if not by_step:
            return {"generator": draw()}
        shape = (2, *autoencoder.latent_shape)
        return {"noise": lambda step: torch.randn(shape, generator=draw(step))}

    full = noisy.translate(images, keep_path=True, **random()).path
    part = noisy.translate(images, strength=0.9, **random())
    torch.testing.assert_close(part.latents, full[3].lerp(full[4], 0.6))
    with pytest.raises(ValueError, match="exactly one"):
        noisy.translate(images)


def test_decoder_noise_stays_the_same_along_the_path(translator, images):
    frames = translator.translate(images, keep_path=True, decoder_generator=draw()).path_images
    result = translator.translate(images, keep_path=True)
    assert not torch.equal(frames, result.path_images)
    for frame, latents in zip(frames, result.path, strict=True):
        assert torch.equal(frame, translator.autoencoder.decode(latents, generator=draw()))
    noise = [torch.randn(2, *shape, generator=draw(7)) for shape in translator.autoencoder.noise_shapes()]
    given = translator.translate(images, decoder_noise=noise).images
    assert torch.equal(given, translator.autoencoder.decode(result.latents, noise=noise))


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_frames_come_one_by_one(translator, images, strength):
    noise = [torch.randn(2, *shape, generator=draw(7)) for shape in translator.autoencoder.noise_shapes()]
    frames = []
    result = translator.translate(images, strength=strength, decoder_noise=noise, on_frame=frames.append)
    kept = translator.translate(images, strength=strength, decoder_noise=noise, keep_path=True)
    # A kept path may lie in memory in another order, in which convolutions round in another way.
    torch.testing.assert_close(torch.stack(frames), kept.path_images, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.images, frames[-1]) and torch.equal(result.shift, kept.shift)
    assert torch.equal(result.images, translator.translate(images, strength=strength, decoder_noise=noise).images)
    assert result.path is None and result.path_images is None
    drawn = []
    translator.translate(images, strength=strength, decoder_generator=draw(), on_frame=drawn.append)
    kept = translator.translate(images, strength=strength, decoder_generator=draw(), keep_path=True)
    torch.testing.assert_close(torch.stack(drawn), kept.path_images, rtol=1e-5, atol=1e-6)
    shared = draw()
    with pytest.raises(ValueError, match="a generator each"):
        translator.translate(images, generator=shared, decoder_generator=shared, on_frame=frames.append)


def test_bf16_lowers_the_networks_and_nothing_else(autoencoder, energy, images):
    low = Translator(autoencoder, energy, LangevinSampler(LangevinConfig(steps=STEPS, step_size=2.0)))
    full = low.translate(images, keep_path=True)
    low.precision = "bf16"
    found = low.translate(images, keep_path=True)
    for name in ("images", "latents", "source_latents", "shift", "path", "path_images"):
        assert getattr(found, name).dtype == torch.float32
    assert not torch.equal(found.images, full.images)
    torch.testing.assert_close(found.images, full.images, atol=0.1, rtol=0.1)
    assert low.decode(full.latents).dtype == low.encode(images).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert low.translate(images, strength=0.9, keep_path=True).path.dtype == torch.float32


def test_decoder_noise_belongs_to_the_place(translator):
    """VQ-VAE-2 has noise maps, but translations are decoded without; ALAE's are drawn, each for its own place."""
    assert translator.autoencoder.noise_shapes() and translator.autoencoder.decoder_noise(0, range(3)) is None
    torch.manual_seed(0)
    alae = build_autoencoder(AUTOENCODERS.get("alae").tiny).requires_grad_(False)
    maps = alae.decoder_noise(5, range(4))
    assert [tuple(m.shape) for m in maps] == [(4, *shape) for shape in alae.noise_shapes()]
    again = alae.decoder_noise(5, torch.tensor([2, 7]))
    for one, two in zip(maps, again, strict=True):
        assert torch.equal(one[2], two[0]) and not torch.equal(one[0], one[1]) and not torch.equal(one[1], two[1])
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], alae.decoder_noise(6, range(4))[0])


def test_other_latents_are_refused(autoencoder):
    sampler = LangevinSampler(LangevinConfig(steps=1, step_size=1.0))
    with pytest.raises(UserError, match=r"\(5,\)"):
        Translator(autoencoder, build_energy(MLPEnergyConfig(hidden=4), (5,)), sampler)


# Folders


def save(tmp_path, autoencoder, energy, **extra):
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    energy.save_pretrained(tmp_path / "energy", **extra)
    return tmp_path / "autoencoder", tmp_path / "energy"


def test_load_translator(tmp_path, translator, images):
    folders = save(
        tmp_path,
        translator.autoencoder,
        translator.energy,
        autoencoder_fingerprint=translator.autoencoder.fingerprint(),
        langevin={"steps": STEPS, "step_size": 2.0},
    )
    (loaded,) = load_translators(*folders)
    assert loaded.sampler.config == translator.sampler.config
    assert torch.equal(loaded.translate(images).images, translator.translate(images).images)


def test_energy_of_another_autoencoder_is_refused(tmp_path, autoencoder, energy):
    folders = save(tmp_path, autoencoder, energy, autoencoder_fingerprint="0123456789abcdef", langevin={})
    with pytest.raises(UserError, match=f"0123456789abcdef.*{autoencoder.fingerprint()}"):
        load_translators(*folders)


def test_incomplete_energy_folder_is_refused(tmp_path, autoencoder, energy):
    with pytest.raises(UserError, match=r"autoencoder_fingerprint\n.*extra\.langevin"):
        load_translators(*save(tmp_path, autoencoder, energy))
    extra = {"autoencoder_fingerprint": autoencoder.fingerprint(), "langevin": {"steps": 2, "step": 1.0}}
    with pytest.raises(UserError, match=r"extra\.langevin: step_size: required"):
        load_translators(*save(tmp_path, autoencoder, energy, **extra))
