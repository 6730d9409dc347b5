"""Pack images into WebDataset shards with an index.

  python shards/pack.py photos/cats --out data/cats --resolution 256 --format jpeg --workers 8
  python shards/pack.py builtin:fruit --out data/fruit --resolution 64 --count 2000 --test 256 --workers 2

A folder is packed into OUT; builtin:fruit (drawn apples and oranges) into OUT/{apple,orange}/{train,test}.
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
    add("source", metavar="SRC", help="a folder of images (subfolders included), or builtin:fruit")
    add("--out", required=True, metavar="DIR", help="folder for the shards: new, empty, or begun by this command")
    add("--resolution", type=int, metavar="R", help="side of the packed squares (default: leave images as they are)")
    add("--format", choices=("png", "jpeg", "webp"), default="png", help="png and webp are lossless (default: png)")
    add("--quality", type=int, metavar="Q", help="1 to 100 (default: jpeg 95, 98 up to 128 pixels; webp lossless)")
    add("--filter", choices=("box", "lanczos"), default="box", help="box averages exactly at whole factors (default)")
    add("--shard-size", type=float, default=1000, metavar="MB", help="largest shard, in MB (default: 1000)")
    add("--domain", metavar="NAME", help="noted in the index, e.g. cat")
    add("--split", metavar="NAME", help="noted in the index, e.g. train")
    add("--max-bad-fraction", type=float, default=0.05, metavar="F", help="stop past this unreadable share (0.05)")
    add("--workers", type=int, default=0, metavar="N", help="extra processes; the result does not depend on it")
    fruit = parser.add_argument_group("builtin:fruit")
    fruit.add_argument("--count", type=int, metavar="N", help="training pictures a style")
    fruit.add_argument("--test", type=int, metavar="N", help="test pictures a style (default: 256)")
    fruit.add_argument("--seed", type=int, metavar="S", help="default: 0")
    return parser.parse_args(arguments)


@reports_errors
def main() -> int:
    args = parse()
    from letit_dist.data.packing import PackOptions, pack
    from letit_dist.data.sources import Request, open_source

    options = PackOptions(
        resolution=args.resolution,
        format=args.format,
        quality=args.quality,
        filter=args.filter,
        shard_bytes=int(args.shard_size * 1e6),
        max_bad_fraction=args.max_bad_fraction,
        workers=args.workers,
    )
    request = Request(args.resolution, args.count, args.test, args.seed, args.domain, args.split)
    try:
        for part in open_source(args.source, request):
            print("\n".join(pack(part, args.out, options).lines()), flush=True)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
