"""`unit lmms MODEL --tasks ...`: lmms-eval on a LLaVA with UNIT's tower."""

from __future__ import annotations

import argparse
import shlex
import sys

from .common import CommandError, positive
from .train import missing_extra


def add_parser(subparsers) -> None:
    """Add `lmms` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "lmms",
        help="measure a LLaVA model with lmms-eval",
        description="Run tasks of lmms-eval on a LLaVA with UNIT's tower, or questions from a file of your own: JSON "
        "lines with image, question and answer.",
        epilog="examples: unit lmms --install; unit lmms my-llava --tasks docvqa_val,chartqa --limit 8; "
        "unit lmms my-llava --tasks receipts=receipts.jsonl",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="folder or Hub id of a LLaVA: `unit llava` makes one"
    )
    parser.add_argument(
        "--tasks",
        default="",
        metavar="TASK[,TASK]",
        help="lmms-eval's tasks by name (`python -m lmms_eval --tasks list`), or NAME=FILE.jsonl",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="the first N questions of each task (default: all)"
    )
    parser.add_argument("--out", default="lmms", metavar="DIR", help="folder to write to (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=8, help="questions at once (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--seed", type=int, default=0, help="where a task draws (default: %(default)s)")
    parser.add_argument(
        "--gen-kwargs", default="", metavar="K=V[,K=V]", help="over the tasks' own, such as max_new_tokens=128"
    )
    parser.add_argument("--python", metavar="PATH", help="interpreter that has lmms-eval (default: found)")
    parser.add_argument("--install", action="store_true", help="make an environment with lmms-eval in the cache first")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Install, measure, or both; 2 where a task could not be run, the others are done."""
    try:
        from training.evaluation.contract import NotMeasured
        from training.evaluation.lmms import environment
        from training.evaluation.lmms.run import Settings, evaluate, tables
    except ImportError as error:
        raise CommandError(missing_extra(error)) from error
    if args.model is None and not args.install:
        raise CommandError("MODEL and --tasks are needed (or --install)")
    settings = Settings(args.limit, args.batch_size, args.device, args.dtype, args.seed, args.gen_kwargs, args.python)
    try:
        if args.install:
            print(f"lmms-eval: {environment.install(not args.quiet)}")
        if args.model is None:
            return 0
        results = evaluate(
            args.model,
            [task.strip() for task in args.tasks.split(",") if task.strip()],
            args.out,
            settings,
            progress=not args.quiet,
            command=shlex.join(["unit", *sys.argv[1:]]),
        )
    except (ValueError, NotMeasured, RuntimeError) as error:
        raise CommandError(str(error)) from error
    print(tables(results))
    print(f"\nwritten to {args.out}/: report.md, results.json, lmms-eval/")
    measured = {row["evaluator"] for row in results["figures"]}
    missing = [note for note in results["notes"] if note["evaluator"] not in measured]
    for note in missing:
        print(f"unit lmms: {note['evaluator']}: {note['text']}", file=sys.stderr)
    return 2 if missing else 0
