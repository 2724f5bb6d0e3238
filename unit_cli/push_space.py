"""`unit push-space OWNER/NAME --model MODEL_ID`: the browser demo of a model as a Space on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import os
import sys

from .common import CommandError, add_upload_options, report_push, upload_options
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
    add_upload_options(
        parser, "Space", revision="a Space runs its default branch alone", card="a README.md of the Space"
    )


def run(args: argparse.Namespace) -> int:
    """Publish; whatever stops it is one line, and then nothing was uploaded."""
    where = upload_options(args)
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
            **where,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except PublishError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the Space's files cannot be written: {error}") from error
    report_push(done)
    return 0
