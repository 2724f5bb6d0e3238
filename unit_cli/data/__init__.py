"""`unit data`: build, check and publish data sets; each command is a file beside this one.

What the recipes name is built from packages into the cache outside the repository:

unit data from-pdfs                      # chunks-train: 160,000 chunks of real pages, about 10 minutes on 2 cores
unit data from-pdfs --split validation   # blocks-validation and chunks-validation, a minute or two
unit data from-pdfs SOURCE... --out DIR  # pages, blocks, lines or chunks of your own PDFs: folders, archives, packages
unit data make-pages                     # made-train, made-small-train: 26,000 drawn chunks; sparse-pages-train
unit data make-pages --count N --out DIR # whole pages in many layouts: tables, forms, receipts, letters, code, ...
unit data make-markdown                  # markdown-made-train and markdown-pdf-train: pages whose target is Markdown
unit data make-blanks                    # blank-train: 6,000 strips of pictures, nothing to read on them
unit data lines                          # lines-train and three sets beside it: single lines, as the Reader cuts them
unit data evaluation-sets                # held-out text to measure reading on: six x-heights, made pages, scans
unit data pictures                       # pictures-train and pictures-validation
unit data targets                        # what the teachers of recognition say about pictures-train
unit data shrink SRC OUT                 # a copy of a picture data set in a third of the bytes, to carry elsewhere
unit data validate SOURCE                # what a data set holds, what of it cannot be used, a contact sheet
unit data check-leaks                    # nothing of the validation sets is in the training sets
unit data generate KIND --count N --out DIR  # made rows by the million, on this machine, Slurm or Ray
unit data push FOLDER OWNER/NAME         # publish a data set with its card
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

COMMANDS = (
    "from-pdfs",
    "make-pages",
    "make-markdown",
    "make-blanks",
    "lines",
    "evaluation-sets",
    "pictures",
    "targets",
    "shrink",
    "validate",
    "check-leaks",
    "generate",
    "push",
)


def add_parser(subparsers) -> None:
    """Add the command to the ``argparse`` sub-parsers of ``unit``."""
    parser = subparsers.add_parser(
        "data",
        help="build training and validation data",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f".{name.replace('-', '_')}", __package__)
        module.add_parser(commands)
        commands.choices[name].set_defaults(run_data=module.run)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what ``args`` ask for: 0, or 1 when leaks were found, or 2 with one line on stderr why it cannot be done."""
    try:
        return args.run_data(args)
    except ModuleNotFoundError as error:
        print(f"unit data: {error.name} is not installed: pip install 'unit-vision[train]'", file=sys.stderr)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"unit data: {error}", file=sys.stderr)
    return 2
