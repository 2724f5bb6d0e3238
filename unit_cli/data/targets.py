"""`unit data targets`."""

from __future__ import annotations

import argparse

from .options import add_out, parent


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    add_out(commands.add_parser("targets", help="features, logits and sentence embeddings for pictures-train"))


def run(args: argparse.Namespace) -> int:
    """Ask the teachers of recognition."""
    from training.data import targets

    targets.build(parent(args), args.seed)
    return 0
