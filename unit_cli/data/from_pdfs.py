"""`unit data from-pdfs`: pages, blocks, lines and chunks of PDFs.

unit data from-pdfs ~/papers --out papers                # whole pages of a folder of PDFs
unit data from-pdfs arxiv.tar.gz --unit block --out b    # paragraphs, from an archive
unit data from-pdfs ~/papers --unit line --out lines     # lines as the Reader cuts them, for models that read lines
unit data from-pdfs texlive-science-doc --out science    # a Debian package by name
unit data from-pdfs                                      # the training set that the recipes name

The rows' text is in the order in which a person reads: header, columns one after the other, a table along its rows,
footnotes, footer. Pages whose text layer is broken, that are not English (see --all-languages) or turned are left
out with a count; report.json beside the shards says how many and why.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_max_refused, add_out, add_workers, parent, positive, x_height

TRAIN_PACKAGES = (
    "texlive-science-doc",
    "texlive-latex-base-doc",
    "texlive-latex-recommended-doc",
    "texlive-publishers-doc",
    "texlive-pictures-doc",
    "texlive-latex-extra-doc",
)
# What is built without another wish: (data set, rows, pages of a PDF at most).
PDF_SETS = {
    "train": (("chunks-train", 160_000, 15),),
    "validation": (("blocks-validation", 1_000, 9), ("chunks-validation", 2_000, 4)),
}


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    pdfs = commands.add_parser(
        "from-pdfs",
        help="pages, blocks, lines and chunks of PDFs: of folders, archives, Debian packages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pdfs.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="PDFs, folders of them, zip or tar archives, names of Debian packages; none: the sets of the recipes",
    )
    yours = pdfs.add_argument_group("with SOURCE")
    yours.add_argument(
        "--unit", choices=("page", "block", "line", "chunk"), default="page", help="of a row; default: page"
    )
    yours.add_argument(
        "--x-height",
        type=x_height,
        metavar="PX",
        help="height of a lower-case x in pixels, fixed (8) or drawn for each page from a range (6-12); "
        "default: 5-10 for pages, 8-14 for blocks, 2.8-15 for lines, 7-13 for chunks",
    )
    yours.add_argument(
        "--text",
        choices=("lines", "paragraphs"),
        default="lines",
        help="lines as printed, or paragraphs with their lines and divided words joined; default: lines",
    )
    yours.add_argument(
        "--drop-headers",
        action="store_true",
        help="leave running headers, footers and page numbers out of the text (they stay in a page's picture)",
    )
    yours.add_argument("--all-languages", action="store_true", help="not only English text")
    yours.add_argument("--license", help="what the rows' license column says, default: unknown")
    yours.add_argument("--source-name", help="what the rows' source column begins with, default: the SOURCE's name")
    add_max_refused(yours, "stop when more than this share of a SOURCE's documents or pages is broken")
    yours.add_argument(
        "--leave-out-held-out",
        action="store_true",
        help="leave out what shares text with UNIT's validation packages, which are fetched when missing; always done "
        "for Debian packages by name",
    )
    pdfs.add_argument("--split", choices=("train", "validation"), default="train")
    pdfs.add_argument(
        "--packages", nargs="+", metavar="DEB", help="for the sets of the recipes; default: those of the split"
    )
    pdfs.add_argument("--rows", type=positive, help="stop after so many rows (of each data set)")
    pdfs.add_argument("--max-pages", type=positive, help="look at so many pages at most")
    pdfs.add_argument("--pages-per-pdf", type=positive, help="of one document, so many pages at most")
    pdfs.add_argument(
        "--documents", type=Path, metavar="FILE", help="only these: a text file, PACKAGE/PATH/IN/IT.pdf on each line"
    )
    pdfs.add_argument("--name", help="of the data set that is built, when the split has one only")
    add_out(pdfs, "with SOURCE: folder of the data set; else parent folder of the sets, default: the cache")
    add_workers(pdfs)


def run(args: argparse.Namespace) -> int:
    """Build the data set of the sources, or the data sets of the split."""
    from training.data import heldout, pdf

    if args.sources:
        return _build_from_sources(args)
    train = args.split == "train"
    packages = args.packages or (list(TRAIN_PACKAGES) if train else heldout.validation_packages())
    if train:
        heldout.refuse_validation_packages(packages)
    documents = pdf.read_document_list(args.documents) if args.documents else None
    if args.name and len(PDF_SETS[args.split]) > 1:
        raise ValueError(f"--name fits one data set; --split {args.split} builds {len(PDF_SETS[args.split])}")
    unwanted = heldout.validation_text_filter() if train else heldout.shared_text_filter()
    for name, rows, pages_per_pdf in PDF_SETS[args.split]:
        out = parent(args) / (args.name or name)
        wishes = {
            "max_pages": args.max_pages,
            "max_rows": args.rows or rows,
            "pages_per_pdf": args.pages_per_pdf or pages_per_pdf,
            "workers": args.workers,
            "documents": documents,
        }
        if name.startswith("blocks"):
            report = pdf.build_blocks(packages, out, args.seed, split=args.split, **wishes)
        else:
            report = pdf.build_chunks(packages, out, args.seed, split=args.split, unwanted=unwanted, **wishes)
        print(f"{out}: {report}")
    return 0


def _build_from_sources(args: argparse.Namespace) -> int:
    """Build one data set, in ``--out`` itself."""
    from training.data import heldout
    from training.data.pdf_build import X_HEIGHTS, PageSettings, build_from_pdfs

    if args.out is None:
        raise ValueError("--out FOLDER is needed with SOURCE: the folder that the data set is written to")
    for name in ("packages", "documents", "name"):
        if getattr(args, name):
            raise ValueError(f"--{name} is for the sets of the recipes, and is not used with SOURCE")
    settings = PageSettings(
        unit=args.unit,
        x_height=args.x_height or X_HEIGHTS[args.unit],
        joined=args.text == "paragraphs",
        furniture=not args.drop_headers,
        english=not args.all_languages,
        seed=args.seed,
        split=args.split,
        license=args.license,
    )
    settings.check()
    packages = [source for source in args.sources if not Path(source).expanduser().exists()]
    unwanted = None
    if args.split == "train":
        heldout.refuse_validation_packages(packages)
        if packages or args.leave_out_held_out:
            unwanted = heldout.validation_text_filter()
    report = build_from_pdfs(
        args.sources,
        args.out,
        settings,
        max_pages=args.max_pages,
        pages_per_pdf=args.pages_per_pdf,
        max_rows=args.rows,
        max_refused=args.max_refused,
        source_name=args.source_name,
        unwanted=unwanted,
        workers=args.workers,
    )
    print(f"{args.out}: {report}")
    return 0
