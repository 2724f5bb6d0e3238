"""`unit data check-leaks`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    leaks = commands.add_parser("check-leaks", help="look for validation data in the training data")
    leaks.add_argument("--train", nargs="+", type=Path, metavar="FOLDER", help="default: all …-train in the cache")
    leaks.add_argument("--validation", nargs="+", type=Path, metavar="FOLDER", help="default: all …-validation")


def run(args: argparse.Namespace) -> int:
    """Compare the sets: 0, or 1 when something of validation is in training."""
    from training.data.heldout import find_leaks
    from training.data.sources import data_folder

    train = args.train or _built(data_folder(""), "train")
    validation = args.validation or _built(data_folder(""), "validation")
    if not train or not validation:
        raise ValueError(f"{data_folder('')} holds no data sets to compare: build some first (`unit data --help`)")
    leaks = find_leaks(train, validation)
    for leak in leaks[:20]:
        print(leak)
    names = [", ".join(folder.name for folder in folders) for folders in (train, validation)]
    print(f"{len(leaks) or 'no'} leaks of {names[1]} into {names[0]}")
    return 1 if leaks else 0


def _built(parent: Path, split: str) -> list[Path]:
    return [folder for folder in sorted(parent.glob(f"*-{split}")) if any(folder.glob("*.parquet"))]
