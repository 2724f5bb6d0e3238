"""`unit data shrink`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import positive


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    small = commands.add_parser("shrink", help="a small copy of a picture data set, its pictures as lossy WebP")
    small.add_argument("source", type=Path, metavar="SRC", help="a folder, or the name of a data set in the cache")
    small.add_argument("out", type=Path, metavar="OUT", help="folder of the copy")
    small.add_argument("--max-side", type=positive, default=256, help="px, larger pictures are scaled down to it")
    small.add_argument("--quality", type=positive, default=85, help="of WebP, 1 to 100")
    small.add_argument("--workers", type=positive, default=2, help="threads")


def run(args: argparse.Namespace) -> int:
    """Write the smaller copy."""
    from training.data.shrink import shrink
    from training.data.sources import data_folder

    source = args.source if args.source.is_dir() else data_folder(str(args.source))
    report = shrink(source, args.out, args.max_side, args.quality, args.workers)
    print(f"{args.out}: {report['rows']} pictures in {report['bytes'] / 1e6:.1f} MB")
    return 0
