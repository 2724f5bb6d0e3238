"""`unit data pictures`."""

from __future__ import annotations

import argparse

from .options import add_out, parent


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    add_out(commands.add_parser("pictures", help="captioned pictures from Debian and npm packages"))


def run(args: argparse.Namespace) -> int:
    """Build pictures-train and pictures-validation."""
    from training.data import pictures

    report = pictures.build(parent(args), args.seed)
    print(
        f"{parent(args)}: {report['train']['rows']} pictures to train on, {report['validation']['rows']} to validate"
    )
    return 0
