"""`unit data from-pdfs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_out, add_workers, parent, positive

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
    pdfs = commands.add_parser("from-pdfs", help="chunks and blocks of the pages of PDF documentation")
    pdfs.add_argument("--split", choices=("train", "validation"), default="train")
    pdfs.add_argument("--packages", nargs="+", metavar="DEB", help="Debian packages, default: those of the split")
    pdfs.add_argument("--rows", type=positive, help="stop after so many rows (of each data set)")
    pdfs.add_argument("--max-pages", type=positive, help="look at so many pages at most")
    pdfs.add_argument("--pages-per-pdf", type=positive, help="of one document, so many pages at most")
    pdfs.add_argument(
        "--documents", type=Path, metavar="FILE", help="only these: a text file, PACKAGE/PATH/IN/IT.pdf on each line"
    )
    pdfs.add_argument("--name", help="of the data set that is built, when the split has one only")
    add_out(pdfs)
    add_workers(pdfs)


def run(args: argparse.Namespace) -> int:
    """Build the data sets of the split."""
    from training.data import heldout, pdf

    train = args.split == "train"
    packages = args.packages or (list(TRAIN_PACKAGES) if train else heldout.validation_packages())
    if train:
        heldout.refuse_validation_packages(packages)
    documents = pdf.read_document_list(args.documents) if args.documents else None
    if args.name and len(PDF_SETS[args.split]) > 1:
        raise ValueError(f"--name fits one data set; --split {args.split} builds {len(PDF_SETS[args.split])}")
    unwanted = heldout.validation_text_filter() if train else None
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
