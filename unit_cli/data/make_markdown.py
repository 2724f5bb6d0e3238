"""`unit data make-markdown`."""

from __future__ import annotations

import argparse

from .from_pdfs import TRAIN_PACKAGES
from .options import add_out, add_workers, parent, positive

MADE_PAGES = {"train": 20_000, "validation": 1_000}


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    made = commands.add_parser(
        "make-markdown",
        help="pages whose target is their Markdown: typeset .md files, and PDFs with their LaTeX beside them",
        description=(
            "Two data sets: markdown-made-SPLIT, pages typeset from .md files, and markdown-pdf-SPLIT, pages of real "
            "PDFs whose Markdown comes from the LaTeX beside them. Without a SOURCE both are built; with SOURCE one "
            "of them, of files and packages or of deb:NAME, in --out itself."
        ),
    )
    made.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="a folder or file of Markdown, npm:NAME[@VERSION], or deb:NAME for LaTeX beside PDFs",
    )
    made.add_argument("--split", choices=tuple(MADE_PAGES), default="train")
    made.add_argument("--count", type=positive, help="pages (of each data set; of PDFs at most)")
    made.add_argument("--size", type=positive, default=896, help="longer side of a page in pixels")
    made.add_argument("--license", default="unknown", help="of folders and files; packages state their own")
    made.add_argument(
        "--any-license", action="store_true", help="npm packages under any licence, not permissive ones only"
    )
    made.add_argument("--fonts", default="packages", help="'packages', 'system' or a folder of .ttf and .otf files")
    add_out(made, "with SOURCE: folder of the data set; else parent folder of the sets, default: the cache")
    add_workers(made)


def run(args: argparse.Namespace) -> int:
    """Build the data sets that the sources ask for."""
    from training.data import heldout, markdown_latex, markdown_pages
    from training.data.pages.fonts import load_fonts

    train = args.split == "train"
    debs = [source[4:] for source in args.sources if source.startswith("deb:")]
    files = [source for source in args.sources if not source.startswith("deb:")]
    if debs and files:
        raise ValueError(f"deb:{debs[0]} and {files[0]} make two data sets: give them in two commands")
    if args.sources and args.out is None:
        raise ValueError("--out FOLDER is needed with SOURCE: the folder that the data set is written to")
    if not args.sources:  # the sets of the recipes
        debs = list(TRAIN_PACKAGES) if train else heldout.validation_packages()
        files = [f"npm:{name}" for name in markdown_pages.default_packages(args.split)]
    if train:
        heldout.refuse_validation_packages(debs)
    elif wrong := sorted(set(debs) - set(heldout.validation_packages())):
        raise ValueError(f"{', '.join(wrong)}: not held out for validation (training/data/heldout.yaml)")
    wishes = {"size": args.size, "seed": args.seed, "split": args.split, "workers": args.workers}
    documents = (
        markdown_pages.find_documents(
            files, args.split, license=args.license, any_license=args.any_license, skipped=print
        )
        if files
        else []
    )
    if train:
        wishes["unwanted"] = heldout.validation_text_filter()
    if documents:
        out = args.out if args.sources else parent(args) / f"markdown-made-{args.split}"
        fonts = load_fonts(args.fonts, args.split)
        count = args.count or MADE_PAGES[args.split]
        print(f"{out}: {markdown_pages.build_pages(documents, out, count, fonts=fonts, **wishes)}")
    if debs:
        out = args.out if args.sources else parent(args) / f"markdown-pdf-{args.split}"
        print(f"{out}: {markdown_latex.build_latex_pages(debs, out, count=args.count, **wishes)}")
    return 0
