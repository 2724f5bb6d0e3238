"""`unit push-space OWNER/NAME --model MODEL_ID`: the browser demo of a model as a Space on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import os
import sys

from .common import CommandError, report_push
from .train import missing_extra


def add_parser(subparsers) -> None:
    """Add `push-space` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "push-space",
        help="publish the browser demo of a model as a Space",
        description="Collect the demo and the code that it needs, start the app from those files alone in a clean "
        "process, and only then upload them to a Space, in one commit, and name the model to it.",
        epilog="example: unit push-space me/unit-demo --model me/my-unit",
    )
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the Space; made when it does not exist")
    parser.add_argument("--model", metavar="MODEL_ID", required=True, help="full UNIT model on the Hub")
    parser.add_argument("--private", action="store_true", help="make the Space private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="branch to commit to, made when it does not exist; a Space runs its default branch alone",
    )
    parser.add_argument(
        "--overwrite-card", action="store_true", help="replace a README.md of the Space that was edited by hand"
    )
    parser.add_argument("--dry-run", action="store_true", help="do all but upload; no network, the folder is left")


def run(args: argparse.Namespace) -> int:
    """Publish; whatever stops it is one line, and then nothing was uploaded."""
    if args.create_pr and args.revision is not None:
        raise CommandError("--create-pr opens its request on the default branch: leave out --revision")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from training.publish import PublishError
        from training.publish_space import publish_space
    except ImportError as error:
        raise CommandError(missing_extra(error)) from error
    try:
        done = publish_space(
            args.repo_id,
            args.model,
            private=args.private,
            create_pr=args.create_pr,
            revision=args.revision,
            dry_run=args.dry_run,
            overwrite_card=args.overwrite_card,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except PublishError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the Space's files cannot be written: {error}") from error
    report_push(done)
    return 0
