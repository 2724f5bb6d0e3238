"""From a trained run to a folder that anyone can load: weights, code, configuration, processor, provenance."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForPreTraining, AutoProcessor

from modeling_unit import (
    UnitForConditionalGeneration,
    UnitForPreTraining,
    UnitImageProcessor,
    UnitModel,
    UnitProcessor,
    UnitVisionModel,
)


# config.auto_map of a full repository: one folder serves every Auto class
FULL_AUTO_MAP = {
    "AutoConfig": "configuration_unit.UnitConfig",
    "AutoModel": "modeling_unit.UnitModel",
    "AutoModelForImageTextToText": "modeling_unit.UnitForConditionalGeneration",
    "AutoModelForPreTraining": "modeling_unit.UnitForPreTraining",
}
ENCODER_AUTO_MAP = {
    "AutoConfig": "configuration_unit.UnitVisionConfig",
    "AutoModel": "encoder_unit.UnitVisionModel",
}
PROCESSOR_AUTO_MAP = {
    "AutoProcessor": "processing_unit.UnitProcessor",
    "AutoImageProcessor": "image_processing_unit.UnitImageProcessor",
}
# Files of a run that travel with its weights
PROVENANCE = ("recipe.json", "log.jsonl", "curve.png")


def code_files() -> list[Path]:
    """The flat files of `modeling_unit/` that ship with a checkpoint."""
    import modeling_unit

    return sorted(Path(modeling_unit.__file__).parent.glob("*_unit.py"))


def copy_code(folder: Path) -> None:
    for file in code_files():
        shutil.copy(file, folder / file.name)


def export_model(
    source: str | Path, destination: str | Path, dtype: torch.dtype = torch.bfloat16, with_code: bool = True
) -> Path:
    """Write a trained UNIT model as a repository folder.

    The auxiliary character head is left out; the vision decoder and the projection stay.

    Args:
        source: folder of a run, as `unit train` saves it. destination: made when missing.
        dtype: of the weights on disk.
        with_code: copy the model code beside the weights, for `trust_remote_code=True`.
    """
    source, destination = Path(source), Path(destination)
    model = AutoModelForPreTraining.from_pretrained(source, num_character_classes=0)
    processor = AutoProcessor.from_pretrained(source)
    save_full(model, processor, destination, dtype, with_code)
    for name in PROVENANCE:
        if (source / name).is_file():
            shutil.copy(source / name, destination / name)
    return destination


def save_full(
    model: UnitForPreTraining,
    processor: UnitProcessor,
    destination: str | Path,
    dtype: torch.dtype | None = None,
    with_code: bool = True,
) -> None:
    """Weights, configuration with `auto_map` for every Auto class, processor, tokenizer, code."""
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    if dtype is not None:
        model = model.to(dtype)
    model.config.auto_map = dict(FULL_AUTO_MAP)
    model.config.architectures = [UnitForPreTraining.__name__]
    model.save_pretrained(destination)
    _save_processor(processor, destination)
    if with_code:
        copy_code(destination)


def save_encoder(
    model: UnitForPreTraining | UnitForConditionalGeneration | UnitModel,
    processor: UnitImageProcessor,
    destination: str | Path,
    with_code: bool = True,
) -> None:
    """The encoder alone. One that transformers has (CLIP, ...) is saved as that class, with no code of ours."""
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    encoder = model.vision_model
    if isinstance(encoder, UnitVisionModel):
        encoder.config.auto_map = dict(ENCODER_AUTO_MAP)
        encoder.save_pretrained(destination)
        processor.save_pretrained(destination)
        if with_code:
            copy_code(destination)
    else:
        encoder.save_pretrained(destination)


def _save_processor(processor: UnitProcessor, destination: Path) -> None:
    processor.auto_map = dict(PROCESSOR_AUTO_MAP)
    processor.image_processor.auto_map = {"AutoImageProcessor": PROCESSOR_AUTO_MAP["AutoImageProcessor"]}
    processor.save_pretrained(destination)
