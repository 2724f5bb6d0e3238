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


def x_height(value: str) -> tuple[float, float]:
    """An ``argparse`` type: ``8`` or ``6-12``, in pixels."""
    low, dash, high = value.partition("-")
    try:
        return float(low), float(high if dash else low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number such as 8 or a range such as 6-12, not {value}") from None


def share(value: str) -> float:
    """An ``argparse`` type: a number in 0 ... 1."""
    number = float(value)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0 ... 1, not {value}")
    return number


def add_max_refused(parser: argparse.ArgumentParser, what: str) -> None:
    """``--max-refused``."""
    parser.add_argument(
        "--max-refused", type=share, default=0.05, metavar="SHARE", help=f"{what}, default: %(default)s; 1: never"
    )


def add_out(parser: argparse.ArgumentParser, help: str | None = None) -> None:
    """``--out`` and ``--seed``."""
    parser.add_argument("--out", type=Path, help=help or "parent folder of the data sets, default: the cache")
    parser.add_argument("--seed", type=int, default=0)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--workers``."""
    parser.add_argument("--workers", type=positive, default=1, help="processes; the result is the same for any number")


def parent(args: argparse.Namespace) -> Path:
    """The folder that data sets are written below."""
    from training.data.sources import data_folder

    return args.out or data_folder("")
