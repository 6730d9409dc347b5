"""Check shard folders: hashes of the tars, the places in the index, that every sample can be read and has one size.

  python shards/check.py data/fruit/*/* --sheet fruit.png --workers 8
  python shards/check.py downloads/their-tars --write-index

Prints a line a folder, every fault with its file, samples and bytes by domain and split, and pictures that stand in
two splits: equal ones (equal pixels), and similar ones, which a 64-bit difference hash finds within 4 bits and which
are a reason to look, not a fault.
Exit codes: 0 all good, 1 readable, but equal pictures in two splits, 2 a fault was found.
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
    from letit_dist.data.checking import check, compare, contact_sheet, table, write_index

    problems, results = [], []
    for folder in args.folders:
        try:
            if args.write_index:
                write_index(folder)
            results.append(check(folder, args.workers))
            print("\n".join(results[-1].lines()), flush=True)
            problems += results[-1].problems
        except UserError as error:
            problems += str(error).splitlines()
    equal, similar = compare(results)
    if len(results) > 1:
        print("\n".join(table(results)))
        if unsaid := [str(result.index.folder) for result in results if result.split is None]:
            print(f"not compared, because no split is stated: {', '.join(unsaid)}")
    print("".join(f"look: {line}\n" for line in similar), end="")
    print("".join(f"leak: {line}\n" for line in equal), end="", flush=True)
    if problems:
        raise UserError("\n".join(problems))
    if args.sheet:
        contact_sheet(args.folders, args.sheet)
        print(f"contact sheet: {args.sheet}")
    return 1 if equal else 0


if __name__ == "__main__":
    sys.exit(main())
