#!/usr/bin/env python3
"""The weight files that metrics need. Nothing is ever downloaded: fetch a file yourself, and import it here.

    python eval/weights.py list                        # which files, where from, and which are here
    python eval/weights.py check                       # hash those that are here; code 1 if one is another file
    python eval/weights.py import ~/Downloads/*.pth    # recognised by their SHA-256, and copied to their place

Of DINOv2 and CLIP no hash is known here: put the files where `list` says, and compare what `check` finds with the
publisher's page. They lie in --weights DIR, or $LETIT_WEIGHTS, or ~/.cache/letit_dist/weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from letit_dist.errors import reports_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--weights", metavar="DIR", help="their folder (see above)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", parents=[common], help="which files, and which are here")
    commands.add_parser("check", parents=[common], help="hash those that are here")
    importing = commands.add_parser("import", parents=[common], help="copy files to their place")
    importing.add_argument("files", nargs="+", type=Path, metavar="FILE")
    return parser.parse_args(argv)


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from letit_dist.evaluation.tables import markdown
    from letit_dist.evaluation.weights import FILES, import_weights, place_of, state_of, weights_folder

    folder = weights_folder(args.weights)
    if args.command == "import":
        print("\n".join(import_weights(args.files, folder)))
        return 0
    if args.command == "list":
        rows: list[dict[str, str | None]] = [
            {
                "key": file.key,
                "file": file.name,
                "here": "yes" if place_of(file, folder).is_file() else "no",
                "for": file.purpose,
                "address": file.address,
            }
            for file in FILES.values()
        ]
        print(f"folder: {folder}\n{markdown(rows)}")
        return 0
    states = {file: state_of(file, folder) for file in FILES.values()}
    rows = [
        {"key": file.key, "state": state, "expected": file.sha256[:16] or None, "sha256": found[:16] or None}
        for file, (state, found) in states.items()
    ]
    print(f"folder: {folder}\n{markdown(rows)}")
    return int(any(state == "another" for state, _ in states.values()))


if __name__ == "__main__":
    sys.exit(main())
