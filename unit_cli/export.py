"""`unit export MODEL OUT`: the encoder for ONNX Runtime and `torch.export`, checked against torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from .common import CommandError, Progress, load, quiet


def add_parser(subparsers) -> None:
    """Add `export` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "export",
        help="write the encoder for ONNX Runtime and torch.export",
        description="Write a folder with model.onnx (ONNX Runtime), model.pt2 (torch.export), the preprocessor's "
        "configuration and a README with code that runs it on numpy alone. Batch, height and width are dynamic. Both "
        "files are run beside torch at several sizes first: nothing is written if they differ. Needs "
        "pip install 'unit-vision[export]'.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder or an id on the Hugging Face Hub: UNIT, or a vision transformer"
    )
    parser.add_argument("out", metavar="OUT", help="a folder that is not there yet")


def run(args: argparse.Namespace) -> int:
    """Export, print how far either file is from torch, and where the folder is."""
    quiet(args.model)
    from modeling_unit.configuration_unit import PREFIX_TOKENS
    from training.evaluation.report import markdown_table
    from training.onnx_export import (
        CannotExport,
        ExportMismatch,
        MissingPackages,
        check_packages,
        difference_table,
        export_encoder,
    )

    try:
        check_packages()
    except MissingPackages as error:
        raise CommandError(str(error)) from error
    _check_architecture(args.model)
    model, _, name = load(args.model, "cpu", "AutoModel", None)
    encoder = model if model.config.model_type in PREFIX_TOKENS else model.vision_model
    processor = _image_processor(name, encoder.config)
    out = Path(args.out)
    print(f"tracing {name}: some ten seconds, more for a large encoder", file=sys.stderr, flush=True)
    try:
        with Progress("checking", "size") as progress:
            found = export_encoder(encoder, processor, out, Path(name).name, progress)
    except (CannotExport, ExportMismatch) as error:
        raise CommandError(f"{name}: {error}; nothing was written") from error
    except OSError as error:
        raise CommandError(str(error)) from error
    print(markdown_table(*difference_table(found)))
    files = sorted(path.name for path in out.iterdir())
    print(f"{out}: {', '.join(files)}; largest difference from torch {max(one.largest for one in found):.1e}")
    return 0


def _image_processor(name: str, config):
    """The model's own image processor; what describes one where its class cannot be made (DINOv3's needs torchvision)
    or none was saved."""
    from modeling_unit import UnitImageProcessor
    from modeling_unit.image_processing_unit import load_image_processor
    from modeling_unit.vision_sources_unit import native_processor

    try:
        return load_image_processor(name)
    except (OSError, ValueError, ImportError):
        settings = native_processor(config, UnitImageProcessor.from_vision_pretrained(name))
        return SimpleNamespace(**settings, to_json_string=lambda: json.dumps(settings))


def _check_architecture(model: str) -> None:
    """Before the weights are read: raise `CommandError` for a model without an encoder known here."""
    from modeling_unit.architectures_unit import FULL_MODELS, known_architecture
    from modeling_unit.vision_sources_unit import find_model_type

    try:
        kind = find_model_type(model)
        if kind is not None and kind not in FULL_MODELS:
            known_architecture(kind, model)
    except ValueError as error:
        raise CommandError(str(error)) from error
