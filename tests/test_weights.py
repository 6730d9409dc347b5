"""The weight files of metrics: found, refused, recognised, and never fetched."""

import hashlib
import pickle
from dataclasses import replace

import pytest
import torch
from programs import run
from safetensors.torch import save_file

from letit_dist.errors import UserError
from letit_dist.evaluation import weights
from letit_dist.evaluation.weights import FILES, find_weights, import_weights, read_state_dict, weights_folder


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Real bytes whose hash the table knows: (folder, file, bytes)."""
    data = b"the weights of a network"
    digest = hashlib.sha256(data).hexdigest()
    file = replace(FILES["inception"], sha256=digest[:8], address=f"https://example.org/net-{digest[:8]}.pth")
    monkeypatch.setitem(FILES, "inception", file)
    return tmp_path / "weights", file, data


def test_names_carry_the_first_digits_of_the_hash():
    assert FILES["inception"].name == "weights-inception-2015-12-05-6726825d.pth"
    assert {key: FILES[key].sha256 for key in ("inception", "lpips-vgg")} == {
        "inception": "6726825d",
        "lpips-vgg": "397923af",
    }


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LETIT_WEIGHTS", str(tmp_path / "here"))
    assert weights_folder() == tmp_path / "here" and weights_folder(tmp_path) == tmp_path
    monkeypatch.delenv("LETIT_WEIGHTS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_folder() == tmp_path / ".cache/letit_dist/weights"


def test_a_missing_file_says_where_from_and_where_to(known):
    folder, file, _ = known
    with pytest.raises(UserError) as error:
        find_weights("inception", folder)
    text = str(error.value)
    assert file.address in text and str(folder) in text and file.name in text and len(text.splitlines()) == 1


def test_a_file_is_hashed_before_it_is_used(known):
    folder, file, data = known
    folder.mkdir()
    (folder / file.name).write_bytes(data)
    assert find_weights("inception", folder) == (folder / file.name, hashlib.sha256(data).hexdigest())
    (folder / file.name).write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"that of {file.name} begins {file.sha256}: cut short, or another file"):
        find_weights("inception", folder)


def test_import_knows_a_file_by_its_bytes(known, tmp_path):
    folder, file, data = known
    (tmp_path / "download(1).pth").write_bytes(data)
    import_weights([tmp_path / "download(1).pth"], folder)
    assert (folder / file.name).read_bytes() == data and [p.name for p in folder.iterdir()] == [file.name]
    # One stranger, and nothing is copied.
    (folder / file.name).unlink()
    (tmp_path / file.name).write_bytes(b"something else")
    with pytest.raises(UserError, match=rf"none of the known files, {file.name} begins {file.sha256}"):
        import_weights([tmp_path / "download(1).pth", tmp_path / file.name], folder)
    with pytest.raises(UserError, match="no such file"):
        import_weights([tmp_path / "absent"], folder)
    assert not list(folder.iterdir())


def test_the_heads_of_lpips_lie_in_its_package(tmp_path):
    pytest.importorskip("lpips")
    path, digest = find_weights("lpips-alex-head", tmp_path)
    assert path.name == "alex.pth" and digest.startswith(FILES["lpips-alex-head"].sha256)


def test_reading(tmp_path):
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        found = read_state_dict(tmp_path / name)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:300])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:60])
    (tmp_path / "empty.pth").touch()
    for name in ("cut.pth", "cut.safetensors", "empty.pth"):
        with pytest.raises(UserError, match="is damaged"):
            read_state_dict(tmp_path / name)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a state dict"):
        read_state_dict(tmp_path / "list.pth")


class Mischief:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_runs_no_code(tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Mischief(), protocol=2))
    with pytest.raises(UserError):
        read_state_dict(tmp_path / "bad.pth")
    assert "this ran" not in capsys.readouterr().out


def test_the_program(known, tmp_path):
    folder, file, data = known
    listed = run("eval/weights.py", "list", "--weights", folder)
    assert listed.code == 0 and file.address in listed.out and str(folder) in listed.out
    (tmp_path / "x").write_bytes(data)
    assert run("eval/weights.py", "import", tmp_path / "x", "--weights", folder).code == 0
    good = run("eval/weights.py", "check", "--weights", folder)
    line = next(line for line in good.out.splitlines() if "| inception " in line)
    assert good.code == 0 and "good" in line
    (folder / file.name).write_bytes(b"x")
    bad = run("eval/weights.py", "check", "--weights", folder)
    assert bad.code == 1 and "another" in bad.out
    failed = run("eval/weights.py", "import", folder / file.name, "--weights", folder)
    assert failed.code == 2 and failed.err.startswith("error: ")


def test_nothing_here_can_download():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(weights.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith(("urllib", "requests", "http", "torch.hub")) for name in names)
