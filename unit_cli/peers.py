"""`unit peers install NAME ...`: other readers for `unit evaluate --peers`, each in a folder of its own."""

from __future__ import annotations

import argparse

from .common import CommandError
from .train import missing_extra


def add_parser(subparsers) -> None:
    """Add `peers` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "peers",
        help="install other readers to compare with",
        description="Readers that `unit evaluate --peers` compares with: install them, or see which are there.",
        epilog="Each goes to a folder of its own below the cache ($UNIT_CACHE/peers, by default ~/.cache/unit/peers); "
        "nothing else is touched. To uninstall one delete its folder. Models of the Hub (hf:ID) need no installing.",
    )
    parser.add_argument("action", choices=("install", "list"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="tesseract, rapidocr")


def run(args: argparse.Namespace) -> int:
    """Install what is named, or say what is there."""
    try:
        from training.evaluation.peers import KNOWN, install, subjects
    except ImportError as error:
        raise CommandError(missing_extra(error)) from error
    if args.action == "list":
        if args.names:
            raise CommandError("list takes no name")
        for name in KNOWN:
            found, notes = subjects([name])
            print(f"{name}: {'installed' if found else notes[0]}")
        return 0
    if not args.names:
        raise CommandError(f"install what? Known: {', '.join(KNOWN)}")
    for name in args.names:
        try:
            print(f"{name}: {install(name)}")
        except (ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from error
    return 0
