"""`unit llava TOWER LLM OUT`: a LLaVA checkpoint from its parts; or the tower alone, as others know it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .common import CommandError, first_line, missing_folder, positive, quiet

ARCHITECTURES = ("unit", "vit", "clip")


def layers(text: str) -> int | list[int]:
    """`-2`, or several as `-2,-1`."""
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be a number, or numbers with commas between, got {text!r}")
    numbers = [int(one) for one in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def add_parser(subparsers) -> None:
    """Add `llava` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "llava",
        help="assemble a LLaVA model from a tower and a language model",
        description="Write a LlavaForConditionalGeneration with a fresh projector and the processor that fits, and "
        "check it with a picture. With --tower-only, write the encoder alone as a class that LLaVA knows.",
        epilog="examples: unit llava modeling_unit/checkpoints/unit-tiny Qwen/Qwen3-0.6B my-llava; "
        "unit llava modeling_unit/checkpoints/unit-tiny my-tower --tower-only clip --size 448",
    )
    parser.add_argument("tower", metavar="TOWER", help="folder or Hub id: UNIT, CLIP, SigLIP, DINOv2, ViT, ...")
    parser.add_argument("llm", metavar="LLM", nargs="?", help="folder or Hub id of a causal language model")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--size", type=positive, help="side of the square in pixels (default: the tower's)")
    parser.add_argument(
        "--select", choices=("default", "full"), help="drop the class token, or keep it (default: what fits)"
    )
    parser.add_argument(
        "--layer",
        type=layers,
        metavar="N[,N]",
        help="hidden states to look at, as --layer=-2,-1 (default: -1 of UNIT, -2 of others)",
    )
    parser.add_argument(
        "--tower-only",
        choices=ARCHITECTURES,
        metavar="CLASS",
        help="write only the tower: unit, vit (ViTModel, equal), clip (CLIPVisionModel, for the original LLaVA)",
    )


def run(args: argparse.Namespace) -> int:
    """Assemble or export; what does not fit is refused with one line."""
    if args.tower_only and args.llm:
        raise CommandError("--tower-only takes TOWER and OUT, no language model")
    if not args.tower_only and not args.llm:
        raise CommandError("TOWER, LLM and OUT are needed (or --tower-only with TOWER and OUT)")
    if args.tower_only and (args.select or args.layer is not None):
        raise CommandError("--select and --layer belong to LLaVA's model, not to its tower")
    names = [name for name in (args.tower, args.llm) if name]
    for name in names:
        missing_folder(name)
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise CommandError(f"{name}: no model there (the folder has no config.json)")
    quiet(None if all(Path(name).exists() for name in names) else "a Hub id")
    import transformers
    from safetensors import SafetensorError

    from modeling_unit.released_unit import released_folder

    transformers.logging.disable_progress_bar()
    if Path(args.tower).is_dir() and released_folder(args.tower) is not None:
        raise CommandError(f"{args.tower}: in the released format; convert it first: unit convert {args.tower} FOLDER")
    try:
        if args.tower_only:
            from training.llava_tower import export_tower

            model = export_tower(args.tower, args.out, args.tower_only, args.size)
            print(f"{args.out}: {type(model).__name__} for {model.config.image_size} pixels a side")
            return 0
        from training.llava_assembly import assemble

        found = assemble(args.tower, args.llm, args.out, args.size, args.select, args.layer)
    except (ValueError, OSError, SafetensorError) as error:
        raise CommandError(first_line(error)) from error
    height, width = found["image_size"]
    print(f"{args.out}: LLaVA; a picture is {height} x {width} pixels and {found['image_tokens']} tokens")
    print(
        f"layer {found['layer']}, selection {found['select']}; checked with a picture and {found['new_tokens']} tokens"
    )
    for name, count in found["parameters"].items():
        print(f"  {name:<15}{count:>16,} parameters")
    print(f"next: unit train training/recipes/llava/1-projector.yaml start={args.out}")
    return 0
