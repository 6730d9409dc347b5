"""Features of images over ranks, resumed, stored, and refused where they are of something else."""

import pytest
import torch
from small_inception import pictures

from letit_dist.errors import UserError
from letit_dist.evaluation import features
from letit_dist.evaluation.features import (
    SLICE,
    assemble,
    extract_share,
    gather_features,
    reuse,
    stamp_of,
    store,
)
from letit_dist.evaluation.image_sets import open_image_set

pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_image_set(pictures(tmp_path_factory.mktemp("images") / "a", 2 * SLICE + 3))


@pytest.fixture(scope="module")
def whole(images, inception):
    return assemble([extract_share(images, inception)], stamp_of(images, inception))


def test_any_number_of_ranks_gives_the_same_bits(images, inception, whole):
    shares = [extract_share(images, inception, rank=rank, world=2) for rank in range(2)]
    assert [sorted(share) for share in shares] == [[0, 2], [1]]
    assert torch.equal(assemble(shares[::-1], whole.stamp).values, whole.values)
    assert len(whole) == 2 * SLICE + 3
    # The last slice was filled up, and nothing of that is left: an image alone has the same features.
    last = inception(images.read([len(images) - 1])[0])["features"]
    torch.testing.assert_close(whole.values[-1:], last)


def test_a_rank_that_fails_tells_the_others(images, inception, tmp_path):
    class Broken:
        label, stamp, split = "x", "y", None

        def __len__(self):
            return 4

        def read(self, rows):
            raise UserError("picture 3 is broken")

    with pytest.raises(UserError, match=r"^picture 3 is broken$"):
        gather_features(Broken(), inception, lambda mine: [{}, mine, mine])


def test_resumes_where_it_stopped(images, inception, whole, tmp_path):
    class Interrupted(type(images)):
        def __init__(self, stop):
            self.__dict__ |= images.__dict__
            self.stop, self.asked = stop, []

        def read(self, rows):
            if rows[0] // SLICE == self.stop:
                raise KeyboardInterrupt
            self.asked.append(rows[0] // SLICE)
            return super().read(rows)

    keep = features.working_folder(tmp_path, whole.stamp)
    with pytest.raises(KeyboardInterrupt):
        extract_share(Interrupted(1), inception, keep=keep)
    assert [p.name for p in keep.iterdir()] == ["000000.safetensors"]
    again = Interrupted(None)
    found = assemble([extract_share(again, inception, keep=keep)], whole.stamp)
    assert again.asked == [1, 2] and torch.equal(found.values, whole.values)
    # One that a kill cut short is made again, and so are those of other data, which have another folder.
    (keep / "000001.safetensors").write_bytes((keep / "000001.safetensors").read_bytes()[:50])
    repaired = Interrupted(None)
    found = assemble([extract_share(repaired, inception, keep=keep)], whole.stamp)
    assert repaired.asked == [1] and torch.equal(found.values, whole.values)
    assert features.working_folder(tmp_path, {**whole.stamp, "data": "other"}) != keep


def test_stored_features_are_used_when_they_match_and_refused_otherwise(whole, tmp_path):
    assert reuse(tmp_path / "ref", whole.stamp) is None
    store(whole, tmp_path / "ref")
    assert torch.equal(reuse(tmp_path / "ref", whole.stamp).values, whole.values)
    for name in ("weights", "data", "layer", "resize"):
        with pytest.raises(UserError, match=f"stored features differ, {name}: .* -> 'other'"):
            reuse(tmp_path / "ref", {**whole.stamp, name: "other"})
    config = tmp_path / "ref/config.json"
    config.write_text(config.read_text().replace(whole.stamp["data"], "0123"))
    with pytest.raises(UserError, match="one of the two files was edited"):
        reuse(tmp_path / "ref", whole.stamp)
