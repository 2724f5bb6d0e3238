"""`unit features PATH... --out FILE.safetensors`: the encoder's features of pictures and pages.

`--pca FILE.png` draws them instead or as well, each picture at several sizes; see docs/features.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .common import CommandError, Progress, add_model_argument, complain, groups, load, positive
from .inputs import open_inputs

PARTS = ("class", "mean", "spatial", "attention")
SIZES = [128, 256, 512]  # unit-tiny's x1, its x4, and as much again


def add_parser(subparsers) -> None:
    """Add `features` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "features",
        help="write the encoder's features to a safetensors file",
        description="Write NAME/pooled (width) and NAME/spatial (rows, columns, width) of each picture, float32, with "
        "NAME the path as given, followed by #PAGE for pages of a PDF. With --layers: NAME/layer3/PART for each layer "
        "and part.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="picture, page or PDF")
    parser.add_argument("--out", metavar="FILE.safetensors")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="N",
        help="layers to write: 0 is the input of the first block, 1 its output, -1 the last (default: the model's "
        "output)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="what to write of each layer: the class token, the mean of the patches, the grid of patches, the class "
        "token's attention to each patch (default: class where there is one, spatial); needs --layers",
    )
    parser.add_argument(
        "--pca",
        metavar="FILE.png",
        help="draw the first three principal components as colours, each picture at every one of --sizes; of the last "
        "of --layers",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=positive,
        default=SIZES,
        metavar="SIDE",
        help="for --pca: side in pixels of the square whose area the picture gets (default: "
        f"{' '.join(str(size) for size in SIZES)})",
    )
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
    """Encode, write, draw, and return 2 if any input was refused."""
    _check_arguments(args)
    model, processor, name = load(args.model, args.device, "AutoModel", "AutoImageProcessor")
    import torch

    if not hasattr(processor, "base_size"):
        raise CommandError(f"{name}: not a UNIT model ({model.config.model_type}); its own library gives its features")
    if args.scale not in (None, 1, processor.scale_factor):
        raise CommandError(f"--scale must be 1 or {processor.scale_factor} with {name}, got {args.scale}")
    scale = args.scale or (1 if args.kind == "natural" else processor.scale_factor)
    found, drawn, status = {}, [], 0
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
            keys = [item.path if item.page is None else f"{item.path}#{item.page}" for item in items]
            if args.out is not None:
                images = [item.image for item in items]
                inputs = processor(images, kind=args.kind, scale=scale, return_packed=True, return_tensors="pt")
                for key, features in zip(keys, _features(model, inputs.to(args.device), args), strict=True):
                    for part, value in features.items():
                        found[f"{key}/{part}"] = value.float().cpu().clone(memory_format=torch.contiguous_format)
            if args.pca is not None:
                layer = -1 if args.layers is None else args.layers[-1]
                for key, item in zip(keys, items, strict=True):
                    drawn.append((key, item.image, grids(model, processor, item.image, args.sizes, layer)))
            progress(len(items), len(items))
    if not found and not drawn:
        raise CommandError("no input could be read; nothing was written")
    if args.out is not None:
        from safetensors.torch import save_file

        settings = {"model": name, "kind": args.kind, "scale": scale}
        _write("--out", args.out, lambda path: save_file(found, path, metadata={"unit": json.dumps(settings)}))
        count = len({key.rsplit("/layer" if args.layers else "/", 1)[0] for key in found})
        print(f"{args.out}: features of {count} picture{'s' if count != 1 else ''}")
    if args.pca is not None:
        from .feature_sheet import draw

        sheet = draw(drawn, args.sizes)
        _write("--pca", args.pca, lambda path: sheet.save(path, format="PNG", optimize=True))
        print(
            f"{args.pca}: {len(drawn)} picture{'s' if len(drawn) != 1 else ''} at {len(args.sizes)} "
            f"size{'s' if len(args.sizes) != 1 else ''}"
        )
    return status


def _check_arguments(args: argparse.Namespace) -> None:
    if args.out is None and args.pca is None:
        raise CommandError("nothing to write: give --out FILE.safetensors, --pca FILE.png or both")
    if args.parts and (not args.layers or args.out is None):
        raise CommandError("--parts are written for chosen layers: give --layers and --out as well")
    for option, value, suffix in (("--out", args.out, ".safetensors"), ("--pca", args.pca, ".png")):
        if value is None:
            continue
        if Path(value).suffix != suffix:
            raise CommandError(f"{option} {value}: the name must end in {suffix}")
        if not Path(value).absolute().parent.is_dir():
            raise CommandError(f"{option} {value}: there is no folder {Path(value).absolute().parent}")


def _features(model, inputs, args: argparse.Namespace) -> Iterator[dict]:
    """Name -> tensor, of each picture of a pack (see `packing_unit`)."""
    from modeling_unit.architectures_unit import run_encoder_packed
    from modeling_unit.packing_unit import unpatchify

    encoder = getattr(model, "vision_model", model)
    pixel_values, grids = inputs["pixel_values"], inputs["image_grid_hw"].tolist()
    if args.layers is None:
        output = run_encoder_packed(encoder, pixel_values, inputs["image_grid_hw"])
        for index, (tokens, grid) in enumerate(zip(output.split(), grids, strict=True)):
            pooled = tokens[0] if output.pooler_output is None else output.pooler_output[index]
            yield {"pooled": pooled, "spatial": tokens[-grid[0] * grid[1] :].unflatten(0, grid)}
        return
    parts = args.parts or ["class", "spatial"]
    own = pixel_values.split([rows * cols for rows, cols in grids])
    for patches, grid in zip(own, grids, strict=True):
        found = {}
        pixels = unpatchify(patches[None], *grid, encoder.config.patch_size)
        for one in _layers(model, pixels, args.layers, "attention" in parts):
            values = {
                "class": None if one.class_token is None else one.class_token[0],
                "mean": one.mean[0],
                "spatial": one.spatial[0].permute(1, 2, 0),  # (rows, cols, D)
                "attention": None if one.attention is None else one.attention[0],
            }
            for part in parts:
                if values[part] is None and args.parts is None:
                    continue  # SigLIP has no class token; nobody asked for it
                if values[part] is None:
                    raise CommandError(f"--parts {part}: layer {one.layer} of this encoder has none")
                found[f"layer{one.layer}/{part}"] = values[part]
        yield found


def _layers(model, pixel_values, layers: list[int], attention: bool = False) -> list:
    from modeling_unit import layer_features

    try:
        return layer_features(model, pixel_values, layers, attention=attention)
    except ValueError as error:
        raise CommandError(str(error)) from error


def grids(model, processor, image, sizes: list[int], layer: int) -> list:
    """Features `(rows, cols, D)` of one picture at several sizes, its aspect kept.

    Args:
        sizes: side in pixels of the square that has the area wanted, each.
    """
    import torch
    from PIL import Image

    from modeling_unit import nearest_supported_size
    from modeling_unit.image_processing_unit import to_rgb

    image, found = to_rgb(image), []
    for size in sizes:
        factor = size / (image.width * image.height) ** 0.5
        height, width = nearest_supported_size(model.config, image.height * factor, image.width * factor)
        pixels = processor.normalize(image.resize((width, height), Image.Resampling.BICUBIC))
        (one,) = _layers(model, torch.from_numpy(pixels)[None].to(model.device), [layer])
        found.append(one.spatial[0].permute(1, 2, 0).float().cpu())
    return found


def _write(option: str, name: str, save) -> None:
    """Write beside, then rename."""
    out = Path(name)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        save(temporary)
        temporary.replace(out)
    except OSError as error:
        raise CommandError(f"{option} {out}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
