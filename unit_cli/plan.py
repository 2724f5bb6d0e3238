"""`unit plan RECIPE.yaml --hardware 8xH100-80GB`: what a run will take, before it runs."""

from __future__ import annotations

import argparse
import json
import os
import warnings

from .common import CommandError, first_line, positive, quiet
from .train import missing_extra


def add_parser(subparsers) -> None:
    """Add `plan` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "plan",
        help="parameters, memory, step time and days of a recipe on given hardware",
        description="What a recipe will take, from a documented model (training/plan.py). Exit status 1: it does not "
        "fit.",
        epilog="example: unit plan training/recipes/vit-h/1-intra-scale.yaml --hardware 8xH100-80GB",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings in place of the recipe's, right behind it"
    )
    parser.add_argument("--hardware", default="8xH100-80GB", metavar="NxDEVICE", help="8xH100-80GB, RTX4090, cpu ...")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="over several devices")
    parser.add_argument("--document-tokens", type=positive, default=1024, help="of a page, where the data is not here")
    parser.add_argument("--caption-tokens", type=positive, default=64, help="of a caption, likewise")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 1 when the batch does not fit."""
    quiet(args.recipe)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)  # of settings that transformers renames
    try:
        from training.plan import Assumed, make_plan, plan_text
    except ImportError as error:
        raise CommandError(missing_extra(error)) from error
    try:
        assumed = Assumed(document=args.document_tokens, caption=args.caption_tokens)
        plan = make_plan(
            args.recipe, args.hardware, strategy=args.strategy, overrides=list(args.overrides), assumed=assumed
        )
    except (ValueError, OSError) as error:
        raise CommandError(first_line(error)) from error
    print(json.dumps(plan.as_dict(), indent=1) if args.json else plan_text(plan))
    return 0 if plan.fits else 1
