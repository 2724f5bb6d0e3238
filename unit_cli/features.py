"""`unit features PATH... --out FILE.safetensors`: the encoder's features of pictures and pages."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .common import CommandError, Progress, add_model_argument, complain, groups, load, positive
from .inputs import open_inputs


def add_parser(subparsers) -> None:
    """Add `features` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "features",
        help="write the encoder's features to a safetensors file",
        description="Write NAME/pooled (width) and NAME/spatial (rows, columns, width) of each picture, float32, with "
        "NAME the path as given, followed by #PAGE for pages of a PDF.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="picture, page or PDF")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors")
    parser.add_argument(
        "--kind",
        choices=("natural", "document"),
        default="natural",
        help="documents are never enlarged (default: natural)",
    )
    parser.add_argument(
        "--scale", type=positive, help="1, or 4 as the model means it (default: 1 for natural, 4 for document)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        help="pictures encoded at once, each at its own size, none padded (default: 8)",
    )
    add_model_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Encode, write, and return 2 if any input was refused."""
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise CommandError(f"--out {out}: the name must end in .safetensors")
    if not out.absolute().parent.is_dir():
        raise CommandError(f"--out {out}: there is no folder {out.absolute().parent}")
    model, processor, name = load(args.model, args.device, "AutoModel", "AutoImageProcessor")
    import torch
    from safetensors.torch import save_file

    if not hasattr(processor, "base_size"):
        raise CommandError(f"{name}: not a UNIT model ({model.config.model_type}); its own library gives its features")
    if args.scale not in (None, 1, processor.scale_factor):
        raise CommandError(f"--scale must be 1 or {processor.scale_factor} with {name}, got {args.scale}")
    scale = args.scale or (1 if args.kind == "natural" else processor.scale_factor)
    found, status = {}, 0
    with Progress("encoding", "picture") as progress, torch.inference_mode():
        for group in groups(open_inputs(args.paths), args.batch_size):
            items = []
            for item in group:
                if item.error:
                    complain("features", item.error)
                    status = 2
                    continue
                if item.note:
                    complain("features", f"{item.name}: {item.note}")
                items.append(item)
            if not items:
                continue
            progress.add(len(items))
            images = [item.image for item in items]
            inputs = processor(images, kind=args.kind, scale=scale, return_packed=True, return_tensors="pt")
            inputs = inputs.to(args.device)
            encoded = encode(model, inputs["pixel_values"], inputs["image_grid_hw"])
            for item, (tokens, pooled, grid) in zip(items, encoded, strict=True):
                key = item.path if item.page is None else f"{item.path}#{item.page}"
                found[f"{key}/pooled"] = pooled.float().cpu().clone()
                found[f"{key}/spatial"] = tokens[-grid[0] * grid[1] :].unflatten(0, grid).float().cpu().clone()
            progress(len(items), len(items))
    if not found:
        raise CommandError("no input could be read; nothing was written")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        save_file(found, temporary, metadata={"unit": json.dumps({"model": name, "kind": args.kind, "scale": scale})})
        temporary.replace(out)
    except OSError as error:
        raise CommandError(f"--out {out}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    count = len(found) // 2
    print(f"{out}: features of {count} picture{'s' if count != 1 else ''}")
    return status


def encode(model, pixel_values, image_grid_hw) -> Iterator[tuple]:
    """Tokens `(L_i, D)`, pooled output `(D,)` and grid of each image of a pack (see `packing_unit`). An encoder that
    takes no packs, a plain one of transformers, sees one image at a time."""
    from modeling_unit.packing_unit import unpatchify

    grids = image_grid_hw.tolist()
    if model.config.model_type in ("unit", "unit_vision_model"):
        output = model(pixel_values, image_grid_hw=image_grid_hw)
        images, pooled = output.split(), output.pooler_output
    else:
        own = pixel_values.split([rows * cols for rows, cols in grids])
        patch = model.config.patch_size
        outputs = [model(unpatchify(each[None], *grid, patch)) for each, grid in zip(own, grids, strict=True)]
        images = [output.last_hidden_state[0] for output in outputs]
        pooled = [output.pooler_output for output in outputs]
        pooled = None if pooled[0] is None else [each[0] for each in pooled]
    for index, (tokens, grid) in enumerate(zip(images, grids, strict=True)):
        yield tokens, tokens[0] if pooled is None else pooled[index], grid
