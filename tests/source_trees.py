"""Small trees of images, and what is found in them, for the tests of shards/pack.py's layouts."""

import io

from PIL import Image
from test_pack import noise, save

from letit_dist.data.sources import Request, find, open_source

CELEBA_ATTRIBUTES = "6\nSmiling Male Young\n" + "".join(
    f"{n:06d}.jpg {1 if n == 6 else -1}  {1 if n % 3 == 0 else -1} 1\n" for n in range(1, 7)
)


def images(folder, names, first=0):
    """Different pictures of 12 by 10 pixels."""
    for number, name in enumerate(names, first):
        save(noise(number, 10, 12), folder / name)


def encoded(number, format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(noise(number, 10, 12)).save(stream, format)
    return stream.getvalue()


def opened(folder, **request):
    """{subfolder: (domain, split, [names])}"""
    return {
        part.subfolder: (part.domain, part.split, [part.source.name(n) for n in range(len(part.source))])
        for part in open_source(str(folder), Request(**request))
    }


def counts(folder, **request):
    return {name: len(names) for name, (_, _, names) in opened(folder, **request).items()}


def notes(folder, **request):
    return [note for part in open_source(str(folder), Request(**request)) for note in part.notes]


def taken(spec):
    return find(str(spec)).layout.name


def celeba_tree(root):
    """CelebA as it is unpacked: six pictures with their attributes and the official partition."""
    images(root / "img_align_celeba", [f"{n:06d}.jpg" for n in range(1, 7)])
    (root / "Anno").mkdir()
    (root / "Anno/list_attr_celeba.txt").write_text(CELEBA_ATTRIBUTES)
    (root / "Eval").mkdir()
    (root / "Eval/list_eval_partition.txt").write_text("".join(f"{n:06d}.jpg {(n - 1) // 2}\n" for n in range(1, 7)))
    return root


def celebamask_tree(root):
    """CelebAMask-HQ of eight pictures, two of each sex for training and two for tests, by CelebA's split."""
    images(root / "CelebA-HQ-img", [f"{n}.jpg" for n in range(8)])
    signs = "".join(f"{n}.jpg  {1 if n % 2 else -1}\n" for n in range(8))
    (root / "CelebAMask-HQ-attribute-anno.txt").write_text(f"8\nMale\n{signs}")
    mapping = "".join(f"{n} {n} {n + 1:06d}.jpg\n" for n in range(8))
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text(f"idx orig_idx orig_file\n{mapping}")
    (root / "list_eval_partition.txt").write_text("".join(f"{n + 1:06d}.jpg {n // 4 * 2}\n" for n in range(8)))
    return root
