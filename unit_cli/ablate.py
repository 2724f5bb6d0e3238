"""`unit ablate FILE.yaml --out DIR`: train a grid of variants over seeds, measure them, table them."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import CommandError, first_line
from .train import missing_extra


def add_parser(subparsers) -> None:
    """Add `ablate` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "ablate",
        help="train variants of recipes over several seeds, and table what each choice brings",
        description="Train every variant of a file with every seed, measure the models and table the figures, each "
        "with its difference to the first variant and 95% intervals over seeds. Stages that variants share are "
        "trained once; the same command goes on where it was interrupted, and prints the table when all is done.",
        epilog="example: unit ablate training/recipes/ablations/unit-tiny.yaml --out runs/ablations",
    )
    parser.add_argument("file", metavar="FILE.yaml", help="stages, variants, seeds: see training/ablations.py")
    parser.add_argument("--out", metavar="DIR", help="where trainings and results go")
    parser.add_argument("--only", metavar="NAME,...", type=_names, help="these variants alone")
    parser.add_argument("--seeds", metavar="N,...", type=_numbers, help="in place of the file's")
    parser.add_argument("--list", action="store_true", help="show variants and trainings; nothing is run")
    parser.add_argument("--table", action="store_true", help="show what is measured so far; nothing is run")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Run the grid, or show it; a file that makes no sense is refused with one line."""
    if args.out is None and not args.list:
        raise CommandError("--out DIR is needed: the folder for trainings and results")
    try:
        from training import ablation_table, ablations

        grid = ablations.read_grid(args.file)
        seeds = ablations.checked_seeds(grid.seeds if args.seeds is None else args.seeds)
        if args.list:
            listed(ablations.plan(grid, args.out or "DIR", seeds, args.only), grid)
            return 0
        if args.table:
            results = ablations.read_results(args.out)
            if not results:
                raise CommandError(f"{args.out}: nothing has been measured there yet")
        else:
            if len(seeds) < ablation_table.LEAST:
                print(f"{len(seeds)} of the {ablation_table.LEAST} seeds that an interval needs: there will be none")
            try:
                results = ablations.run_grid(grid, args.out, seeds, args.only, say=_say)
            except KeyboardInterrupt:
                raise CommandError(
                    f"interrupted; the same command goes on, and --table shows what {args.out} has so far"
                ) from None
        if args.table:
            ablation_table.write_table(grid, results, Path(args.out))
        print((Path(args.out) / ablation_table.TABLE).read_text(encoding="utf-8"), end="")
    except ImportError as error:
        raise CommandError(missing_extra(error)) from error
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(first_line(error)) from error
    return 1 if any(each.get("failed") for each in results.get("runs", [])) else 0


def listed(runs: list, grid) -> None:
    """Print every variant with its trainings of the first seed."""
    first = [run for run in runs if run.seed == runs[0].seed]
    about = {variant.name: variant.about for variant in grid.variants}
    for run in first:
        told = []
        for training in run.trainings:
            steps = training.recipe["training"].get("max_steps")
            shared = "" if training.variant == run.variant else f", {training.variant}'s"
            told.append(f"{training.stage} ({steps} steps{shared})")
        print(f"{run.variant}: {about[run.variant]}")
        print(f"    {' -> '.join(told)}")
    trainings = {training.key for run in runs for training in run.trainings}
    print(f"{len(runs)} runs over {len(runs) // len(first)} seeds, {len(trainings)} trainings in all")


def _say(line: str) -> None:
    print(line, flush=True)
