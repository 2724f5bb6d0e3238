"""`unit push RUN_OR_FOLDER OWNER/NAME`: a run or a model to the Hugging Face Hub, checked before, in one commit."""

from __future__ import annotations

import argparse
import os
import sys

from .common import CommandError, add_upload_options, report_push, upload_options
from .train import missing_extra


def add_parser(subparsers) -> None:
    """Add `push` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "push",
        help="publish a run or a model on the Hugging Face Hub",
        description="Export to a temporary folder with code and card, load that in a clean process, compare every "
        "weight and output with the model in memory, and only then upload, in one commit.",
        epilog="examples: unit push runs/my-run me/my-unit --private; "
        "unit push --adapter runs/my-lora me/my-adapter --base me/my-base",
    )
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="folder of a run, or of a saved UNIT model or encoder")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="repository on the Hub; made when it does not exist")
    parser.add_argument("--encoder-only", action="store_true", help="publish only the encoder of a full model")
    parser.add_argument(
        "--adapter", action="store_true", help="publish the run's LoRA adapter, not its merged weights"
    )
    parser.add_argument(
        "--base", metavar="OWNER/BASE", help="with --adapter: the base on the Hub, where the run started from a folder"
    )
    add_upload_options(parser)
    parser.add_argument(
        "--evaluation", metavar="FOLDER", help="what unit evaluate wrote (default: RUN_OR_FOLDER/evaluation if there)"
    )
    parser.add_argument(
        "--license", help="of the weights, as the Hub names it (default: apache-2.0; of an adapter, its base's)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="into a repository that holds another kind: adapter, model, encoder"
    )


def run(args: argparse.Namespace) -> int:
    """Publish; whatever stops it is one line, and then nothing was uploaded."""
    where = upload_options(args)
    if args.base is not None and not args.adapter:
        raise CommandError("--base goes with --adapter")
    if args.adapter and (args.encoder_only or args.evaluation is not None):
        other = "--encoder-only" if args.encoder_only else "--evaluation"
        raise CommandError(f"{other} does not go with --adapter")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers

        from training.publish import PublishError, publish

        if args.adapter:
            from training.publish_adapter import publish_adapter
    except ImportError as error:
        raise CommandError(missing_extra(error)) from error
    transformers.logging.disable_progress_bar()
    try:
        common = {
            **where,
            "replace": args.replace,
            "say": lambda line: print(line, file=sys.stderr, flush=True),
        }
        if args.adapter:
            done = publish_adapter(args.source, args.repo_id, base=args.base, license=args.license, **common)
        else:
            done = publish(
                args.source,
                args.repo_id,
                encoder_only=args.encoder_only,
                evaluation=args.evaluation,
                license=args.license or "apache-2.0",
                **common,
            )
    except PublishError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the export cannot be written: {error}") from error
    report_push(done)
    return 0
