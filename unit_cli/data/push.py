"""`unit data push`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


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
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made when it does not exist")
    push.add_argument(
        "--overwrite-card", action="store_true", help="replace a card on the Hub that was edited by hand"
    )
    push.add_argument("--dry-run", action="store_true", help="do all but upload; no network, the folder is left")


def run(args: argparse.Namespace) -> int:
    """Publish; whatever stops it is one line, and then nothing was uploaded."""
    if args.create_pr and args.revision is not None:
        raise ValueError("--create-pr opens its request on the default branch: leave out --revision")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from training.publish_data import publish_data

    from ..common import report_push

    done = publish_data(
        args.folders,
        args.repo_id,
        private=args.private,
        create_pr=args.create_pr,
        revision=args.revision,
        dry_run=args.dry_run,
        overwrite_card=args.overwrite_card,
        progress=sys.stderr.isatty(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    report_push(done)
    return 0
