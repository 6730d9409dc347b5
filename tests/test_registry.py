import sys

import pytest

from letit_dist.errors import UserError
from letit_dist.registry import AUTOENCODERS, ENERGIES, RECIPES, Registry


def test_the_kinds_of_the_package_are_found_without_an_import():
    assert "vqvae2" in AUTOENCODERS.kinds() and {"conv", "mlp"} <= set(ENERGIES.kinds())
    assert {"vqvae2", "latent_energy"} <= set(RECIPES.kinds())
    assert RECIPES.get("latent_energy").__name__ == "LatentEnergyRecipe"
    assert AUTOENCODERS.kinds() == sorted(AUTOENCODERS.kinds())


def test_an_unknown_kind_is_answered_with_the_known_ones():
    with pytest.raises(UserError) as caught:
        AUTOENCODERS.get("vqvae")
    assert str(caught.value).startswith("unknown autoencoder kind 'vqvae', did you mean 'vqvae2'? (known: ")
    assert ", ".join(AUTOENCODERS.kinds()) in str(caught.value)


@pytest.mark.parametrize("kind", [["vqvae2"], {"a": 1}, None, 3, ""])
def test_a_kind_that_is_no_name_is_unknown_as_well(kind):
    with pytest.raises(UserError, match=r"^unknown energy kind .*\(known: conv, mlp\)$"):
        ENERGIES.get(kind)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two files, each with a class of its own kind."""
    folder = tmp_path / "shapes_of_this_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from letit_dist.registry import Registry\nSHAPES = Registry('shape', __name__)\n"
    )
    for name in ("circle", "square"):
        text = f"from shapes_of_this_test import SHAPES\n@SHAPES.register('{name}')\nclass Shape: pass\n"
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "shapes_of_this_test"
    for module in [name for name in sys.modules if name.startswith("shapes_of_this_test")]:
        del sys.modules[module]


def test_a_new_file_in_the_package_is_enough(package):
    shapes = __import__(package).SHAPES
    assert "shapes_of_this_test.circle" not in sys.modules
    assert shapes.kinds() == ["circle", "square"]
    assert shapes.get("square") is sys.modules["shapes_of_this_test.square"].Shape


def test_one_kind_has_one_class():
    registry = Registry("thing", "letit_dist.recipes")

    class First:
        pass

    assert registry.register("a")(First) is First
    registry.register("a")(First)  # the same file, imported again
    with pytest.raises(ValueError, match="two classes for thing kind 'a'"):

        @registry.register("a")
        class Second:
            pass

    # A copied file, in which the name of the class was kept too.
    copied = type(First.__name__, (), {"__qualname__": First.__qualname__, "__module__": "another.file"})
    with pytest.raises(ValueError, match="two classes"):
        registry.register("a")(copied)
