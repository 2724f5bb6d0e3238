"""`unit data make-blanks`."""

from __future__ import annotations

import argparse

from .options import add_out, parent, positive


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    blanks = commands.add_parser("make-blanks", help="strips of pictures-train with nothing to read on them")
    blanks.add_argument("--rows", type=positive, default=6_000)
    add_out(blanks)


def run(args: argparse.Namespace) -> int:
    """Cut the strips."""
    from training.data.blanks import build_blanks
    from training.data.sources import data_folder

    out = parent(args) / "blank-train"
    print(f"{out}: {build_blanks(data_folder('pictures-train'), out, args.rows, args.seed)}")
    return 0
