"""`unit data`: build the data sets that the recipes name, from packages, into the cache outside the repository.

unit data from-pdfs                      # chunks-train: 160,000 chunks of real pages, about 10 minutes on 2 cores
unit data from-pdfs --split validation   # blocks-validation and chunks-validation, a minute or two
unit data make-pages                     # made-train and made-small-train: 26,000 drawn chunks, about a minute
unit data make-blanks                    # blank-train: 6,000 strips of pictures, nothing to read on them
unit data pictures                       # pictures-train and pictures-validation
unit data targets                        # what the teachers of recognition say about pictures-train
unit data shrink SRC OUT                 # a copy of a picture data set in a third of the bytes, to carry elsewhere
unit data check-leaks                    # nothing of the validation sets is in the training sets
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TRAIN_PACKAGES = (
    "texlive-science-doc",
    "texlive-latex-base-doc",
    "texlive-latex-recommended-doc",
    "texlive-publishers-doc",
    "texlive-pictures-doc",
    "texlive-latex-extra-doc",
)
# What each command builds when it is given no other wish: (data set, rows, pages of a PDF at most).
PDF_SETS = {
    "train": (("chunks-train", 160_000, 15),),
    "validation": (("blocks-validation", 1_000, 9), ("chunks-validation", 2_000, 4)),
}
MADE_SETS = {"dense": ("made-train", 20_000), "sparse": ("made-small-train", 6_000)}


def add_parser(subparsers) -> None:
    """Add the command to the ``argparse`` sub-parsers of ``unit``."""
    parser = subparsers.add_parser(
        "data",
        help="build training and validation data",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    pdfs = commands.add_parser("from-pdfs", help="chunks and blocks of the pages of PDF documentation")
    pdfs.add_argument("--split", choices=("train", "validation"), default="train")
    pdfs.add_argument("--packages", nargs="+", metavar="DEB", help="Debian packages, default: those of the split")
    pdfs.add_argument("--rows", type=_positive, help="stop after so many rows (of each data set)")
    pdfs.add_argument("--max-pages", type=_positive, help="look at so many pages at most")
    pdfs.add_argument("--pages-per-pdf", type=_positive, help="of one document, so many pages at most")
    pdfs.add_argument(
        "--documents", type=Path, metavar="FILE", help="only these: a text file, PACKAGE/PATH/IN/IT.pdf on each line"
    )
    pdfs.add_argument("--name", help="of the data set that is built, when the split has one only")
    _common(pdfs)

    made = commands.add_parser("make-pages", help="chunks of text drawn in many fonts and conditions")
    made.add_argument("--kind", choices=tuple(MADE_SETS), help="only dense chunks, or only sparse small canvases")
    made.add_argument("--rows", type=_positive, help="how many rows (of each kind)")
    _common(made)

    blanks = commands.add_parser("make-blanks", help="strips of pictures-train with nothing to read on them")
    blanks.add_argument("--rows", type=_positive, default=6_000)
    blanks.add_argument("--out", type=Path, help="parent folder of the data sets, default: the cache")
    blanks.add_argument("--seed", type=int, default=0)

    for name, told in (
        ("pictures", "captioned pictures from Debian and npm packages"),
        ("targets", "features, logits and sentence embeddings for pictures-train"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument("--out", type=Path, help="parent folder of the data sets, default: the cache")
        command.add_argument("--seed", type=int, default=0)

    small = commands.add_parser("shrink", help="a small copy of a picture data set, its pictures as lossy WebP")
    small.add_argument("source", type=Path, metavar="SRC", help="a folder, or the name of a data set in the cache")
    small.add_argument("out", type=Path, metavar="OUT", help="folder of the copy")
    small.add_argument("--max-side", type=_positive, default=256, help="px, larger pictures are scaled down to it")
    small.add_argument("--quality", type=_positive, default=85, help="of WebP, 1 to 100")
    small.add_argument("--workers", type=_positive, default=2, help="threads")

    leaks = commands.add_parser("check-leaks", help="look for validation data in the training data")
    leaks.add_argument("--train", nargs="+", type=Path, metavar="FOLDER", help="default: all …-train in the cache")
    leaks.add_argument("--validation", nargs="+", type=Path, metavar="FOLDER", help="default: all …-validation")
    parser.set_defaults(run=run)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="parent folder of the data sets, default: the cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=_positive, default=1, help="processes; the result is the same for any number"
    )


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return number


def run(args: argparse.Namespace) -> int:
    """Do what ``args`` ask for: 0, or 1 when leaks were found, or 2 with one line on stderr why it cannot be done."""
    try:
        return {
            "from-pdfs": _from_pdfs,
            "make-pages": _make_pages,
            "make-blanks": _make_blanks,
            "pictures": _pictures,
            "targets": _targets,
            "shrink": _shrink,
            "check-leaks": _check_leaks,
        }[args.data_command](args)
    except ModuleNotFoundError as error:
        print(f"unit data: {error.name} is not installed: pip install 'unit-vision[train]'", file=sys.stderr)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"unit data: {error}", file=sys.stderr)
    return 2


def _parent(args: argparse.Namespace) -> Path:
    from training.data.sources import data_folder

    return args.out or data_folder("")


def _from_pdfs(args: argparse.Namespace) -> int:
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
        out = _parent(args) / (args.name or name)
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


def _make_pages(args: argparse.Namespace) -> int:
    from training.data import heldout, made_pages

    unwanted = heldout.validation_text_filter()
    for kind in [args.kind] if args.kind else MADE_SETS:
        name, rows = MADE_SETS[kind]
        out = _parent(args) / name
        report = made_pages.build_made(
            out, args.rows or rows, args.seed, kind=kind, workers=args.workers, unwanted=unwanted
        )
        print(f"{out}: {report}")
    return 0


def _make_blanks(args: argparse.Namespace) -> int:
    from training.data.blanks import build_blanks
    from training.data.sources import data_folder

    out = _parent(args) / "blank-train"
    print(f"{out}: {build_blanks(data_folder('pictures-train'), out, args.rows, args.seed)}")
    return 0


def _pictures(args: argparse.Namespace) -> int:
    from training.data import pictures

    report = pictures.build(_parent(args), args.seed)
    print(
        f"{_parent(args)}: {report['train']['rows']} pictures to train on, {report['validation']['rows']} to validate"
    )
    return 0


def _targets(args: argparse.Namespace) -> int:
    from training.data import targets

    targets.build(_parent(args), args.seed)
    return 0


def _shrink(args: argparse.Namespace) -> int:
    from training.data.shrink import shrink
    from training.data.sources import data_folder

    source = args.source if args.source.is_dir() else data_folder(str(args.source))
    report = shrink(source, args.out, args.max_side, args.quality, args.workers)
    print(f"{args.out}: {report['rows']} pictures in {report['bytes'] / 1e6:.1f} MB")
    return 0


def _check_leaks(args: argparse.Namespace) -> int:
    from training.data.heldout import find_leaks
    from training.data.sources import data_folder

    train = args.train or _built(data_folder(""), "train")
    validation = args.validation or _built(data_folder(""), "validation")
    if not train or not validation:
        raise ValueError(f"{data_folder('')} holds no data sets to compare: build some first (`unit data --help`)")
    leaks = find_leaks(train, validation)
    for leak in leaks[:20]:
        print(leak)
    names = [", ".join(folder.name for folder in folders) for folders in (train, validation)]
    print(f"{len(leaks) or 'no'} leaks of {names[1]} into {names[0]}")
    return 1 if leaks else 0


def _built(parent: Path, split: str) -> list[Path]:
    return [folder for folder in sorted(parent.glob(f"*-{split}")) if any(folder.glob("*.parquet"))]
