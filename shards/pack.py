"""Pack images into WebDataset shards with an index.

  python shards/pack.py photos/cats --out data/cats --resolution 256 --format jpeg --workers 8
  python shards/pack.py celeba --out data/celeba64 --attribute Male --resolution 64 --dry-run
  python shards/pack.py ffhq-dataset --out data/ffhq1024 --resolution 1024 512 256 128 --format jpeg --workers 8
  python shards/pack.py builtin:fruit --out data/fruit --resolution 64 --count 2000 --test 256 --workers 2

The layout of SRC is recognised and said: FFHQ, ImageNet (folders or tars), CelebA, CelebAMask-HQ, AFHQ, CelebA-HQ of
StarGAN v2, CycleGAN's sets, a StyleGAN zip, img2dataset's tars, Hugging Face parquet or image folders, a list (.txt),
a table (.csv), or any folder; docs/data.md has the command for each set. Sets with domains and splits are packed into
OUT/domain/split, everything else into OUT; --dry-run prints what would be done, and does nothing.
Images are cropped to their centred square and resized; unreadable ones are left out and listed in
OUT/unreadable.txt. Interrupted? Run the same command again: it continues. Finished? It says so.
Exit codes: 0 done, 2 bad input (the message says what to change), 130 interrupted.
"""

import argparse
import sys

from letit_dist.errors import reports_errors


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="shards/pack.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("source", metavar="SRC", help="a folder, archive, list or table of images, or builtin:fruit")
    add("--out", required=True, metavar="DIR", help="folder for the shards: new, empty, or begun by this command")
    add("--resolution", type=int, nargs="+", metavar="R", help="side of the packed squares; several: all in one sample")
    add("--enlarge", action="store_true", help="enlarge images that are smaller than R (default: stop at the first)")
    formats = ("png", "jpeg", "webp", "original")
    add("--format", choices=formats, default="png", help="png and webp are lossless; original: bytes as they are (png)")
    add("--quality", type=int, metavar="Q", help="1 to 100 (default: jpeg 95, 98 up to 128 pixels; webp lossless)")
    add("--filter", choices=("box", "lanczos"), default="box", help="box averages exactly at whole factors (default)")
    add("--shard-size", type=float, default=1000, metavar="MB", help="largest shard, in MB (default: 1000)")
    add("--layout", metavar="NAME", help="take SRC for this layout, e.g. folder, domains (a wrong name lists them)")
    add("--domain", metavar="NAME", help="of a set with domains: pack this one only; else what all of it is called")
    add("--split", metavar="NAME", help="of a set with splits: pack this one only; else what all of it is called")
    add("--attribute", metavar="NAME", help="CelebA, CelebAMask-HQ: domains by this attribute, e.g. Male")
    add("--column", metavar="NAME", help="tables, parquet, StyleGAN zip (label): domains by this column")
    add("--image-column", metavar="NAME", help="parquet with several columns of images: take this one")
    add("--holdout", type=int, metavar="N", help="of a set without splits: N images to OUT/test, the rest to OUT/train")
    add("--max-bad-fraction", type=float, default=0.05, metavar="F", help="stop past this unreadable share (0.05)")
    add("--workers", type=int, default=0, metavar="N", help="extra processes; the result does not depend on it")
    add("--dry-run", action="store_true", help="print what was found and what would be written, and stop")
    fruit = parser.add_argument_group("builtin:fruit")
    fruit.add_argument("--count", type=int, metavar="N", help="training pictures a style")
    fruit.add_argument("--test", type=int, metavar="N", help="test pictures a style (default: 256)")
    fruit.add_argument("--seed", type=int, metavar="S", help="default: 0")
    return parser.parse_args(arguments)


@reports_errors
def main() -> int:
    args = parse()
    from letit_dist.data.packing import PackOptions, leaks, pack
    from letit_dist.data.source_base import hold_out
    from letit_dist.data.sources import Request, find, open_source, plan

    largest, *smaller = args.resolution or [None]
    options = PackOptions(
        resolution=largest,
        smaller=tuple(smaller),
        format=args.format,
        quality=args.quality,
        filter=args.filter,
        shard_bytes=int(args.shard_size * 1e6),
        max_bad_fraction=args.max_bad_fraction,
        workers=args.workers,
        enlarge=args.enlarge,
    )
    request = Request(
        largest,
        args.count,
        args.test,
        args.seed,
        args.domain,
        args.split,
        layout=args.layout,
        attribute=args.attribute,
        column=args.column,
        image_column=args.image_column,
    )
    print(find(args.source, args.layout).line(args.source), flush=True)
    parts = open_source(args.source, request)
    if args.holdout is not None:
        parts = hold_out(parts, args.holdout)
    for note in dict.fromkeys(note for part in parts for note in part.notes):
        print(f"  note: {note}")
    if args.dry_run:
        print("\n".join([*plan(parts), f"would write to {args.out}: {options.line()}"]))
        return 0
    try:
        results = []
        for part in parts:
            results.append(pack(part, args.out, options))
            print("\n".join(results[-1].lines()), flush=True)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    print("".join(f"{line}\n" for line in leaks(parts, results)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
