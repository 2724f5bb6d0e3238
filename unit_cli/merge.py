"""`unit merge ADAPTER OUT`: a LoRA adapter and its base become one plain model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .common import CommandError, first_line, quiet

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers) -> None:
    """Add `merge` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "merge",
        help="merge a LoRA adapter into its base",
        description="Write the plain architecture, with processor, tokenizer and code as any export, from a LoRA "
        "adapter and the model that it was trained on (UNIT or LLaVA). Merging happens in float32.",
        epilog="example: unit merge runs/unit-lora/adapter my-model",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id; of a run, its folder adapter/")
    parser.add_argument("out", metavar="OUT", help="the folder to write; must be missing or empty")
    parser.add_argument("--base", metavar="BASE", help="folder or Hub id (default: what the adapter names)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights on disk (default: the base's)")


def run(args: argparse.Namespace) -> int:
    """Merge, and say what was written."""
    quiet(None if all(Path(one).exists() for one in (args.adapter, args.base or _recorded(args.adapter))) else "an id")
    try:
        import torch
        import transformers

        from training.adapter import merge_adapter
    except ImportError as error:
        from .train import missing_extra

        raise CommandError(missing_extra(error)) from error
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        merged = merge_adapter(args.adapter, args.out, args.base, dtype)
    except (ValueError, OSError) as error:
        raise CommandError(first_line(error)) from error
    dtype = str(merged.dtype).removeprefix("torch.")
    print(f"{args.out}: {merged.model_class} in {dtype}, adapter of {merged.layers} layers merged into {merged.base}")
    if merged.other_base:
        print(
            f"unit merge: {merged.base} does not hold the weights that {args.adapter} was trained on: the merged "
            "model is not what was trained",
            file=sys.stderr,
        )
    if merged.full_parts:
        print(f"trained in full and taken from the adapter: {', '.join(merged.full_parts)}")
    return 0


def _recorded(adapter: str) -> str:
    """The base that an adapter's folder names; empty where there is none."""
    try:
        return (
            json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
            or ""
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""
