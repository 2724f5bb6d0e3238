"""`unit train RECIPE.yaml [key=value ...]`: run a recipe, or go on with one that was interrupted."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .common import CommandError, first_line


def add_parser(subparsers) -> None:
    """Add `train` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "train",
        help="run a training recipe, or go on with it",
        description="Run a recipe. The same command goes on from the last checkpoint in its output folder.",
        epilog="example: unit train training/recipes/unit-tiny/2-intra-scale.yaml training.max_steps=100",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the recipe's")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on from a checkpoint although the recipe has changed in a way that changes the curve",
    )


def run(args: argparse.Namespace) -> int:
    """Train; a recipe that makes no sense is refused with one line."""
    if not Path(args.recipe).is_file():
        raise CommandError(f"{args.recipe}: no such recipe")
    for override in args.overrides:
        if "=" not in override:
            raise CommandError(f"{override!r} is not of the form key=value")
    try:
        from training import recipe
    except ImportError as error:
        raise CommandError(missing_extra(error)) from error
    try:
        folder = recipe.main(args.recipe, list(args.overrides), args.accept_changes)
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(first_line(error)) from error
    if os.environ.get("RANK", "0") == "0":  # under `accelerate launch` there are others
        print(f"the model is in {folder}")
    return 0


def missing_extra(error: ImportError) -> str:
    """What to install when a part of the extra `train` is missing."""
    return f"{first_line(error)}: training and evaluation need more packages: pip install 'unit-vision[train]'"
