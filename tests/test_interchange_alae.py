"""Published ALAE checkpoints in and out: bit by bit, the key lists of the published networks, damaged files."""

import json
import os
import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from letit_dist.autoencoders.alae import ALAE, ALAEConfig
from letit_dist.errors import UserError
from letit_dist.interchange.alae import export_alae, import_alae

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "alae_checkpoint.pth"
KEYS = json.loads((GOLDEN / "alae_keys.json").read_text())["configs"]
NETWORKS = ("discriminator", "generator", "mapping_tl", "mapping_fl")


def raw() -> dict:
    return torch.load(CHECKPOINT, weights_only=True)


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for title, state in expected.items():
        assert set(found[title]) == set(state), title
        for key, tensor in state.items():
            assert found[title][key].dtype == tensor.dtype
            assert torch.equal(found[title][key], tensor), f"{title}.{key}"


def tiny(seed: int = 0) -> ALAE:
    torch.manual_seed(seed)
    model = ALAE(ALAE.tiny)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model


def saved(path: Path, change=None, **options) -> Path:
    """A tiny checkpoint, after `change` of its networks."""
    published = export_alae(tiny())
    if change is not None:
        # The twins are the same tensors: change one of them only.
        published["models"] = {title: dict(state) for title, state in published["models"].items()}
        change(published["models"])
    torch.save(published, path, **options)
    return path


def error_of(path: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        import_alae(path, **options)
    return str(error.value)


def test_golden_there_and_back(tmp_path):
    model = import_alae(CHECKPOINT)
    assert model.config == ALAEConfig(
        resolution=128, start_channels=4, max_channels=16, latent_dim=16, mapping_layers=3
    )
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    published = export_alae(model)
    assert published["auxiliary"] == {}
    assert_same_tensors(published["models"], raw()["models"])  # whose twins are equal
    torch.save(published, tmp_path / "back.pth")
    assert_same_tensors(torch.load(tmp_path / "back.pth", weights_only=True)["models"], raw()["models"])
    assert import_alae(tmp_path / "back.pth").fingerprint() == model.fingerprint()


def test_average_and_training_weights(tmp_path):
    published = raw()
    for network in NETWORKS:
        state = published["models"][f"{network}_s"]
        published["models"][f"{network}_s"] = {k: v if "blur" in k else v + 1 for k, v in state.items()}
    torch.save(published, tmp_path / "both.pth")
    average = import_alae(tmp_path / "both.pth")
    training = import_alae(tmp_path / "both.pth", weights="training")
    assert training.fingerprint() == import_alae(CHECKPOINT, weights="training").fingerprint()
    for name, tensor in training.state_dict().items():
        expected = tensor if name == "w_mean" else tensor + 1
        assert torch.equal(average.state_dict()[name], expected), name
    assert_same_tensors(export_alae(training, average)["models"], published["models"])
    # Each needs only its own half of the file.
    for weights, unused in (("average", ""), ("training", "_s")):
        half = {k: v for k, v in published["models"].items() if k not in {n + unused for n in NETWORKS}}
        torch.save({"models": half}, tmp_path / "half.pth")
        expected = average if weights == "average" else training
        assert import_alae(tmp_path / "half.pth", weights=weights).fingerprint() == expected.fingerprint()


def test_a_few_names_by_hand():
    model, published = import_alae(CHECKPOINT).state_dict(), raw()["models"]
    for ours, network, theirs in (
        ("encoder.from_rgb.5.weight", "discriminator_s", "from_rgb.0.from_rgb.weight"),
        ("encoder.blocks.0.conv2.weight", "discriminator_s", "encode_block.5.conv_2.weight"),
        ("generator.blocks.5.conv1.weight", "generator_s", "decode_block.5.conv_1.weight"),
        ("generator.blocks.2.styled2.noise", "generator_s", "decode_block.2.noise_weight_2"),
        ("critic.layers.2.bias", "mapping_tl_s", "map_blocks.2.bias"),
        ("mapping.layers.1.weight", "mapping_fl_s", "map_blocks.1.fc.weight"),
        ("w_mean", "dlatent_avg", "buff"),
    ):
        assert torch.equal(model[ours], published[network][theirs]), ours


@pytest.mark.parametrize("name", list(KEYS))
def test_published_networks_at_full_size(name):
    sizes = KEYS[name]["model_cfg"]
    torch.manual_seed(0)
    model = ALAE(
        ALAEConfig(
            resolution=2 ** (sizes["LAYER_COUNT"] + 1),
            start_channels=sizes["START_CHANNEL_COUNT"],
            max_channels=sizes["MAX_CHANNEL_COUNT"],
            latent_dim=sizes["LATENT_SPACE_SIZE"],
            mapping_layers=sizes["MAPPING_LAYERS"],
        )
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == KEYS[name]["parameters"]
    published = export_alae(model)["models"]
    expected = KEYS[name]["models"]
    assert set(published) == set(expected) | {f"{network}_s" for network in NETWORKS}
    for title, state in published.items():
        shapes = {key: entry[0] for key, entry in expected[title.removesuffix("_s")].items()}
        assert {key: list(tensor.shape) for key, tensor in state.items()} == shapes, title

    # The published coefficient and start of each parameter, which the export tells by its memory.
    coefficients, starts = {}, {}
    for network, state in expected.items():
        for key, (_, *rest) in state.items():
            if rest:
                coefficients[published[network][key].data_ptr()], starts[published[network][key].data_ptr()] = rest
    for path, parameter in model.named_parameters():
        module, _, own = path.rpartition(".")
        rate = getattr(model.get_submodule(module), "rates", {}).get(own, 1.0)
        assert rate == pytest.approx(coefficients.pop(parameter.data_ptr()), rel=1e-9), path
        start = starts[parameter.data_ptr()]
        if isinstance(start, str):
            assert torch.equal(parameter, torch.full_like(parameter, {"zeros": 0, "ones": 1}[start])), path
        else:  # both were measured on random numbers: six deviations of the difference
            assert parameter.std().item() == pytest.approx(start, rel=6 / parameter.numel() ** 0.5), path
    assert not coefficients


def later_names(models: dict) -> None:
    for old, new in (("mapping_tl", "mapping_d"), ("mapping_fl", "mapping_f")):
        for twin in ("", "_s"):
            models[new + twin] = models.pop(old + twin)


def in_parallel(models: dict) -> None:
    for title, state in models.items():
        models[title] = {f"module.{key}": tensor for key, tensor in state.items()}


def not_built(models: dict) -> None:
    models["mapping_tl"] = None


@pytest.mark.parametrize("change", [None, later_names, in_parallel, not_built])
@pytest.mark.parametrize("zipped", [True, False])
def test_spellings_of_the_same_file(tmp_path, change, zipped):
    """Files of the years when ALAE was published are not zip archives."""
    path = saved(tmp_path / "one.pth", change, _use_new_zipfile_serialization=zipped)
    back = import_alae(path)
    assert back.config == ALAE.tiny
    assert back.fingerprint() == tiny().fingerprint()


def test_other_precisions_stay(tmp_path):
    torch.save(export_alae(tiny().double()), tmp_path / "double.pth")
    assert import_alae(tmp_path / "double.pth").fingerprint() == tiny().double().fingerprint()
    torch.save(export_alae(tiny().bfloat16()), tmp_path / "half.pth")
    assert import_alae(tmp_path / "half.pth").fingerprint() == tiny().bfloat16().fingerprint()


def test_export_refuses_two_networks():
    other = ALAE(ALAE.tiny.model_copy(update={"mapping_layers": 3}))
    with pytest.raises(UserError, match=r"mapping_layers=3.* beside .*mapping_layers=2"):
        export_alae(tiny(), other)


# Keys


def test_every_wrong_key_is_named(tmp_path):
    def spoil(models):
        del models["generator_s"]["decode_block.1.conv_1.weight"]
        del models["dlatent_avg"]["buff"]
        models["discriminator_s"]["from_rgb.0.from_rgb.weight"] = torch.zeros(5, 3, 1, 1)
        models["discriminator_s"]["encode_block.1.blur.weight"] = torch.zeros(8, 1, 5, 5)
        models["mapping_fl_s"]["stray"] = torch.zeros(2)

    path = saved(tmp_path / "wrong.pth", spoil)
    assert error_of(path).splitlines() == [
        f"{path}: missing generator_s.decode_block.1.conv_1.weight (8, 8, 3, 3)",
        f"{path}: missing dlatent_avg.buff (6, 8)",
        f"{path}: unexpected mapping_fl_s.stray (2,)",
        f"{path}: discriminator_s.from_rgb.0.from_rgb.weight: expected shape (4, 3, 1, 1), got (5, 3, 1, 1)",
        f"{path}: discriminator_s.encode_block.1.blur.weight: expected shape (8, 1, 3, 3), got (8, 1, 5, 5)",
    ]


def test_any_one_missing_key_is_the_one_named(tmp_path):
    path = tmp_path / "wrong.pth"
    models = {title: state for title, state in export_alae(tiny())["models"].items() if not title.endswith("_s")}
    for title, state in models.items():
        for key in state:
            rest = {name: tensor for name, tensor in state.items() if name != key}
            torch.save({"models": {**models, title: rest}}, path)
            assert error_of(path, weights="training") == f"{path}: missing {title}.{key} {tuple(state[key].shape)}"


@pytest.mark.parametrize("entry", [0.0, float("nan")])
def test_another_blur_is_refused(tmp_path, entry):
    def spoil(models):
        for title, key in (("generator_s", "decode_block.2"), ("discriminator_s", "encode_block.0")):
            kernel = models[title][f"{key}.blur.weight"].clone()
            kernel[1, 0, 0, 0] = entry
            models[title][f"{key}.blur.weight"] = kernel

    path = saved(tmp_path / "wrong.pth", spoil)
    text = error_of(path)
    assert f"{path}: generator_s.decode_block.2.blur.weight: not the blur [1 2 1] x [1 2 1] / 16" in text
    assert "discriminator_s.encode_block.0.blur.weight" in text and len(text.splitlines()) == 2
    import_alae(path, weights="training")


def test_networks_that_do_not_belong_together(tmp_path):
    bigger = export_alae(ALAE(ALAE.tiny.model_copy(update={"resolution": 32})))["models"]
    path = saved(tmp_path / "wrong.pth", lambda models: models.update(generator_s=bigger["generator_s"]))
    assert "networks of different sizes: discriminator_s has 3 levels, generator_s 4" in error_of(path)
    path = saved(tmp_path / "wrong.pth", lambda models: models.update(dlatent_avg=bigger["dlatent_avg"]))
    assert error_of(path) == f"{path}: dlatent_avg.buff: expected shape (6, 8), got (8, 8)"


def test_networks_missing_and_unknown(tmp_path):
    def spoil(models):
        del models["generator_s"], models["dlatent_avg"]
        models["classifier"] = {"weight": torch.zeros(2)}

    path = saved(tmp_path / "wrong.pth", spoil)
    lines = error_of(path).splitlines()
    for part in ("missing network generator_s", "missing network dlatent_avg", "unexpected network classifier"):
        assert f"{path}: {part}" in lines
    assert "weights='training'" in lines[-1]
    path = saved(tmp_path / "wrong.pth", lambda models: models.update(mapping_f_s=models["mapping_fl_s"]))
    assert "models/mapping_f_s stands beside another mapping_fl_s" in error_of(path)
    path = saved(tmp_path / "wrong.pth", lambda models: models.update(generator=[1]))
    assert "models/generator: expected a state dict, found a list" in error_of(path)
    assert "known: average, training" in error_of(CHECKPOINT, weights="ema")


def test_other_sizes_are_refused(tmp_path):
    def only_one_level(models):
        for title, stems in (("discriminator_s", "from_rgb|encode_block"), ("generator_s", "to_rgb|decode_block")):
            models[title] = {k: v for k, v in models[title].items() if not re.match(rf"(?:{stems})\.[12]\.", k)}

    assert "power of two from 8 on" in error_of(saved(tmp_path / "wrong.pth", only_one_level))

    def empty(models):
        models.update({title: {} for title in models})

    assert "no published ALAE: no discriminator_s.from_rgb.0" in error_of(saved(tmp_path / "wrong.pth", empty))


# Files


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "other.pth"
    assert f"no such file: {path}" in error_of(path)
    torch.save({"epoch": 3}, path)
    assert "expected a dict with 'models', found a dict with keys epoch" in error_of(path)
    torch.save([torch.zeros(2)], path)
    assert "expected a dict with 'models', found a list" in error_of(path)
    for content in (b"no checkpoint", b"", b"\x80\x02", pickle.dumps({"models": {}}, 2), CHECKPOINT.read_bytes()[:-99]):
        path.write_bytes(content)
        assert f"{path} is damaged or not a file of torch.save" in error_of(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_files(tmp_path, zipped):
    whole = saved(tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped).read_bytes()
    path = tmp_path / "cut.pth"
    for end in (1, 10, 30, 100, 1000, 5000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:end])
        assert f"{path} is damaged or not a file of torch.save" in error_of(path), end


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path):
    published = export_alae(tiny())
    published["auxiliary"] = {"tracker": Touch(tmp_path / "made")}
    torch.save(published, tmp_path / "evil.pth")
    assert "(posix.mkdir), which is not read, because reading it can run any code" in error_of(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_statistics_of_the_published_training_are_passed_over(tmp_path, monkeypatch):
    """Its files hold objects of a class that nobody has who lacks its code."""
    tracker = types.ModuleType("tracker")
    tracker.RunningMeanTorch = type("RunningMeanTorch", (), {"__module__": "tracker"})
    means = tracker.RunningMeanTorch()
    means.values = [torch.zeros(1)]
    published = export_alae(tiny())
    optimizer = {"state": {0: {"step": 3, "exp_avg_sq": torch.zeros(2)}}, "param_groups": [{"lr": 0.0015}]}
    published["auxiliary"] = {"tracker": {"tracks": {"loss": means}}, "encoder_optimizer": optimizer}
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "tracker", tracker)
        torch.save(published, tmp_path / "whole.pth")
    assert import_alae(tmp_path / "whole.pth").fingerprint() == tiny().fingerprint()


def test_the_command_for_other_contents_works(tmp_path, monkeypatch):
    path = tmp_path / "whole.pth"
    torch.save({**export_alae(tiny()), "auxiliary": {"rate": np.float64(0.1)}}, path)
    text = error_of(path)
    assert "multiarray.scalar" in text
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"$', text)[1], {})
    assert import_alae(tmp_path / "weights.pth").fingerprint() == tiny().fingerprint()
