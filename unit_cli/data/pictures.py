"""`unit data pictures`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_out, parent


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    pictures = commands.add_parser("pictures", help="captioned pictures from Debian and npm packages")
    pictures.add_argument(
        "--report", action="store_true", help="build nothing: count what is built, by source and licence"
    )
    add_out(pictures)


def run(args: argparse.Namespace) -> int:
    """Build pictures-train and pictures-validation, and say what is in them."""
    from training.data import pictures

    if not args.report:
        report = pictures.build(parent(args), args.seed)
        for reason, count in report["dropped"].items():
            print(f"{count:>8,}  left out: {reason}")
    print(source_table([parent(args) / "pictures-train", parent(args) / "pictures-validation"]))
    for package, reason in pictures.UNUSED.items():
        print(f"not taken: {package}: {reason}")
    return 0


def source_table(folders: list[Path]) -> str:
    """Markdown: rows of each split by source and licence, and their sums."""
    from training.data.pictures import counts_by_source
    from training.data.schema import SPLITS
    from training.evaluation.report import markdown_table

    counts = counts_by_source(folders)
    rows = [[source, license, *(count[split] for split in SPLITS)] for (source, license), count in counts.items()]
    rows.append(["all", "", *(sum(count[split] for count in counts.values()) for split in SPLITS)])
    return markdown_table(["source", "licence", *SPLITS], rows)
