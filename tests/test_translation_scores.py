"""Scores of translations beyond the first judge: kept attributes, LPIPS, decoded FID and KID, memory."""

import functools
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from figure_runs import make_runs, opened
from programs import STYLES, files, run, shared_chain

from letit_dist.data.reader import ShardDataset
from letit_dist.data.transforms import encode, to_images
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError
from letit_dist.evaluation import extractors
from letit_dist.evaluation.attributes import Judge, judge_images, read_examples, read_pixels
from letit_dist.evaluation.decoded import DecodedFidelity, HeldImages, decode_again
from letit_dist.evaluation.extractors import Extractor
from letit_dist.evaluation.frechet import frechet_distance
from letit_dist.evaluation.kept import Attribute, load_or_train_keeper, read_column
from letit_dist.evaluation.scoring import score_translations
from letit_dist.evaluation.weights import FILES


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(folder, notes, seed=0, side=32):
    """Shards of noise, dark on the left or on the right as the note says, redder for a higher domain."""
    with ShardWriter(folder, meta={"resolution": side}) as writer:
        for number, (domain, note) in enumerate(notes):
            noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1000 * seed + number)) * 60
            pixels = noise + torch.tensor([60.0 + 120 * domain, 90, 60]).view(3, 1, 1)
            half = slice(0, side // 2) if note.get("dark") in ("left", 0.1) else slice(side // 2, side)
            pixels[:, :, half] -= 50
            content = {"png": encode(pixels.clamp(0, 255).to(torch.uint8)), "json": json.dumps(note).encode()}
            writer.write(f"image-{number:03d}", content)
    return ShardDataset([folder])


def sides_of(count, domain):
    return [
        (domain, {"dark": ("left", "right")[number % 3 == 0], "file": f"{number:06d}.png"}) for number in range(count)
    ]


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dark")
    return [pack(folder / str(d), sides_of(60, d), seed=d) for d in (0, 1)]


# Columns


def test_columns_are_read_from_the_metadata(tmp_path):
    notes = [(0, {"a": {"b": 1, "c": "x"}, "a.d": True}), (0, {"a": {"b": 2, "c": "y"}, "a.d": False})]
    shards = pack(tmp_path / "s", notes)
    assert read_column(shards, "a.b") == [1, 2] and read_column(shards, "a.c") == ["x", "y"]
    assert read_column(shards, "a.d") == [True, False]
    for name in ("a", "a.x", "a.b.c", "x"):
        with pytest.raises(
            UserError, match=rf"--keep {name}: no such value for .*image-000 \(it has a\.b, a\.c, a\.d\)"
        ):
            read_column(shards, name)


def test_columns_are_read_from_a_table_by_the_file(domains, tmp_path):
    table = tmp_path / "list_attr_celeba.txt"
    rows = "".join(f"{n:06d}.jpg {1 if n % 2 else -1} 1\n" for n in range(60))
    table.write_text(f"60\nSmiling Young\n{rows}")
    assert read_column(domains[0], "Smiling", table) == [n % 2 == 1 for n in range(60)]
    with pytest.raises(UserError, match=r"--keep Smilin: .*has Smiling, Young, did you mean Smiling\?"):
        read_column(domains[0], "Smilin", table)
    table.write_text("2\nSmiling Young\n000000.jpg 1 1\n000001.jpg 1 1\n")
    with pytest.raises(UserError, match=r"--keep Young: no such value for .*image-002 \(.*celeba\.txt\)"):
        read_column(domains[0], "Young", table)


def test_classes_and_numbers():
    words = Attribute.fit("w", [["a", "b", "a"], ["b", "a"]])
    assert words.classes == ("a", "b") and words.codes(["b", "a"]).tolist() == [1, 0]
    flags = Attribute.fit("f", [[True, False], [False, True]])
    assert flags.classes == ("False", "True") and flags.codes([True, False]).tolist() == [1, 0]
    numbers = Attribute.fit("n", [[i / 30 for i in range(15)], [str(i / 30) for i in range(15, 31)]])
    assert numbers.cut == 0.5 and numbers.codes(["0.9", 0.2, 0.5]).tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="n: 'x' is no number, others are"):
        numbers.codes(["0.1", "x"])
    with pytest.raises(UserError, match="w: test images have 'c', training has a, b"):
        words.codes(["a", "c"])
    with pytest.raises(UserError, match="w: all training images of the target have 'b': nothing to keep there"):
        Attribute.fit("w", [["a", "b"], ["b", "b"]])
    with pytest.raises(UserError, match="w: 21 different values, at most 20"):
        Attribute.fit("w", [[f"x{i}" for i in range(21)], ["x1", "x2"]])


# The second judge


@pytest.fixture(scope="module")
def keeper(domains, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keeper")
    return load_or_train_keeper(["dark"], domains, read_examples(*domains), folder, steps=30, batch=16)


def test_the_second_judge_sees_what_was_kept(keeper, tmp_path):
    test = pack(tmp_path / "test", sides_of(30, 0), seed=7)
    images, truth = to_images(read_pixels(test)), keeper.truth(test)
    assert truth.flatten().tolist() == [number % 3 == 0 for number in range(30)]
    assert keeper.scores(images, truth) == {"kept_accuracy": 1.0, "kept_dark": 1.0}
    assert keeper.scores(images, truth, chunk=7)["kept_dark"] == 1.0
    redder = (images + torch.tensor([0.9, 0, 0]).view(3, 1, 1)).clamp(-1, 1)
    assert keeper.scores(redder, truth)["kept_dark"] > 0.9
    assert keeper.scores(images.flip(-1), truth)["kept_dark"] == 0
    # A third of them mirrored: a third is lost.
    third = torch.arange(30) % 3 == 0
    mixed = torch.where(third.view(-1, 1, 1, 1), images.flip(-1), images)
    assert keeper.scores(mixed, truth)["kept_accuracy"] == pytest.approx(2 / 3)


def test_the_second_judge_is_kept_for_the_same_question_only(domains, tmp_path, monkeypatch):
    examples = read_examples(*domains)

    def state(names=("dark",), **settings):
        found = load_or_train_keeper(names, domains, examples, tmp_path / "k", **{"steps": 1, **settings})
        assert not found.training and not any(p.requires_grad for p in found.parameters())
        return found.state_dict()["network.0.weight"]

    first, kept = state(), files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("letit_dist.evaluation.kept.learn", pytest.fail)
        assert torch.equal(state(), first) and files(tmp_path) == kept
    assert not torch.equal(state(seed=1), first) and not torch.equal(state(steps=2), first)
    table = tmp_path / "table.txt"
    table.write_text("60\ndark\n" + "".join(f"{n:06d}.jpg {1 if n % 2 else -1}\n" for n in range(60)))
    assert not torch.equal(state(table=table), first)


def test_factors_are_kept_on_their_side_of_the_middle(monkeypatch):
    judge = Judge(("x", "y"))
    seen = torch.tensor([[0.1, 0.9], [0.4, 0.2], [0.8, 0.6], [0.6, 0.2]])
    monkeypatch.setattr(judge, "factors", lambda images: seen)
    factors = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.7, 0.3], [0.9, 0.1]])
    images = torch.zeros(4, 3, 64, 64)
    found = judge_images(judge.eval(), images, factors, torch.tensor([0.5, 0.5]))
    assert found["kept_accuracy"] == 6 / 8
    assert "kept_accuracy" not in judge_images(judge, images, factors)


# FID and KID of what was decoded


class Colours(torch.nn.Module):
    """Mean colours and a corner: enough to tell sets apart."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255))

    def forward(self, pixels):
        return (torch.cat([pixels.float().mean((2, 3)), pixels[:, :, 3, 3].float()], 1) * self.scale,)


def colours(valid=False):
    return Extractor(
        "compat", Colours(), {"extractor": "c", "layer": "6", "resize": "none", "weights": "w", "valid": valid}
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, fruit_latents):
    return make_runs(tmp_path_factory.mktemp("runs"), fruit_latents)


def test_held_images_are_what_a_file_would_hold():
    images = draw(5, 3, 8, 8).clamp(-1, 1)
    held = HeldImages("x", images)
    assert held.read([3, 1])[0].dtype == torch.uint8 and len(held) == 5
    pixels, _ = held.read(range(5))
    assert torch.equal(pixels, HeldImages("y", to_images(pixels)).read(range(5))[0])
    assert held.pixels == (8, 8)
    assert held.stamp != HeldImages("x", images.flip(0)).stamp


def test_decoded_fidelity_separates_transport_from_the_autoencoder(runs, fruit_shards):
    translator = opened(runs).translator
    real = read_pixels(ShardDataset([fruit_shards / "orange/train"]))
    lines = []
    fidelity = DecodedFidelity(translator, real, colours(), batch=7, say=lines.append)
    again = decode_again(translator, real, batch=5, seed=0)
    exact = fidelity.of("x", again)
    assert abs(exact["fid_decoded"]) < 1e-6 < exact["fid_real"]
    values = [
        Colours()(HeldImages("x", images).read(range(len(images)))[0])[0].detach()
        for images in (again, to_images(real))
    ]
    assert exact["fid_real"] == pytest.approx(frechet_distance(*values), rel=1e-4)
    assert lines == [
        f"decoded real targets against real ones: FID {exact['fid_real']:.4g}, KID {exact['kid_real']:.4g}"
    ]
    itself = fidelity.of("x", to_images(real))
    assert abs(itself["fid_real"]) < 1e-6 < itself["fid_decoded"]
    few = fidelity.of("x", again[:9])
    assert few["counts"] == [9, 24] and few["kid_subset_size"] == 9 and few["valid"] is False
    assert few["fid_real_spread"] > 0 and few["fid_real_equal_n"] != few["fid_real"]
    with pytest.raises(UserError, match="need 2 real images of the target, got 1"):
        DecodedFidelity(translator, real[:1], colours())


def test_scores_hold_all_of_it(runs, fruit_shards):
    translator = opened(runs).translator
    sides = [ShardDataset([fruit_shards / style / "train"]) for style in STYLES]
    examples, test = read_examples(*sides), ShardDataset([fruit_shards / "apple/test"])
    judge = Judge(examples.names).eval().requires_grad_(False)
    far = torch.nn.Conv2d(3, 1, 1)

    class Gap(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.far = far

        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    given = {"perceptual": {"alex": Gap()}, "extractor": colours(), "batch": 3, "say": lambda _: None}
    scores = score_translations(translator, judge, examples, test, **given)
    rows = {row["method"]: row for row in scores.rows}
    pixels = to_images(read_pixels(test))
    apart = (decode_again(translator, read_pixels(test), batch=3, seed=0) - pixels).abs().mean()
    assert rows["reconstruction"]["lpips_alex"] == pytest.approx(float(apart), rel=1e-5)
    assert "lpips_alex" not in rows["real"] and "mib" not in rows["real"]
    assert rows["real"]["fid_real"] > 0 and all(row["valid"] is False for row in scores.rows)
    header = [cell.strip() for cell in scores.table(whole=True).splitlines()[0].split("|")[1:-1]]
    assert header[:2] == ["method", "valid"] and {"kept_accuracy", "lpips_alex", "fid_decoded", "mib"} <= set(header)
    held = sum(t.numel() * t.element_size() for t in translator.autoencoder.state_dict().values()) / 2**20
    assert held < rows["reconstruction"]["mib"] < rows["latent energy"]["mib"] < 50
    larger = score_translations(translator, judge, examples, test, **{**given, "extractor": None, "batch": 8})
    assert larger.rows[1]["mib"] > rows["reconstruction"]["mib"] and "valid" not in larger.table()
    other = read_pixels(ShardDataset([fruit_shards / "orange/test"]))
    moved = score_translations(translator, judge, examples, test, real=other, **given)
    assert moved.rows[0]["counts"] == [8, 8] and rows["real"]["counts"] == [8, 24]


# The program


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Random weights in the published files' format, under digits of their own."""
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("lpips")
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    file = FILES["lpips-squeeze"]
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / file.name)
    digest = hashlib.sha256((folder / file.name).read_bytes()).hexdigest()
    monkeypatch.setitem(FILES, "lpips-squeeze", replace(file, sha256=digest[:8]))
    return folder


def test_the_program_with_everything(tmp_path_factory, tmp_path, weights, monkeypatch):
    pytest.importorskip("torch_fidelity")
    # The first layers of the network alone: all of it takes minutes here.
    shallow = functools.partial(extractors.open_extractor, layer="64")
    monkeypatch.setattr(extractors, "open_extractor", shallow)
    chain = shared_chain(tmp_path_factory)
    train = [chain.images(style) for style in STYLES]
    command = ["eval/translation.py", chain.energy(), "--train", *train, "--test", chain.images("apple", "test")]
    command += ["--judge-steps", 2, "--out", tmp_path / "out", "--weights", weights, "--baselines", "mean-shift"]
    command += ["--lpips", "alex", "squeeze", "--keep", "factors.content.x", "factors.content.size"]
    command += ["--extractor", "compat", "--random-weights", "--real", chain.images("orange", "test")]
    done = run(*command)
    assert done.code == 0, done.err
    assert "lpips_alex is left out" in done.err and "lpips_squeeze is" not in done.err
    assert "--random-weights: FID and KID are valid for nothing" in done.err
    rows = [json.loads(line) for line in (tmp_path / "out/translation.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["real", "reconstruction", "mean shift", "latent energy"]
    for row in rows:
        assert row["valid"] is False and row["weights"].startswith("random ") and row["counts"] == [8, 8]
        mean = (row["kept_factors.content.x"] + row["kept_factors.content.size"]) / 2
        assert row["kept_accuracy"] == pytest.approx(mean)
        for name in ("fid_real", "kid_real", "fid_decoded", "kid_decoded"):
            assert {name, f"{name}_equal_n", f"{name}_spread"} <= set(row)
    assert all(row["lpips_squeeze"] > 0 and row["mib"] > 0 for row in rows[1:])
    assert rows[1]["fid_decoded"] != rows[1]["fid_real"]
    kept = files(tmp_path / "out/judge", tmp_path / "out/judge-kept")
    assert len(kept) == 4 and run(*command, "--lpips").code == 0
    assert files(tmp_path / "out/judge", tmp_path / "out/judge-kept") == kept


def test_options_without_effect_are_refused(tmp_path):
    base = ("eval/translation.py", "x", "--train", "a", "b", "--test", "c")
    for given, message in (
        (("--table", "t"), "--table needs --keep"),
        (("--real", "r"), "--real needs --extractor"),
        (("--random-weights",), "--random-weights needs --extractor"),
    ):
        done = run(*base, *given)
        assert done.code == 2 and done.errors == [f"error: {message}"]
