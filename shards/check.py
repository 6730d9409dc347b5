"""Check shard folders: sizes and hashes of the tars, and that every sample can be read and has one size.

  python shards/check.py data/fruit/apple/train data/fruit/orange/train --sheet fruit.png
  python shards/check.py downloads/their-tars --write-index

Prints a line a folder, and every fault with its file. Exit codes: 0 all good, 2 a fault was found.
"""

import argparse
import sys

from letit_dist.errors import UserError, reports_errors


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="shards/check.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="folders with index.json")
    add("--sheet", metavar="PNG", help="also write a contact sheet: 64 images a folder, evenly spaced")
    add("--workers", type=int, default=0, metavar="N", help="extra processes for decoding")
    add("--write-index", action="store_true", help="first write index.json for tars that have none (uncompressed)")
    return parser.parse_args(arguments)


@reports_errors
def main() -> int:
    args = parse()
    from letit_dist.data.checking import check, contact_sheet, write_index

    problems = []
    for folder in args.folders:
        try:
            if args.write_index:
                write_index(folder)
            result = check(folder, args.workers)
            print(result.line(), flush=True)
            problems += result.problems
        except UserError as error:
            problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(problems))
    if args.sheet:
        contact_sheet(args.folders, args.sheet)
        print(f"contact sheet: {args.sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
