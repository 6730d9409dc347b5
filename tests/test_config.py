"""Configuration: strict keys, bases, overrides, and every problem at once."""

from pathlib import Path

import pytest
import yaml

from letit_dist.config import as_tree, differences, load_config, parse_config, read_tree, to_yaml
from letit_dist.errors import UserError
from letit_dist.schemas import PretrainConfig, TrainEnergyConfig

CONFIGS = Path(__file__).parent.parent / "configs"
DEBUG = CONFIGS / "debug" / "vqvae2.yaml"


def problems(error) -> list[str]:
    return str(error.value).splitlines()


@pytest.mark.parametrize("path", sorted([*CONFIGS.glob("debug/vq*.yaml"), *CONFIGS.glob("pretrain/*.yaml")]), ids=str)
def test_shipped_pretraining_configs_load(path):
    config = load_config(PretrainConfig, path)
    assert config.recipe.problems(config.autoencoder, config.training) == []
    assert path.read_text().startswith("# "), "a config opens with what it is for"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("energy/*.yaml")), ids=str)
def test_shipped_energy_configs_load(path):
    between = path.name == "domains.yaml"
    given = ["autoencoder=a", *(["data.domains=[s, t, u]"] if between else ["data.source=s", "data.target=t"])]
    assert load_config(TrainEnergyConfig, path, given).recipe.kind == "latent_energy"


def test_base_is_merged_and_overrides_win():
    config = load_config(PretrainConfig, DEBUG, ["training.batch=8", "recipe.optimizer.learning_rate=1e-4"])
    assert config.autoencoder.codes == 256, "from configs/base/vqvae2.yaml"
    assert config.autoencoder.channels == 48, "from the file itself"
    assert config.training.batch == 8
    assert config.recipe.optimizer.learning_rate == 1e-4, "1e-4 is a number, whatever YAML 1.1 says"


def test_all_problems_at_once_with_file_key_and_nearest_name():
    with pytest.raises(UserError) as error:
        load_config(
            PretrainConfig,
            DEBUG,
            ["training.bach=3", "autoencoder.kid=1", "training.images=-5", "recipe.kind=vqvae", "intervals.keep=1"],
        )
    lines = problems(error)
    assert any("command line: training.bach: unknown key, did you mean 'batch'?" in line for line in lines)
    assert any("autoencoder.kid: unknown key, did you mean 'kind'?" in line for line in lines)
    assert any("training.images" in line and "-5" in line for line in lines)
    assert any("recipe.kind" in line and "did you mean 'vqvae2'" in line for line in lines)
    assert any("intervals.keep" in line for line in lines)
    assert len(lines) == 5


def test_a_problem_names_the_file_it_comes_from(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"training": {"images": 10, "batch": 2, "sede": 1}}))
    top = tmp_path / "top.yaml"
    top.write_text("base: base.yaml\nintervals: {report: 1, samples: 1, checkpoint: 1}\n")
    with pytest.raises(UserError) as error:
        load_config(PretrainConfig, top)
    assert any(
        line.startswith(f"{base}: training.sede") or "base.yaml: training.sede" in line for line in problems(error)
    )
    assert any("autoencoder: required" in line for line in problems(error))


def test_another_kind_drops_what_the_base_said_about_the_old_one(tmp_path):
    (tmp_path / "base.yaml").write_text("energy: {kind: conv, multiplier: 2}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nenergy: {kind: mlp, hidden: 8}\n")
    tree, _ = read_tree(tmp_path / "top.yaml")
    assert tree["energy"] == {"kind": "mlp", "hidden": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "given twice"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "expected keys and values"),
    ],
)
def test_broken_files(tmp_path, text, expected):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        load_config(PretrainConfig, path)


def test_missing_file_names_the_nearest():
    with pytest.raises(UserError, match=r"no such file.*did you mean .*vqvae2\.yaml"):
        load_config(PretrainConfig, CONFIGS / "debug" / "vqvae.yaml")


def test_circular_bases(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="circle"):
        read_tree(tmp_path / "a.yaml")


@pytest.mark.parametrize("override", ["training.batch", "=3", "training.batch=[1"])
def test_unreadable_overrides(override):
    with pytest.raises(UserError, match="override"):
        load_config(PretrainConfig, DEBUG, [override])


def test_resolution_must_fit_the_stride():
    with pytest.raises(UserError, match=r"autoencoder.resolution.*divisible by 8"):
        load_config(PretrainConfig, DEBUG, ["autoencoder.resolution=100"])


def test_options_without_effect_are_refused():
    with pytest.raises(UserError, match="betas and eps have no effect with kind sgd"):
        load_config(PretrainConfig, DEBUG, ["recipe.optimizer.kind=sgd", "recipe.optimizer.betas=[0.5,0.9]"])


def test_same_folder_on_both_sides_is_refused():
    path = next(iter(sorted(CONFIGS.glob("energy/*.yaml"))))
    with pytest.raises(UserError, match="same folder"):
        load_config(TrainEnergyConfig, path, ["autoencoder=a", "data.source=s", "data.target=s"])


def test_round_trip_through_yaml():
    config = load_config(PretrainConfig, DEBUG)
    again = parse_config(PretrainConfig, yaml.safe_load(to_yaml(config)))
    assert again == config
    assert differences(as_tree(config), as_tree(again)) == []


def test_differences_name_the_leaf():
    a = as_tree(load_config(PretrainConfig, DEBUG))
    b = as_tree(load_config(PretrainConfig, DEBUG, ["training.seed=7"]))
    assert differences(a, b) == ["training.seed: 0 -> 7"]
