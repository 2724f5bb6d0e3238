"""`unit data generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import positive


def add_parser(commands) -> None:
    """Add the command to the sub-parsers of `unit data`."""
    made = commands.add_parser(
        "generate",
        help="made data by the million: on this machine, a Slurm cluster or Ray",
        description="Write parquet shards of made rows with a manifest. The same command goes on where a run broke "
        "off; the bytes are the same for any number of tasks, workers and interruptions.",
        epilog="example: unit data generate pages --count 1000000 --seed 1 --out pages-1m --workers 8",
    )
    made.add_argument(
        "kind", metavar="RECIPE_OR_KIND", help="pages, dense or sparse, or a YAML file with `kind` and `settings`"
    )
    made.add_argument("--count", type=positive, required=True, metavar="N", help="rows")
    made.add_argument("--shard-rows", type=positive, default=5000, metavar="M", help="rows of a shard (5,000)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--split", choices=("train", "validation"), default="train", help="decides fonts and texts")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    made.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="datatrove's (local)")
    made.add_argument("--tasks", type=positive, metavar="T", help="parts that the shards are dealt to")
    made.add_argument("--workers", type=positive, default=1, metavar="W", help="tasks that run at once")
    made.add_argument("--dry-run", action="store_true", help="write and submit nothing; Slurm's script is printed")
    slurm = made.add_argument_group("of --executor slurm and ray")
    slurm.add_argument("--cpus-per-task", type=positive, default=1)
    slurm.add_argument("--memory-gb", type=positive, default=2, help="of each CPU")
    slurm.add_argument("--partition", help="slurm; needed")
    slurm.add_argument("--time", default="24:00:00", help="slurm: limit of a job (24:00:00)")
    slurm.add_argument("--qos", default="", help="slurm")
    slurm.add_argument("--environment", metavar="COMMAND", help="slurm: shell line that activates the environment")
    slurm.add_argument("--max-array", type=positive, default=1001, help="slurm: longest array the cluster takes")
    slurm.add_argument("--sbatch", nargs="+", default=[], metavar="KEY=VALUE", help="slurm: more #SBATCH settings")


def run(args: argparse.Namespace) -> int:
    """Make the shards, or submit the jobs that do."""
    from training.data.generate import MANIFEST, generate

    manifest = generate(
        read_plan(args),
        args.out,
        executor=args.executor,
        tasks=args.tasks,
        workers=args.workers,
        options=executor_options(args),
        dry_run=args.dry_run,
        progress=sys.stderr.isatty(),
        say=lambda line: print(line, flush=True),
    )
    if manifest is not None:
        refused = list(manifest["refused"].values())
        print(
            f"{args.out}: {manifest['rows']:,} rows in {len(manifest['shards'])} shards, "
            f"{manifest['bytes'] / 1e6:,.1f} MB, {sum(one['refused'] for one in refused)} refused; see {MANIFEST}"
        )
        for reason, told in (pair for one in refused for pair in one["reasons"].items()):
            print(f"{told['count']:>12,}  {reason}")
    return 0


def read_plan(args: argparse.Namespace):
    """The plan that the arguments and, if one is named, the recipe describe."""
    import yaml

    from training.data.generate import Plan

    kind, settings = args.kind, {}
    if kind.endswith((".yaml", ".yml")) or Path(kind).is_file():
        recipe = yaml.safe_load(Path(kind).read_text(encoding="utf-8"))
        if not isinstance(recipe, dict) or not isinstance(recipe.get("kind"), str) or {*recipe} - {"kind", "settings"}:
            raise ValueError(f"{kind}: a recipe has `kind`, a name, and `settings`, a mapping, and nothing else")
        kind, settings = recipe["kind"], recipe.get("settings") or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{args.kind}: settings must be a mapping, not {settings!r}")
    return Plan(kind, args.count, args.shard_rows, args.seed, args.split, settings)


def executor_options(args: argparse.Namespace) -> dict:
    """What datatrove's executor is told beyond tasks and workers."""
    if args.executor == "local":
        return {}
    options = {"cpus_per_task": args.cpus_per_task, "mem_per_cpu_gb": args.memory_gb}
    if args.executor == "ray":
        return options
    if not args.partition:
        raise ValueError("--executor slurm needs --partition (`sinfo` lists them)")
    extra = dict(pair.partition("=")[::2] for pair in args.sbatch)
    options |= {"time": args.time, "partition": args.partition, "qos": args.qos, "env_command": args.environment}
    return options | {"max_array_size": args.max_array, "sbatch_args": extra, "job_name": f"unit-{args.out.name}"}
