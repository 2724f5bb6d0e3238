"""`unit evaluate MODEL ...`: held-out figures. The arguments are those of `training.evaluation.run`."""

from __future__ import annotations

import argparse

from .common import CommandError
from .train import missing_extra


def add_parser(subparsers) -> None:
    """Add `evaluate` to the sub-parsers of `unit`; all that follows is handed on as it is, `--help` too."""
    parser = subparsers.add_parser(
        "evaluate", help="measure a checkpoint on held-out pages and pictures", add_help=False
    )

    def hand_on(arguments=None, namespace=None):
        namespace = namespace or argparse.Namespace()
        namespace.arguments, namespace.run = list(arguments or ()), run
        return namespace, []

    parser.parse_known_args = hand_on


def run(args: argparse.Namespace) -> int:
    """Hand on to `training.evaluation.run.main`, whose exit status this returns."""
    try:
        from training.evaluation.run import main

        return main(args.arguments)
    except ImportError as error:  # the suites' modules are imported when they are asked for
        raise CommandError(missing_extra(error)) from error
