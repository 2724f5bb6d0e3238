"""`unit data evaluation-sets`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import add_workers


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    sets = commands.add_parser(
        "evaluation-sets",
        help="held-out text to measure reading on: blocks and pages at six x-heights, made pages, scans, blank paper",
        description=(
            "The sets that `unit evaluate` reads, in evaluation-NAME: blocks, pages, syn-l, syn-s, scans, scan-blocks "
            "and blank when none is named; about a minute on two cores. funsd, sroie and cord come from the Hub, and "
            "any set as NAME=FOLDER (as published, or images beside .txt files) or NAME=OWNER/NAME on the Hub; their "
            "test part alone is taken. The Markdown pages are those of `unit data make-markdown --split validation`."
        ),
    )
    sets.add_argument("names", nargs="*", metavar="NAME[=SOURCE]", help="which, default: those of the first list")
    sets.add_argument("--out", type=Path, help="parent folder of the sets, default: the cache")
    add_workers(sets)


def run(args: argparse.Namespace) -> int:
    """Build them; one that cannot be had is said and the others are built. 0, or 2 when one was left out."""
    from training.data import evaluation_sets, labelled
    from training.data.sources import data_folder

    entries = [entry.partition("=") for entry in args.names or evaluation_sets.SETS]
    known = (*evaluation_sets.SETS, *labelled.HUB)
    for name, given, source in entries:
        if not name or "/" in name or (given and not source) or (not given and name not in known):
            raise ValueError(f"there is no set {name + given + source!r}: {', '.join(known)}, or NAME=SOURCE")
        if given and name in evaluation_sets.SETS:
            raise ValueError(f"{name} is built here and has no source; give yours another name")
    missing = 0
    for name, _, source in entries:
        out = (args.out or data_folder("")) / f"evaluation-{name}"
        try:
            if name in evaluation_sets.SETS:
                report = evaluation_sets.build(name, out, workers=args.workers)
            else:
                report = labelled.build_labelled(name, out, source or None)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"unit data evaluation-sets: {name} is left out: {error}", file=sys.stderr)
            missing += 1
            continue
        print(f"{out}: {report}")
    return 2 if missing else 0
