"""`unit data make-pages`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_out, add_workers, parent, positive, x_height

# (data set, rows) that the recipes name, built without another wish: two of chunks, and one of whole pages with few
# words in large print, which are legible at x1 too.
MADE_SETS = {
    "dense": ("made-train", 20_000),
    "sparse": ("made-small-train", 6_000),
    "large": ("sparse-pages-train", 6_000),
}
LARGE_PRINT = {
    "size": "448-640x448-640",
    "x_height": (14.0, 26.0),
    "layouts": ("paragraphs", "headings", "large"),
}

DESCRIPTION = """\
Draw pages of text. With --count: whole pages, written to --out; layouts, order of the text and degradations are
described in docs/data.md. Without: what the shipped recipes train on, short chunks (made-train, made-small-train)
and pages in large print (sparse-pages-train), to which only --kind, --rows, --seed, --workers and --out apply.

  unit data make-pages --count 10000 --size 448 --seed 1 --workers 4 --out pages
  unit data make-pages --count 500 --size 300-600x400-900 --x-height 6-10 --layouts table,form --out forms
"""


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    made = commands.add_parser(
        "make-pages",
        help="pages of text drawn in many layouts, fonts and conditions",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--count", type=positive, help="how many whole pages")
    made.add_argument("--size", help="pixels: 448, 448x640 (width x height), 256-896, 300-600x400-900; default 448")
    made.add_argument(
        "--x-height", type=x_height, metavar="PX", help="of the running text in pixels, 8 or 5-12; default 5-12"
    )
    made.add_argument("--layouts", type=_names, metavar="NAME,…", help="only these, with their relative weights")
    made.add_argument("--fonts", help="'packages' (Debian's, the default), 'system', or a folder")
    made.add_argument("--corpus", nargs="+", type=Path, metavar="FILE", help="text files; default: packages' prose")
    made.add_argument("--pictures", type=Path, help="a data set or folder; default: pictures-train of the cache")
    made.add_argument("--split", choices=("train", "validation"), help="validation: the held-out fonts only")
    clean = made.add_mutually_exclusive_group()
    clean.add_argument("--degradations", type=_names, metavar="NAME,…", help="only these; default: all")
    clean.add_argument("--no-degradations", action="store_true", help="as printed")
    made.add_argument(
        "--kind",
        choices=tuple(MADE_SETS),
        help="without --count: only dense chunks, only sparse small ones, or only pages in large print",
    )
    made.add_argument("--rows", type=positive, help="without --count: how many (of each kind)")
    add_out(made, "with --count: folder of the data set; else parent folder of the sets, default: the cache")
    add_workers(made)


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


PAGE_OPTIONS = ("size", "x_height", "layouts", "degradations", "split")
RESOURCE_OPTIONS = ("split", "fonts", "corpus", "pictures")


def run(args: argparse.Namespace) -> int:
    """Draw whole pages as wished, or the sets of the recipes or one of them."""
    if args.count is None:
        wrong = [name for name in dict.fromkeys(PAGE_OPTIONS + RESOURCE_OPTIONS) if getattr(args, name) is not None]
        if wrong or args.no_degradations:
            name = (wrong or ["no_degradations"])[0].replace("_", "-")
            raise ValueError(f"--{name} is for whole pages: say how many with --count")
        return _sets_of_recipes(args)
    if args.kind or args.rows:
        raise ValueError("--kind and --rows are for the recipes' sets; whole pages are counted by --count")
    from training.data import made_pages

    given = {name: getattr(args, name) for name in PAGE_OPTIONS if getattr(args, name) is not None}
    if args.no_degradations:
        given["degradations"] = ()
    settings = made_pages.PageSettings(**given)
    options = {name: getattr(args, name) for name in RESOURCE_OPTIONS if getattr(args, name) is not None}
    resources = made_pages.load_page_resources(**options)
    out = args.out or parent(args) / f"pages-{settings.split}"
    report = made_pages.build_pages(out, args.count, settings, resources, args.seed, args.workers)
    print(f"{out}: {report}; {len(resources.families)} font families")
    return 0


def _sets_of_recipes(args: argparse.Namespace) -> int:
    from training.data import heldout, made_chunks, made_pages

    kinds = [args.kind] if args.kind else list(MADE_SETS)
    unwanted = heldout.validation_text_filter() if kinds != ["large"] else None  # pages look it up for themselves
    for kind in kinds:
        name, rows = MADE_SETS[kind]
        out, rows = parent(args) / name, args.rows or rows
        if kind == "large":
            settings, resources = made_pages.PageSettings(**LARGE_PRINT), made_pages.load_page_resources()
            report = made_pages.build_pages(out, rows, settings, resources, args.seed, args.workers)
        else:
            report = made_chunks.build_made(out, rows, args.seed, kind=kind, workers=args.workers, unwanted=unwanted)
        print(f"{out}: {report}")
    return 0
