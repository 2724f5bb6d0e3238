"""`unit data check-leaks`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .validate import read_sources


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    leaks = commands.add_parser(
        "check-leaks",
        help="look for validation data in the training data",
        description="Compare lines of text, fonts and pictures of training and validation. A source is a folder of "
        "shards, a data set on the Hub as OWNER/NAME[:SPLIT], which is streamed, or a .yaml file that describes data "
        "sets of any layout, a training recipe for one. Ends with 1 on any overlap.",
    )
    leaks.add_argument(
        "--train", nargs="+", metavar="SOURCE", help="default: all …-train and …-development in the cache"
    )
    leaks.add_argument("--validation", nargs="+", metavar="SOURCE", help="default: all held-out sets in the cache")


def run(args: argparse.Namespace) -> int:
    """Compare the sets: 0, or 1 when something of validation is in training."""
    from training.data.heldout import LeakCheck, cached_fonts, find_leaks, validation_text_filter, validation_text_path
    from training.data.refusals import Refusals
    from training.data.sources import data_folder

    train = _described(args.train) or _built(data_folder(""), "train")
    validation = _described(args.validation) or _built(data_folder(""), "validation")
    if not train or not validation:
        raise ValueError(f"{data_folder('')} holds no data sets to compare: build some first (`unit data --help`)")
    # What lies in the cache is compared too; nothing is fetched for it.
    texts = validation_text_filter().marks if validation_text_path().is_file() else frozenset()
    check, refusals = LeakCheck(texts, cached_fonts()), Refusals()
    leaks = find_leaks(train, validation, progress=sys.stderr.isatty(), check=check, refusals=refusals)
    for leak in leaks[:20]:
        print(leak)
    if len(leaks) > 20:
        print(f"and {len(leaks) - 20} more")
    for what, count in check.counts.items():
        print(f"{count:>12,}  {what}")
    print(f"{len(texts):>12,}  lines and runs of words of the held-out packages{'' if texts else ' (not built here)'}")
    if not check.fonts and check.families["train"]:
        print("fonts were compared by name alone: their files are not in the cache")
    if refusals.refused:
        print(f"not compared:\n{refusals}")
    names = [
        ", ".join(Path(source["path"] if isinstance(source, dict) else source).name for source in sources)
        for sources in (train, validation)
    ]
    print(f"{len(leaks) or 'no'} leaks of {names[1]} into {names[0]}")
    return 1 if leaks else 0


def _described(sources: list[str] | None) -> list[str | dict[str, Any]]:
    """The sources, with those that a .yaml file describes in its place."""
    found: list[str | dict[str, Any]] = []
    for source in sources or ():
        if source.endswith((".yaml", ".yml")):
            found += read_sources(Path(source))
        else:
            found.append(source)
    return found


def _built(parent: Path, split: str) -> list[Path]:
    folders = sorted(parent.glob(f"*-{split}"))
    if split == "validation":
        folders += sorted(parent.glob("evaluation-*"))
    else:  # what is chosen on a set is learnt from it
        folders += sorted(parent.glob("*-development"))
    return [folder for folder in folders if any(folder.glob("*.parquet"))]
