"""What the commands of `unit data` have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(value: str) -> int:
    """An ``argparse`` type: a whole number of 1 or more."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return number


def add_out(parser: argparse.ArgumentParser) -> None:
    """``--out`` and ``--seed``."""
    parser.add_argument("--out", type=Path, help="parent folder of the data sets, default: the cache")
    parser.add_argument("--seed", type=int, default=0)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--workers``."""
    parser.add_argument("--workers", type=positive, default=1, help="processes; the result is the same for any number")


def parent(args: argparse.Namespace) -> Path:
    """The folder that data sets are written below."""
    from training.data.sources import data_folder

    return args.out or data_folder("")
