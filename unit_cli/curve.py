"""`unit curve RUN [RUN ...] --out curve.png`: the curves of runs, also while they go on."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import CommandError, first_line
from .train import missing_extra


def add_parser(subparsers) -> None:
    """Add `curve` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "curve",
        help="draw the curves of training runs",
        description="Draw the log of a run, which may still go on; of several, each term with a colour for each run.",
        epilog="example: unit curve runs/unit-tiny/stage1 runs/lower-rate --out compared.png",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its log.jsonl")
    parser.add_argument("--out", default="curve.png", metavar="FILE.png", help="picture to write (default: curve.png)")
    parser.add_argument("--title", default=None, help="above the panels (default: the run's name)")


def run(args: argparse.Namespace) -> int:
    """Draw, and say how far the runs are."""
    try:
        from training.curves import compare_curves, draw_curves, read_log
    except ImportError as error:
        raise CommandError(missing_extra(error)) from error
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder, give a file" if out.is_dir() else f"there is no folder {out.parent}"
        raise CommandError(f"--out {out}: {what}")
    try:
        logs = {name: read_log(each) for name, each in zip(_names(args.runs), args.runs, strict=True)}
        if len(logs) == 1:
            [(name, history)] = logs.items()
            draw_curves(history, args.out, name if args.title is None else args.title)
        else:
            compare_curves(logs, args.out, args.title or "")
    except (ValueError, OSError) as error:
        raise CommandError(first_line(error)) from error
    for name, history in logs.items():
        print(f"{name}: {max(entry.get('step', 0) for entry in history):,} steps")
    print(f"drawn in {args.out}")
    return 0


def _names(runs: list[str]) -> list[str]:
    """What tells runs apart: the last parts of their paths, as many as it takes.

    Raises:
        ValueError: one is given twice.
    """
    paths = [Path(each).resolve() for each in runs]
    paths = [each.parent if each.name == "log.jsonl" else each for each in paths]
    if len(set(paths)) < len(paths):
        raise ValueError("a run is given twice")
    for count in range(1, max(len(each.parts) for each in paths) + 1):
        names = ["/".join(each.parts[-count:]) for each in paths]
        if len(set(names)) == len(names):
            break
    return names
