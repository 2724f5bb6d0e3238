"""`unit data validate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_max_refused, positive


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    validate = commands.add_parser(
        "validate", help="look at a data set: what it holds, what of it cannot be used, and a contact sheet"
    )
    validate.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a folder, a file, the name of a set in the cache, or a Hub id"
    )
    validate.add_argument("--layout", help="how its columns map onto the schema, see docs/data.md")
    validate.add_argument("--task", help="of its rows, where neither it nor the layout says so")
    validate.add_argument("--kind", help="as --task")
    validate.add_argument("--split", help="of the data set, default: train")
    validate.add_argument("--recipe", type=Path, metavar="FILE", help="YAML that describes one source or several")
    validate.add_argument("--limit", type=positive, help="look at so many rows at most")
    add_max_refused(validate, "the set is unfit when more than this share of its rows is refused")
    validate.add_argument(
        "--out", type=Path, metavar="DIR", help="for validation.json and contact_sheet.png, default: validation-NAME"
    )


def run(args: argparse.Namespace) -> int:
    """Look at the sources: 0, or 1 when one is unfit."""
    from training.data.mapping import read_source
    from training.data.refusals import Refusals
    from training.data.validation import validate_rows, write_report

    sources = _sources(args)
    names = _names([source["path"] for source in sources])
    fit = True
    for source, name in zip(sources, names, strict=True):
        rows = read_source(source, streaming=True, refusals=Refusals(max_share=1.0))
        report = validate_rows(rows, args.limit, args.max_refused)
        if args.out is None:
            out = Path(f"validation-{name}")
        else:
            out = args.out / name if len(sources) > 1 else args.out
        write_report(report, out)
        print(report)
        print(f"  {'report':<16}{out / 'validation.json'}" + (f", {out / 'contact_sheet.png'}" if report.rows else ""))
        fit &= not report.problems
    return 0 if fit else 1


def _sources(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What to look at, as `DatasetArguments` would have it."""
    given = {key: getattr(args, key) for key in ("layout", "task", "kind", "split") if getattr(args, key)}
    if args.recipe is None:
        if args.source is None:
            raise ValueError("name a data set, or a --recipe that does")
        return [{"path": args.source, **given}]
    found = read_sources(args.recipe)
    if args.source is not None:
        if len(found) > 1:
            raise ValueError(f"{args.recipe} describes {len(found)} sources: leave out {args.source}")
        given["path"] = args.source
    sources = [source | given for source in found]
    if any("path" not in source for source in sources):
        raise ValueError(f"{args.recipe}: a source lacks the key 'path'")
    return sources


def read_sources(path: Path) -> list[dict[str, Any]]:
    """The sources of a YAML file: of a training recipe with `groups` or `data.sources`, of a list `sources`, of one
    `dataset`, or the keys of one.

    Raises:
        ValueError: no such file, no YAML, no sources.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"there is no recipe at {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping")
    try:
        given = [source for group in data.get("groups") or () for source in group.get("sources") or ()]
        given += [*(data.get("sources") or ()), *((data.get("data") or {}).get("sources") or ())]
        # weights and the like are the mixture's business
        found = [source.get("dataset") or {"path": source["path"]} for source in given]
        found = found or [data.get("dataset") or data]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}: sources must be mappings with `path` or `dataset`") from None
    unique = [dict(source) for place, source in enumerate(found) if source not in found[:place]]
    if not unique:
        raise ValueError(f"{path} names no sources")
    return unique


def _names(paths: list[str]) -> list[str]:
    """Names for folders: the ends of the paths, with a number where two are alike."""
    ends = [Path(path.rstrip("/*")).name.replace("*", "") or "data" for path in paths]
    return [end if ends.count(end) == 1 else f"{end}-{ends[:place].count(end) + 1}" for place, end in enumerate(ends)]
