"""`unit data push`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..common import add_upload_options, report_push, upload_options


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    push = commands.add_parser(
        "push",
        help="publish folders of shards as a data set on the Hugging Face Hub",
        description="Look at every row, write a card, and upload what differs in one commit. Rows to train on with "
        "something held out in them are refused.",
        epilog="example: unit data push made-train made-validation me/made-pages --private",
    )
    push.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of shards; one for each split, or more")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="data set on the Hub; made when it does not exist")
    add_upload_options(push)


def run(args: argparse.Namespace) -> int:
    """Publish; whatever stops it is one line, and then nothing was uploaded."""
    where = upload_options(args)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from training.publish_data import publish_data

    done = publish_data(
        args.folders,
        args.repo_id,
        **where,
        progress=sys.stderr.isatty(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    report_push(done)
    return 0
