"""`unit data lines`: lines of text as the `Reader` cuts them, with the sets that the recipes name.

unit data lines                                   # lines-train, lines-development, made-lines-train, blank-lines-train
unit data lines --only made-lines-train --rows 500 --out .
unit data lines --only lines-train --documents FILE   # of the documents that the file lists, those for training
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .from_pdfs import TRAIN_PACKAGES
from .options import add_out, add_workers, parent, positive

# Data set -> rows
LINE_SETS = {
    "lines-train": 300_000,
    "lines-development": 4_000,
    "made-lines-train": 80_000,
    "blank-lines-train": 12_000,
}
PAGES_PER_PDF = {"lines-train": 40, "lines-development": 3}


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    lines = commands.add_parser(
        "lines",
        help="lines as the Reader cuts them out of pages of PDFs, made pages and pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lines.add_argument("--only", nargs="+", choices=tuple(LINE_SETS), metavar="SET", help=f"of {', '.join(LINE_SETS)}")
    lines.add_argument("--rows", type=positive, help="of each data set, in place of its own number")
    lines.add_argument(
        "--packages", nargs="+", metavar="DEB", default=list(TRAIN_PACKAGES), help="of PDFs; default: all to train on"
    )
    lines.add_argument("--max-pages", type=positive, help="look at so many pages of PDFs at most")
    lines.add_argument(
        "--pages-per-pdf", type=positive, help="of one document, so many pages at most; default: 40, for development 3"
    )
    lines.add_argument(
        "--documents",
        type=Path,
        metavar="FILE",
        help="only these: a text file, PACKAGE/PATH/IN/IT.pdf on each line; lines-train leaves out those for "
        "development",
    )
    add_out(lines)
    add_workers(lines)


def run(args: argparse.Namespace) -> int:
    """Build the sets."""
    from training.data import heldout, lines
    from training.data.pdf import read_document_list
    from training.data.schema import shard_paths
    from training.data.sources import data_folder

    heldout.refuse_validation_packages(args.packages)
    names = [name for name in LINE_SETS if name in (args.only or LINE_SETS)]
    for option in ("documents", "pages_per_pdf", "max_pages"):
        if getattr(args, option) and not set(names) & set(PAGES_PER_PDF):
            raise ValueError(f"--{option.replace('_', '-')} is for {' and '.join(PAGES_PER_PDF)}")
    listed = read_document_list(args.documents) if args.documents else None
    pictures = data_folder("pictures-train")
    if "blank-lines-train" in names:
        shard_paths(pictures)  # that they are missing is to be said before hours are spent on the other sets
    unwanted = heldout.validation_text_filter() if names != ["blank-lines-train"] else None
    for name in names:
        out, rows = parent(args) / name, args.rows or LINE_SETS[name]
        if name == "blank-lines-train":
            report = lines.build_blank_lines(pictures, out, rows, args.seed)
        elif name == "made-lines-train":
            report = lines.build_made_lines(out, rows, args.seed, workers=args.workers, unwanted=unwanted)
        else:
            choose = lines.training_documents if name == "lines-train" else lines.development_documents
            report = lines.build_lines(
                args.packages,
                out,
                args.seed,
                documents=choose(args.packages, listed),
                pages_per_pdf=args.pages_per_pdf or PAGES_PER_PDF[name],
                max_pages=args.max_pages,
                max_rows=rows,
                unwanted=unwanted,
                workers=args.workers,
            )
        print(f"{out}: {report}", flush=True)
    return 0
