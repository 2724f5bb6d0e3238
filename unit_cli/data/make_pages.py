"""`unit data make-pages`."""

from __future__ import annotations

import argparse

from .options import add_out, add_workers, parent, positive

# (data set, rows) that is built without another wish.
MADE_SETS = {"dense": ("made-train", 20_000), "sparse": ("made-small-train", 6_000)}


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    made = commands.add_parser("make-pages", help="chunks of text drawn in many fonts and conditions")
    made.add_argument("--kind", choices=tuple(MADE_SETS), help="only dense chunks, or only sparse small canvases")
    made.add_argument("--rows", type=positive, help="how many rows (of each kind)")
    add_out(made)
    add_workers(made)


def run(args: argparse.Namespace) -> int:
    """Draw the rows of both kinds, or of one."""
    from training.data import heldout, made_pages

    unwanted = heldout.validation_text_filter()
    for kind in [args.kind] if args.kind else MADE_SETS:
        name, rows = MADE_SETS[kind]
        out = parent(args) / name
        report = made_pages.build_made(
            out, args.rows or rows, args.seed, kind=kind, workers=args.workers, unwanted=unwanted
        )
        print(f"{out}: {report}")
    return 0
