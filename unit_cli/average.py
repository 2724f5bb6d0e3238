"""`unit average MODEL ... --out FOLDER`: the weighted mean of models of one architecture."""

from __future__ import annotations

import argparse

from .common import CommandError, first_line, quiet


def add_parser(subparsers) -> None:
    """Add `average` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "average",
        help="average the weights of late checkpoints, or of a model and its start",
        description="Write the weighted mean of models of one architecture, tensor by tensor. The first gives "
        "configuration, processor and code. A whole UNIT model and an encoder alone share the encoder: the other "
        "parts of the whole one stay as they are.",
        epilog="examples: unit average runs/a/checkpoint-800 runs/a/checkpoint-900 runs/a --out averaged; "
        "unit average runs/a openai-clip --weights 0.7 0.3 --out kept",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="folders of models or checkpoints, in safetensors")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each (default: equal)")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the folder to write; must be missing or empty")


def run(args: argparse.Namespace) -> int:
    """Average, and say what was written."""
    quiet(None)
    try:
        from training.averaging import average_models
    except ImportError as error:
        from .train import missing_extra

        raise CommandError(missing_extra(error)) from error
    try:
        done = average_models(args.models, args.out, args.weights)
    except (ValueError, OSError) as error:
        raise CommandError(first_line(error)) from error
    told = ", ".join(f"{weight:.3g} {model}" for weight, model in zip(done["weights"], args.models, strict=True))
    kept = f", {done['kept']} kept as in {args.models[0]}" if done["kept"] else ""
    print(f"{args.out}: mean of {done['tensors']} tensors ({told}){kept}")
    return 0
